"""What a heal trains on: the profile's own samples and new ones, and nothing that anything is measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moacompress.calibration.data.samples import SHORTEST, fingerprint_sample
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import DataError
from moacompress.healer.distillation import hard_loss, hidden_loss, soft_loss
from moacompress.healer.training_data import HealData, count_samples, held_out_samples, make_heal_data
from moacompress.models.kl import kl_divergence
from moacompress.models.source import load_source
from moacompress.prompts.pools import pool_of
from moacompress.recipe import Recipe

NEEDLES = [{"generator": "needle"}]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of six texts, whose words say which one they are of."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        words = (f"word{number}x{index}" for index in range(400))
        (folder / f"{number}.txt").write_text(" ".join(words) + ".")
    return folder


@pytest.fixture(scope="module")
def profiled(healable: dict[str, Path]) -> Profile:
    found = Profile.load(healable["profile"])
    return replace(found, recipe=found.recipe.override(calibration__sources=NEEDLES))


def recipe(text: Path | None = None, seed: int = 0, **heal: object) -> Recipe:
    calibration = {} if text is None else {"text": str(text)}
    return Recipe.from_dict({"heal": heal, "seed": seed, "calibration": calibration})


def made(profile: Profile, chosen: Recipe) -> HealData:
    return make_heal_data(profile, load_source(profile.source), chosen)


def test_the_profile_s_own_samples_come_first(profiled: Profile) -> None:
    chosen = recipe(samples=10, text_share=0.3, lengths=[128, 192])
    known = {fingerprint_sample(sample) for sample in profiled.calibration_samples()}
    data = made(profiled, chosen)
    assert {fingerprint_sample(sample) for sample in data.training} <= known
    assert [sample.kind for sample in data.training] == ["answer"] * 7 + ["text"] * 3
    assert data.held_out == profiled.validation
    assert data.fingerprint == made(profiled, chosen).fingerprint
    assert data.fingerprint != made(profiled, recipe(seed=1, samples=10, text_share=0.3)).fingerprint


def test_new_samples_are_others_than_the_profile_s(profiled: Profile, texts: Path) -> None:
    chosen = recipe(texts, samples=4, text_share=0.5, lengths=[512])
    counts = count_samples(profiled, profiled.calibration_samples(), chosen)
    assert (counts.answers, counts.texts, counts.new_answers, counts.new_texts) == (0, 0, 2, 2)
    data = made(profiled, chosen)
    assert [(sample.kind, sample.length) for sample in data.training] == [("answer", 512)] * 2 + [("text", 512)] * 2
    assert data.fingerprint == made(profiled, chosen).fingerprint
    others = [made(profiled, recipe(texts, seed, samples=4, text_share=0.5, lengths=[512])) for seed in (1, 2)]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 3
    tokenizer = load_source(profiled.source).tokenizer
    for sample in data.training[2:]:
        assert sample.answer_mask.sum() == 256
        assert not sample.answer_mask[:SHORTEST].any()
        said = str(tokenizer.decode(sample.input_ids)).replace(" ", "")
        pool = pool_of([(texts / f"{number}.txt").read_text() for number in range(6)], "calibration", "texts")
        assert {number for number in range(6) if f"word{number}x" in said} <= set(pool)


def test_held_out_samples_are_no_longer_than_what_is_trained_on(profiled: Profile) -> None:
    assert {sample.length for sample in held_out_samples(profiled, recipe(lengths=[128]))} == {128}
    assert len(held_out_samples(profiled, recipe(held_out=2))) == 2
    with pytest.raises(DataError, match="there is nothing to measure the heal on"):
        held_out_samples(profiled, recipe(lengths=[100]))


def test_held_out_text_is_not_trained_on(profiled: Profile, texts: Path) -> None:
    chosen = recipe(texts, samples=4, text_share=0.5, lengths=[512])
    data = made(profiled, chosen)
    trained = next(sample for sample in data.training if sample.kind == "text")
    held_out = replace(trained, input_ids=trained.input_ids[40:], answer_mask=trained.answer_mask[40:])
    theirs = replace(profiled, validation=[held_out])
    with pytest.raises(
        DataError,
        match=r"[\d.]+% of the runs of 13 words in the held-out text of .* were seen in training on .*--allow-overlap",
    ):
        made(theirs, chosen)
    allowed = make_heal_data(theirs, load_source(theirs.source), chosen, allow_overlap=True)
    assert (allowed.overlap["text"] or 0) > 0.9
    assert allowed.overlap["answer"] is None


def test_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, dense = torch.randn(2, 5, 30, generator=generator)
    assert float(soft_loss(logits, dense)) == pytest.approx(kl_divergence(dense, logits), rel=1e-5)
    assert float(soft_loss(dense, dense)) == pytest.approx(0, abs=1e-6)
    labels = torch.tensor([3, 1, 4, 1, 5])
    chosen = logits.double().log_softmax(-1).numpy()[np.arange(5), labels.numpy()]
    assert float(hard_loss(logits, labels)) == pytest.approx(-chosen.mean(), rel=1e-5)
    small, large = torch.randn(2, 1, 4, 8, generator=generator) * torch.tensor([1.0, 100.0])[:, None, None, None]
    assert float(hidden_loss([small * 1.1, large], [small, large])) == pytest.approx(0.01 / 2, rel=1e-4)
    assert float(hidden_loss([small, large * 1.1], [small, large])) == pytest.approx(0.01 / 2, rel=1e-4)

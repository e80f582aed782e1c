"""Mean keys of a profile: found before formats are priced, kept, alike in shards, and part of the plans that are made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from moacompress.calibration.profile import centres, preparation
from moacompress.calibration.profile.centres import FIRST, mean_keys
from moacompress.calibration.profile.profiler import profile
from moacompress.calibration.profile.store import Profile
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.key_centres import centre_numbers
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach

if TYPE_CHECKING:
    from tests.calibration.conftest import Sources

RECIPE = Recipe.from_dict(
    {
        "calibration": {"lengths": [512], "samples": 3, "validation_samples": 2, "text_samples": 0, "answer_tokens": 4},
        "profile": {"draws": 1},
    },
    "a recipe",
)


def test_they_are_means_of_rotated_keys(load: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load()
    texts = [torch.randint(3, 160, (count,), generator=torch.Generator().manual_seed(count)) for count in (60, 31)]
    keys: list[Any] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def noted(query: Any, key: Any, *rest: Any, **more: Any) -> Any:
        found = rotate(query, key, *rest, **more)
        keys.append(found[1][0, :, FIRST:].double())
        return found

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", noted)
    found = mean_keys(source, [text.tolist() for text in texts])
    assert len(keys) == 2 * 3
    for layer in range(3):
        wanted = torch.cat([keys[layer], keys[3 + layer]], 1).mean(1).numpy()
        assert np.allclose(np.asarray(centre_numbers(found[layer], 16)), wanted, atol=2e-3 * abs(wanted).max())


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_bounded_scores_have_none_and_plans_of_all_run(family: str, load: Sources) -> None:
    source = load(family)
    found = mean_keys(source, [list(range(3, 60))])
    assert any(np.frombuffer(head, "<f2").any() for layer in found for head in layer) == (family == "gpt_oss")
    plan = Plan.uniform(source.shape, Rule.FULL.in_formats("int4", "int4"))
    attach(source.model, replace(plan, centres=found))(torch.tensor([[*range(3, 40)]]))  # a plan of such a profile runs


def test_a_profile_keeps_them_and_its_plans_have_them(
    load: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    means = centres.mean_keys

    def counted(source: SourceModel, texts: Any, *rest: Any) -> Any:
        read.append(len(texts))
        return means(source, texts, *rest)

    monkeypatch.setattr(preparation, "mean_keys", counted)
    source = load("qwen2")
    made = profile(source, tmp_path / "p", RECIPE)
    assert read == [3]
    assert len(made.centres) == 3
    assert Profile.load(tmp_path / "p").centres == made.centres
    plan = made.offering(["int8"]).plan([[Rule.FULL.in_formats("int8", "native")] * 2] * 3)
    assert plan.used_centres == made.centres
    # a run that was stopped behind them reads nothing again
    path = tmp_path / "p" / "profile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "complete": False}))
    assert profile(source, tmp_path / "p", RECIPE).centres == made.centres
    assert read == [3]
    without = profile(source, tmp_path / "without", RECIPE.override(profile__centres=False))
    assert (without.centres, read) == ((), [3])
    found, wanted = without.influence("robust"), made.influence("robust")
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-6 * wanted.max())  # of native keys nothing changes
    native = profile(source, tmp_path / "native", RECIPE.override(profile__formats=[]))
    assert (native.centres, read) == ((), [3])


def test_formats_cost_what_is_left(load: Sources, tmp_path: Path) -> None:
    """Keys with a large constant: less it, codes of 4 bits are predicted to lose a small part."""
    source = load(attention_bias=True)
    for layer in source.model.model.layers:
        layer.self_attn.k_proj.bias.data.zero_().view(2, -1)[:, 7] = 100.0
    lost = []
    for name, recipe in (("less", RECIPE), ("whole", RECIPE.override(profile__centres=False))):
        made = profile(source, tmp_path / name, recipe)
        sums = made.statistics.arrays["key_squares"].astype(np.float64).sum((0, 1, 2))
        lost.append(sums[1 + made.profiled_formats.index("int4")])
    assert lost[0] < 0.2 * lost[1]


def test_prompts_are_from_all_over_the_drafts() -> None:
    drafts: Any = [SimpleNamespace(ids=np.array([number])) for number in range(100)]
    found = [ids[0] for ids in centres.centre_texts(drafts)]
    assert (len(found), found[0], found[-1]) == (centres.SAMPLES, 0, 99)
    assert centres.centre_texts(drafts[:2]) == [[0], [1]]

"""The estimate of a profile's time and memory, on tiny models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from moacompress.calibration.data.plain import TARGETS
from moacompress.calibration.gates.training import JUDGED
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.centres import SAMPLES
from moacompress.calibration.profile.estimate import (
    SampleCounts,
    backward_passes,
    estimate_profile,
    profile_bytes,
    profile_estimator,
    profile_work,
    sample_counts,
)
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.core.errors import DataError, ModelError
from moacompress.core.progress import Progress
from moacompress.estimate import stopwatch
from moacompress.estimate.live_bytes import LiveBytes
from moacompress.estimate.work import Kind, Work
from moacompress.models.source import model_shape
from moacompress.models.weight_bytes import resident_bytes
from moacompress.recipe import Recipe
from moacompress.rules.candidates import candidate_rules
from moacompress.rules.rule import SINKS
from moacompress.rules.rule_table import RuleTable
from tests.calibration.conftest import random_sample

if TYPE_CHECKING:
    from tests.calibration.conftest import Sources


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times everything once only, where no test looks at the seconds."""
    monkeypatch.setattr(stopwatch, "REPEATS", 1)


def recipe(*lengths: int, profile: dict[str, Any] | None = None, **calibration: Any) -> Recipe:
    numbers = {"samples": 5, "validation_samples": 3, "longer_samples": 0, "answer_tokens": 8, **calibration}
    return Recipe.from_dict({"calibration": {"lengths": lengths, **numbers}, "profile": profile or {}})


@pytest.mark.usefixtures("quick")
def test_numbers_add_up_to_the_recipe_s(load: Sources) -> None:
    asked = recipe(128, 256, text="book.txt", text_samples=3, profile={"gates": True, "gate_samples": 4})
    found = estimate_profile(load(), asked)
    assert "In all: 5 + 3 plain-text calibration and 3 validation samples, 2,816 tokens, about" in found.line()
    data = json.loads(json.dumps(found.to_dict()))
    names = ("length", "samples", "text_samples", "validation_samples", "tokens")
    assert [tuple(part[name] for name in names) for part in data["lengths"]] == [
        (128, 2, 1, 1, (4 + 4) * 128),  # of this length are those for gates too
        (256, 3, 2, 2, 7 * 256),
    ]
    assert data["estimate"] is True
    for name in names[1:]:
        assert data[name] == sum(part[name] for part in data["lengths"])
    assert data["seconds"] == pytest.approx(sum(part["seconds"] for part in data["lengths"]), abs=0.01)
    for part in data["lengths"]:
        assert part["seconds"] == pytest.approx(part["answer_seconds"] + part["profile_seconds"], abs=0.01)
        assert min(part["answer_seconds"], part["forward_seconds"], part["decode_seconds"]) > 0
        assert part["peak_bytes"] > data["weight_bytes"]
    assert data["peak_bytes"] == max(part["peak_bytes"] for part in data["lengths"])
    assert data["lengths"][0]["fitting_seconds"] > 0 == data["lengths"][1]["fitting_seconds"]


def counted(work: list[Work]) -> dict[tuple[Kind, int, int, str], float]:
    """Returns how many passes of each kind, length and number of targets there are in each stage."""
    found: dict[tuple[Kind, int, int, str], float] = {}
    for part in work:
        key = part.kind, part.tokens, part.targets, part.stage
        found[key] = found.get(key, 0) + part.count
    return found


def test_the_work_of_a_profile() -> None:
    chosen = recipe(256, 2048, text="book.txt", text_samples=4, profile={"draws": 2, "centres": False})
    counts = sample_counts(chosen, 4096)
    assert counts == {256: SampleCounts(2, 2, 1), 2048: SampleCounts(3, 2, 2)}
    plain = {
        (Kind.FORWARD, 256, 1, "answers"): 3,
        (Kind.STEP, 256, 1, "answers"): 3 * 8,
        (Kind.SAMPLE, 256, 8, "passes"): 2,
        (Kind.SAMPLE, 256, TARGETS, "passes"): 2,
        (Kind.FORWARD, 2048, 1, "answers"): 5,
        (Kind.STEP, 2048, 1, "answers"): 5 * 8,
        (Kind.SAMPLE, 2048, 8, "passes"): 3,
        (Kind.SAMPLE, 2048, TARGETS, "passes"): 2,
        (Kind.RERUN, 2048, 0, "passes"): 2 * 5,  # longer than what keeps all that a backward pass needs
    }
    assert counted(profile_work(chosen, counts, 2, 64)) == plain
    centred = counted(profile_work(chosen.override(profile__centres=True), counts, 2, 64))
    read = sum(centred.pop((Kind.FORWARD, length, 0, "passes")) for length in (256, 2048))
    assert read == pytest.approx(SAMPLES)
    assert centred == plain
    gated = counted(profile_work(chosen.override(profile__gates=True, profile__gate_samples=100), counts, 2, 16383))
    assert gated.pop((Kind.GATE_SAMPLE, 256, 8, "passes")) == 100
    assert gated.pop((Kind.FORWARD, 256, 0, "gates")) == 2 * (100 + JUDGED)  # sums of two layers do not fit together
    assert gated == plain | {(Kind.FORWARD, 256, 1, "answers"): 103, (Kind.STEP, 256, 1, "answers"): 103 * 8}
    everything = recipe(512, profile={"draws": 3, "baselines": True})
    assert backward_passes(everything.profile) == 4
    longer = recipe(128, 256, longer_samples=3)
    counts = sample_counts(longer, 4096)
    assert counts[512] == SampleCounts(0, 0, 3)
    kinds = {part.kind for part in profile_work(longer, counts, 2, 64) if part.tokens == 512}
    assert kinds == {Kind.FORWARD, Kind.STEP}
    assert len(sample_counts(recipe(128, 2049, longer_samples=3), 4096)) == 2  # the context ends


@pytest.mark.parametrize(
    ("family", "twice"), [("llama", False), ("llama", True), ("mistral", True), ("gemma2", False), ("gpt_oss", True)]
)
def test_memory_is_that_of_a_real_sample(
    load: Sources, monkeypatch: pytest.MonkeyPatch, family: str, twice: bool
) -> None:
    """Extrapolated from short passes, it is what a sample of eight times their length really takes."""
    n, source = 1024, load(family, sliding_window=2048 if family != "llama" else None)
    monkeypatch.setattr(passes, "KEEP_TOKENS", 0 if twice else n)
    chosen = recipe(n, samples=1, validation_samples=1)
    rules = candidate_rules(n, SINKS, chosen.profile.min_window)
    table = RuleTable.of(rules, chosen.profile.min_window)
    with LiveBytes() as live:
        sample_statistics(source.model, source.shape, table, random_sample(n, 8), chosen.profile, 0, 0)
    ids = torch.from_numpy(random_sample(n, 8).input_ids).expand(2, -1)
    with torch.no_grad(), LiveBytes() as reading:
        source.model.base_model(input_ids=ids, use_cache=True)
    found = profile_bytes(source, chosen, sample_counts(chosen, 4096))[n] - resident_bytes(source.model)
    assert found == pytest.approx(max(live.peak, reading.peak), rel=0.1)


def test_the_time_is_that_of_a_real_sample(load: Sources) -> None:
    """Within a factor of three: tiny models take milliseconds, which are hard to time on a busy machine."""
    n, source = 768, load(hidden_size=128, intermediate_size=512)
    chosen = recipe(n, samples=1, validation_samples=1)
    rules = candidate_rules(n, SINKS, chosen.profile.min_window)
    table, seconds = RuleTable.of(rules, chosen.profile.min_window), []
    for _ in range(4):
        begin = time.thread_time()
        sample_statistics(source.model, source.shape, table, random_sample(n, 8), chosen.profile, 0, 0)
        seconds.append(time.thread_time() - begin)
    ratio = profile_estimator(source, chosen).one(Kind.SAMPLE, n, 8) / float(np.median(seconds[1:]))
    assert 1 / 3 < ratio < 3


def test_what_cannot_be_profiled_is_refused_before_anything_runs(
    load: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("moacompress.calibration.profile.estimate.profile_bytes", None)
    with pytest.raises(DataError, match="length 8,192 is beyond the model's context of 4,096 tokens"):
        estimate_profile(load(), recipe(256, 8192))
    with pytest.raises(ModelError):
        estimate_profile(str(tmp_path / "nothing.gguf"), recipe(256))


@pytest.mark.usefixtures("quick")
def test_nothing_is_written_and_the_model_is_as_before(
    tiny_folder: Path, load: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []

    class Told(Progress):
        def start(self, what: str, total: int) -> None:
            told.append(f"{what} {total}")

        def step(self, note: str = "") -> None:
            told.append(note)

    before = sorted(tiny_folder.rglob("*"))
    assert estimate_profile(str(tiny_folder), recipe(128, 192), Told()).seconds > 0
    assert told == ["timing short passes 3", "memory", "128 tokens", "192 tokens"]
    assert sorted(tiny_folder.rglob("*")) == before
    assert not list(tmp_path.iterdir())
    source = load()
    attention, weights = source.model.config._attn_implementation, source.shape.weights_fingerprint
    assert estimate_profile(source, recipe(128)).seconds > 0
    assert source.model.config._attn_implementation == attention
    assert model_shape(source.model).weights_fingerprint == weights
    assert all(parameter.grad is None for parameter in source.model.parameters())

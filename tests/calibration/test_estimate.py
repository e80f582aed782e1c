"""The estimate of a profile's time and memory, on tiny models."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moacompress.calibration.data.answers import BATCH_TOKENS
from moacompress.calibration.data.plain import TARGETS
from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import passes, probe
from moacompress.calibration.profile.estimate import LengthEstimate, ProfileEstimate, _Arithmetic, dry_run
from moacompress.calibration.profile.influence import TILE
from moacompress.calibration.profile.probe import AttentionSeconds, Gathered, Probe
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.core.errors import DataError, ModelError, PlanError
from moacompress.core.progress import Progress
from moacompress.core.tables import readable_seconds
from moacompress.estimate.live_bytes import Line, LiveBytes
from moacompress.models.source import SourceModel, model_shape
from moacompress.recipe import Recipe
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.candidates import candidate_rules
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

Factory = Callable[..., PreTrainedModel]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times everything once only, where no test looks at the seconds."""
    monkeypatch.setattr(probe, "REPEATS", 1)


@pytest.fixture(scope="module")
def load(tiny_model: Factory, tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[..., SourceModel]:
    """Returns a function that loads a tiny model: `load("mistral", num_hidden_layers=2)`."""

    def build(family: str = "llama", **overrides: Any) -> SourceModel:
        model = tiny_model(family, **overrides)
        return SourceModel(model, tiny_tokenizer, "tiny", model_shape(model), 4096)

    return build


def recipe(*lengths: int, profile: dict[str, Any] | None = None, **calibration: Any) -> Recipe:
    numbers = {"samples": 5, "validation_samples": 3, "longer_samples": 0, "answer_tokens": 8, **calibration}
    return Recipe.from_dict({"calibration": {"lengths": lengths, **numbers}, "profile": profile or {}})


def random_sample(n: int, targets: int = 8) -> Sample:
    return Sample(np.random.default_rng(0).integers(3, 150, n), np.arange(n) >= n - targets, "random", n)


@pytest.mark.usefixtures("quick")
def test_numbers_add_up_to_the_recipe_s(load: Callable[..., SourceModel]) -> None:
    found = dry_run(load(), recipe(128, 256, text="book.txt", text_samples=3))
    assert [(part.length, part.samples, part.text_samples, part.validation_samples) for part in found.lengths] == [
        (128, 2, 1, 1),
        (256, 3, 2, 2),
    ]
    assert [part.tokens for part in found.lengths] == [4 * 128, 7 * 256]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["estimate"] is True
    for name in ("samples", "text_samples", "validation_samples", "tokens"):
        assert data[name] == sum(part[name] for part in data["lengths"])
    assert (data["samples"], data["text_samples"], data["validation_samples"]) == (5, 3, 3)
    assert data["seconds"] == pytest.approx(sum(part["seconds"] for part in data["lengths"]), abs=0.01)
    for part in data["lengths"]:
        assert part["seconds"] == pytest.approx(part["answer_seconds"] + part["profile_seconds"], abs=0.01)
        assert part["answer_seconds"] > 0
        assert part["peak_bytes"] > data["weight_bytes"]
    assert data["peak_bytes"] == max(part["peak_bytes"] for part in data["lengths"])


@pytest.mark.usefixtures("quick")
def test_gates_take_forward_passes(load: Callable[..., SourceModel]) -> None:
    source, chosen = load(), recipe(128, 256)
    probe = Probe(source, chosen, None)
    arithmetic = _Arithmetic(probe, 4)
    plain = arithmetic.estimate(256, 2, 1, 1)
    gated = arithmetic.with_gates(plain, 1000)
    assert gated.profile_seconds > 5 * plain.profile_seconds  # by hundreds, but what is timed twice is not timed alike
    assert gated.answer_seconds > 5 * plain.answer_seconds
    assert gated.tokens == plain.tokens + 1000 * 256
    assert dry_run(source, chosen.override(profile__gates=True)).seconds > 0


@pytest.mark.usefixtures("quick")
def test_longer_validation_samples_are_answered_alone(load: Callable[..., SourceModel]) -> None:
    *_, longer = dry_run(load(), recipe(128, 256, longer_samples=3)).lengths
    assert (longer.length, longer.samples, longer.text_samples, longer.validation_samples) == (512, 0, 0, 3)
    assert longer.tokens == 3 * 512
    assert longer.answer_seconds > 0
    assert longer.profile_seconds == 0
    assert len(dry_run(load(), recipe(128, 2049, longer_samples=3)).lengths) == 2  # the context ends at 4,096


def test_weights_are_counted_once(load: Callable[..., SourceModel]) -> None:
    tied, free = (load(tie_word_embeddings=tie) for tie in (True, False))
    counts = [Probe(source, recipe(128), None).weight_bytes for source in (tied, free)]
    assert counts[1] - counts[0] == 160 * 64 * 4
    assert counts[0] >= sum(parameter.numel() * 4 for parameter in tied.model.parameters())


def test_a_person_sees_that_it_is_an_estimate() -> None:
    parts = (
        LengthEstimate(512, 12, 0, 6, 9216, 20.0, 30.0, 800 * 2**20, 1.0, 0.1),
        LengthEstimate(4096, 12, 2, 6, 81920, 1000.0, 8000.0, 1200 * 2**20, 9.0, 0.2),
    )
    assert ProfileEstimate.of(parts, 513 * 2**20).lines() == [
        "An estimate from a short pass and one tile of attention; nothing was profiled or written.",
        "512 tokens: 12 calibration and 6 validation samples, 50 s, 800.0 MiB",
        "4,096 tokens: 12 + 2 plain-text calibration and 6 validation samples, 2.5 h, 1.2 GiB",
        "In all: 24 + 2 plain-text calibration and 12 validation samples, 91,136 tokens, about 2.5 h.",
        "Memory: about 1.2 GiB at most, 513.0 MiB of it weights, beside Python's own.",
    ]


@pytest.mark.usefixtures("quick")
def test_longer_samples_take_more_memory(load: Callable[..., SourceModel]) -> None:
    for family in ("llama", "mistral", "gemma2", "gpt_oss"):
        short, long = dry_run(load(family), recipe(256, 1536, samples=2, validation_samples=2)).lengths
        assert long.peak_bytes > 2 * short.peak_bytes - 10**6, family


def test_times_of_parts_add_up() -> None:
    """Of two layers whose times are known: 0.5 s choosing, 2 s without a tile, 3 s a tile, 1 s of tokens."""
    layer = AttentionSeconds(0.5, 2.0, {Gathered(): 3.0, Gathered(tokens=True): 1.0})
    given: Any = SimpleNamespace(
        beside=(0.25, 0.5),
        output_seconds=lambda targets: 0.125 * targets,
        output_bytes=lambda targets: 8,
        attention=lambda length: [layer, layer],
        forward=lambda length: 0.25 * length + 2,
        step=lambda length: length / 512,
        answer_bytes=lambda length, batch: length * batch,
        sample_lines=lambda twice: (Line(1, 2), Line(3, 4)),
        weight_bytes=100,
        passes=Counter({Gathered(): 2}),
        of_gates=Counter({Gathered(tokens=True): 2}),
        gate_groups=3,
        choice_bytes=lambda length: 16 * length,
        around=None,
    )
    found = _Arithmetic(given, 8).estimate(2 * TILE, 3, 1, 5)
    n, forward = 2 * TILE, 0.25 * 2 * TILE + 2
    assert found.forward_seconds == forward
    assert found.decode_seconds == n / 512
    assert found.answer_seconds == 8 * (forward + 8 * n / 512)
    of_sample, of_text = (
        2 * (0.5 * n + 0.125 * targets + 4) + forward + 1 + 2 * (2 * 3 + math.ceil(targets / TILE) * 3)
        for targets in (8, TARGETS)
    )
    assert found.profile_seconds == 3 * of_sample + of_text
    of_gates = 2 * (0.5 * n + 0.125 * 8 + 4) + forward + 2 * (2 * 1 + math.ceil(8 / TILE) * 1)
    more = _Arithmetic(given, 8).with_gates(found, 6)
    assert more.profile_seconds - found.profile_seconds == 6 * of_gates + (3 * 6 + 3 * 6) * forward
    assert more.answer_seconds - found.answer_seconds == 6 * (forward + 8 * n / 512)
    assert found.peak_bytes == 100 + max(
        16 * n + 1 + 2 * n + 8, 16 * n + 3 + 4 * n, n * min(8, max(1, BATCH_TOKENS // n))
    )


@pytest.mark.usefixtures("quick")
def test_running_layers_twice_takes_less_memory(
    load: Callable[..., SourceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wanted = load(num_hidden_layers=8), recipe(1024, samples=1, validation_samples=1)
    kept = dry_run(source, wanted).lengths[0].peak_bytes
    monkeypatch.setattr(passes, "KEEP_TOKENS", 1023)
    assert dry_run(source, wanted).lengths[0].peak_bytes < kept / 2


def test_more_passes_take_longer(load: Callable[..., SourceModel]) -> None:
    plain = Gathered.of(ProfileRecipe(draws=3), around=False)
    assert plain == {Gathered(): 3}
    everything = ProfileRecipe(draws=3, baselines=True, heads=True, anchors=2)
    assert Gathered.of(everything, around=True) == {
        Gathered(copies=True, heads=True): 1,
        Gathered(copies=True): 2,
        Gathered(baselines=True): 1,
        Gathered(): 1,
    }
    source = load()
    lines = [dry_run(source, recipe(512, profile={"draws": draws})).lengths[0] for draws in (2, 40)]
    assert lines[1].profile_seconds > 2.5 * lines[0].profile_seconds  # by far, so that a busy machine does not matter


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.usefixtures("quick")
def test_memory_is_that_of_a_real_sample(
    load: Callable[..., SourceModel], monkeypatch: pytest.MonkeyPatch, family: str, twice: bool
) -> None:
    """Extrapolated from short passes, it is what a sample of eight times their length really takes."""
    n, source = 1024, load(family, sliding_window=2048 if family != "llama" else None)
    monkeypatch.setattr(passes, "KEEP_TOKENS", 0 if twice else n)
    chosen = recipe(n, samples=1, validation_samples=1)
    rules = candidate_rules(n, chosen.profile.sinks, chosen.profile.min_window)
    table = RuleTable.of(rules, chosen.profile.min_window)
    with LiveBytes() as live:
        sample_statistics(source.model, source.shape, table, random_sample(n), chosen.profile, None, 0, 0)
    ids = torch.from_numpy(random_sample(n).input_ids).expand(2, -1)
    with torch.no_grad(), LiveBytes() as reading:
        source.model.base_model(input_ids=ids, use_cache=True)
    found = dry_run(source, chosen)
    assert found.peak_bytes - found.weight_bytes == pytest.approx(max(live.peak, reading.peak), rel=0.1)


def test_the_time_is_that_of_a_real_sample(load: Callable[..., SourceModel]) -> None:
    """Within a factor of three: tiny models take milliseconds, which are hard to time on a busy machine."""
    n, source = 768, load(hidden_size=128, intermediate_size=512)
    chosen = recipe(n, samples=1, validation_samples=1)
    rules = candidate_rules(n, chosen.profile.sinks, chosen.profile.min_window)
    table, seconds = RuleTable.of(rules, chosen.profile.min_window), []
    for _ in range(4):
        begin = time.thread_time()
        sample_statistics(source.model, source.shape, table, random_sample(n), chosen.profile, None, 0, 0)
        seconds.append(time.thread_time() - begin)
    ratio = dry_run(source, chosen).lengths[0].profile_seconds / float(np.median(seconds[1:]))
    assert 1 / 3 < ratio < 3


def test_a_busy_machine_is_noticed_and_the_time_is_that_alone(
    load: Callable[..., SourceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes have six of seven seconds: what this one computes takes seven times as long."""
    source, chosen = load(hidden_size=128, intermediate_size=512), recipe(512, samples=1, validation_samples=1)
    alone = dry_run(source, chosen)
    busy = SimpleNamespace(perf_counter=lambda: 7 * time.thread_time(), thread_time=time.thread_time)
    monkeypatch.setattr("moacompress.estimate.stopwatch.time", busy)
    found = dry_run(source, chosen)
    assert 1 / 3 < found.seconds / alone.seconds < 3
    assert found.slowdown == pytest.approx(7, rel=0.01)
    assert found.to_dict()["slowdown"] == pytest.approx(7, rel=0.01)
    assert found.lines()[-1] == (
        "The machine is busy: this is the time it takes alone; beside what runs now it would be about "
        f"{readable_seconds(found.slowdown * found.seconds)}."
    )
    monkeypatch.setattr(
        "moacompress.estimate.stopwatch.time",
        SimpleNamespace(perf_counter=time.thread_time, thread_time=time.thread_time),
    )
    assert not any("busy" in line for line in dry_run(source, chosen).lines())


def test_rules_that_select_count(load: Callable[..., SourceModel]) -> None:
    source = load()
    gates, none = (
        Probe(source, recipe(512, profile={"gates": on, "draws": 3}), None).attention(512) for on in (True, False)
    )
    assert all(layer.choosing > 0 and set(layer.tiles) == {Gathered(), Gathered(tokens=True)} for layer in gates)
    assert all(layer.choosing == 0 and set(layer.tiles) == {Gathered()} for layer in none)


@pytest.mark.usefixtures("quick")
def test_around_a_plan_takes_a_pass_more(
    load: Callable[..., SourceModel], random_plan: Callable[..., Plan], tiny_model: Factory
) -> None:
    source = load()
    plan = random_plan(source.shape, seed=1)
    assert Probe(source, recipe(256), plan).passes.total() == Probe(source, recipe(256), None).passes.total() + 1
    assert dry_run(source, recipe(256), around=plan).seconds > 0
    other = random_plan(model_shape(tiny_model("llama", seed=5)), seed=1)
    with pytest.raises(PlanError):
        dry_run(source, recipe(256), around=other)


def test_bad_lengths_are_refused_before_anything_runs(
    load: Callable[..., SourceModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("moacompress.calibration.profile.estimate.Probe", None)
    with pytest.raises(DataError, match="length 8,192 is beyond the model's context of 4,096 tokens"):
        dry_run(load(), recipe(256, 8192))
    with pytest.raises(DataError, match="length 96 is too short to profile"):
        dry_run(load(), recipe(96, 256))
    with pytest.raises(ModelError):
        dry_run(str(tmp_path / "nothing.gguf"), recipe(256))


@pytest.mark.usefixtures("quick")
def test_nothing_is_written_and_the_model_is_as_before(
    tiny_folder: Path, load: Callable[..., SourceModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []

    class Told(Progress):
        def start(self, what: str, total: int) -> None:
            told.append(f"{what} {total}")

        def step(self, note: str = "") -> None:
            told.append(note)

    before = sorted(tiny_folder.rglob("*"))
    assert dry_run(str(tiny_folder), recipe(128, 192), Told()).seconds > 0
    assert told == ["timing short passes 3", "192 tokens", "128 tokens", "192 tokens"]
    assert sorted(tiny_folder.rglob("*")) == before
    assert not list(tmp_path.iterdir())
    source = load()
    attention, weights = source.model.config._attn_implementation, source.shape.weights_fingerprint
    dry_run(source, recipe(128))
    assert source.model.config._attn_implementation == attention
    assert model_shape(source.model).weights_fingerprint == weights
    assert all(parameter.grad is None for parameter in source.model.parameters())


def test_pairs_of_rows_and_keys() -> None:
    for n, window in ((7, None), (7, 3), (7, 7), (7, 20)):
        seen = sum(min(row + 1, window or n) for row in range(n))
        assert probe._pairs(n, window) == seen


def test_full_plans_are_no_plan(load: Callable[..., SourceModel]) -> None:
    source = load()
    rules = tuple(tuple(Rule.FULL for _ in range(source.shape.kv_heads)) for _ in range(source.shape.layers))
    probed = Probe(source, recipe(128), Plan(source.shape, 32, rules))
    assert all(not kind.planned for kind in probed._kinds)

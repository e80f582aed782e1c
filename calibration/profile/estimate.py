"""What a profile will take, before anything heavy starts: samples, tokens, time and peak memory of every length.

Short samples run as in a profile: their time is extrapolated to longer ones, and so are the bytes of their tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from moacompress.calibration.data.answers import BATCH_TOKENS
from moacompress.calibration.data.plain import TARGETS
from moacompress.calibration.data.sample_sources import check_counts, longer_counts, make_drafts, spread
from moacompress.calibration.data.samples import Sample
from moacompress.calibration.gates.training import JUDGED
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.centres import SAMPLES
from moacompress.calibration.profile.passes import checkpointed, chunks, output_logits
from moacompress.calibration.profile.request import check_lengths, data_recipe, rules_on_offer
from moacompress.calibration.profile.sample_statistics import FisherCotangent, sample_statistics, token_influence
from moacompress.calibration.profile.shard import Shard, parse_shard
from moacompress.core.progress import SILENT, Progress
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.estimator import Estimator, Pass, example_ids
from moacompress.estimate.live_bytes import LiveBytes, extrapolated_bytes
from moacompress.estimate.work import Kind, Work, answers
from moacompress.models.least_squares import in_memory
from moacompress.models.placement import input_device
from moacompress.models.source import SourceModel
from moacompress.models.weight_bytes import resident_bytes
from moacompress.prompts.pools import SPLITS
from moacompress.recipe import Recipe
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.ready_model import load_for

SAMPLE_TOKENS = (128, 192)
"""Of the samples whose bytes are counted."""
PROMPT_TOKENS = (128, 256, 384)
"""Of the prompts whose bytes are counted."""
ANSWERS, PASSES, GATES = "answers", "passes", "gates"
"""Stages of a profile."""


class SampleCounts(NamedTuple):
    """How many samples of a length are answered and profiled, are plain text and profiled, and are held out and answered."""

    samples: int = 0
    text_samples: int = 0
    validation_samples: int = 0


def sample_counts(recipe: Recipe, context: int) -> dict[int, SampleCounts]:
    """Returns the numbers of samples of every length, ascending; `context` is the model's in tokens, 0 if it has no limit."""
    asked = recipe.calibration
    counts = asked.samples, asked.text_samples, asked.validation_samples
    shares = ([row[0] for row in spread(count, len(asked.lengths), [1.0])] for count in counts)
    found = {length: SampleCounts(*numbers) for length, *numbers in zip(asked.lengths, *shares, strict=True)}
    if longer := sum(longer_counts(recipe, context)):
        found[2 * max(asked.lengths)] = SampleCounts(validation_samples=longer)
    return dict(sorted(found.items()))


def _shard_counts(source: SourceModel, recipe: Recipe, shard: str) -> dict[int, SampleCounts]:
    """Returns the numbers of one shard, from the very samples that it would have."""
    chosen = data_recipe(recipe, rules_on_offer(recipe))
    drafts = [make_drafts(source, chosen, split) for split in SPLITS[:2]]
    part = Shard.of(*parse_shard(shard), *drafts)
    found = {length: [0, 0, 0] for length in recipe.calibration.lengths}
    for split, numbers in enumerate((part.calibration, part.validation)):
        for draft in (drafts[split][number] for number in numbers):
            if draft.kind != "text" or not split:  # plain text of validation is not answered
                column = 2 if split else int(draft.kind == "text")
                found.setdefault(draft.length, [0, 0, 0])[column] += 1
    return {length: SampleCounts(*numbers) for length, numbers in sorted(found.items())}


def backward_passes(chosen: ProfileRecipe) -> int:
    """Returns how many backward passes a sample takes."""
    return chosen.draws + chosen.baselines


def profile_work(recipe: Recipe, counts: Mapping[int, SampleCounts], layers: int, hidden: int) -> list[Work]:
    """Returns what a profile runs; `hidden` numbers a token has between layers."""
    chosen, answer, found = recipe.profile, recipe.calibration.answer_tokens, list[Work]()
    profiled = sum(samples + texts for samples, texts, _ in counts.values())
    centred = min(SAMPLES, profiled) / max(profiled, 1) if chosen.formats and chosen.centres else 0.0
    for length, (samples, texts, validation) in counts.items():
        if answered := samples + validation:
            found += answers(length, answered, answer, ANSWERS)
        for count, targets in ((samples, answer), (texts, TARGETS)):
            found += _sample_work(Kind.SAMPLE, length, count, targets, backward_passes(chosen))
        if read := centred * (samples + texts):
            found.append(Work(Kind.FORWARD, length, read, 0, PASSES))
    if chosen.gates:
        length, trained = min(recipe.calibration.lengths), chosen.gate_samples
        groups = len(in_memory(range(layers), hidden + 1))
        found += answers(length, trained, answer, ANSWERS)
        found += _sample_work(Kind.GATE_SAMPLE, length, trained, answer, chosen.draws)
        found.append(Work(Kind.FORWARD, length, groups * (trained + min(JUDGED, trained)), 0, GATES))
    return found


def _sample_work(kind: Kind, length: int, count: int, targets: int, backward: int) -> list[Work]:
    """Returns the passes of some samples; of long ones every backward pass runs the layers again."""
    found = [Work(kind, length, count, targets, PASSES)]
    if length > passes.KEEP_TOKENS:
        found.append(Work(Kind.RERUN, length, count * backward, 0, PASSES))
    return found if count else []


def estimate_profile(
    model: str | SourceModel,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    shard: str | None = None,
    trust_remote_code: bool = False,
    estimator: Estimator | None = None,
) -> Estimate:
    """Estimates what `profile` would take with the same arguments. Nothing is written; data is read for a shard alone.

    With `shard` it is that of a part of the samples: "3/8" is the third of eight. `estimator` is `profile_estimator` of the
    model, where it is to be used again.

    Raises:
        ModelError: the model cannot be loaded or profiled.
        DataError: lengths that the model or the rules do not allow, or fewer samples than lengths.
        UsageError: no shard, or one without samples.
    """
    source = load_for(recipe, model, trust_remote_code=trust_remote_code)
    check_lengths(source.context, recipe)
    asked = recipe.calibration
    check_counts(asked.lengths, asked.samples, source.context, "calibration")
    check_counts(asked.lengths, asked.validation_samples, source.context, "validation")
    progress = progress or SILENT
    counts = sample_counts(recipe, source.context) if shard is None else _shard_counts(source, recipe, shard)
    progress.start("timing short passes", 1 + len(counts))
    held = profile_bytes(source, recipe, counts)
    progress.step("memory")
    estimator = estimator or profile_estimator(source, recipe)
    hidden = source.model.config.get_text_config(decoder=True).hidden_size
    work = profile_work(recipe, counts, source.shape.layers, hidden)
    lengths: list[dict[str, Any]] = []
    for length, numbers in counts.items():
        mine = [part for part in work if part.tokens == length]
        of_stage = {
            stage: estimator.seconds(part for part in mine if part.stage == stage) for stage in (ANSWERS, PASSES, GATES)
        }
        read = sum(part.count for part in mine if part.kind in (Kind.SAMPLE, Kind.GATE_SAMPLE))
        lengths.append(
            {
                "length": length,
                **numbers._asdict(),
                "tokens": length * round(read + numbers.validation_samples),
                "answer_seconds": of_stage[ANSWERS],
                "profile_seconds": of_stage[PASSES] + of_stage[GATES],
                "peak_bytes": held[length],
                "forward_seconds": estimator.one(Kind.FORWARD, length),
                "decode_seconds": estimator.one(Kind.STEP, length),
                "fitting_seconds": of_stage[GATES],
                "seconds": sum(of_stage.values()),
            }
        )
        progress.step(f"{length} tokens")
    progress.done()
    weights, slowdown = resident_bytes(source.model), estimator.watch.slowdown
    seconds, peak = sum(part["seconds"] for part in lengths), max(part["peak_bytes"] for part in lengths)
    totals = {name: sum(part[name] for part in lengths) for name in (*SampleCounts._fields, "tokens")}
    return Estimate(
        seconds=seconds,
        text=(
            "An estimate from short samples; nothing was profiled or written.",
            *(
                f"{part['length']:,} tokens: {_counted(part)}, "
                f"{readable_seconds(part['seconds'])}, {readable_bytes(part['peak_bytes'])}"
                for part in lengths
            ),
            f"In all: {_counted(totals)}, {totals['tokens']:,} tokens, about {readable_seconds(seconds)}.",
            f"Memory: about {readable_bytes(peak)} at most, {readable_bytes(weights)} of it weights, beside Python's own.",
        ),
        facts={**totals, "peak_bytes": peak, "weight_bytes": weights, "lengths": lengths},
        slowdown=slowdown,
    )


def _counted(counts: Mapping[str, Any]) -> str:
    text = f" + {counts['text_samples']} plain-text" if counts["text_samples"] else ""
    return f"{counts['samples']}{text} calibration and {counts['validation_samples']} validation samples"


def profile_estimator(source: SourceModel, recipe: Recipe) -> Estimator:
    """Returns the estimator of a model that is profiled."""
    runs: dict[Kind, Pass] = {
        Kind.SAMPLE: partial(_run_sample, source, recipe),
        Kind.GATE_SAMPLE: lambda tokens, targets: token_influence(
            source.model, source.shape, _sample(tokens, targets), recipe.profile.draws, recipe.seed, 0
        ),
    }
    windows, device = source.shape.native_windows, input_device(source.model)
    return Estimator(source.model, device, runs, windows=windows, longest=passes.KEEP_TOKENS)


def _run_sample(source: SourceModel, recipe: Recipe, tokens: int, targets: int) -> None:
    """Profiles one sample."""
    rules, shape = rules_on_offer(recipe), source.shape
    table = RuleTable.of(rules, recipe.profile.min_window)
    gates: GateWeights | None = None
    if table.selects:
        size = shape.layers, shape.kv_heads, source.model.config.get_text_config(decoder=True).hidden_size
        gates = GateWeights(
            np.random.default_rng(0).normal(size=size).astype(np.float32), np.zeros(size[:2], np.float32)
        )
    sample = _sample(tokens, targets)
    sample_statistics(source.model, shape, table, sample, recipe.profile, recipe.seed, 0, gates)


def _sample(tokens: int, targets: int) -> Sample:
    mask = np.arange(tokens) >= tokens - min(targets, tokens - 1)
    return Sample(example_ids(tokens).numpy(), mask, "an estimate", tokens)


def profile_bytes(source: SourceModel, recipe: Recipe, counts: Mapping[int, SampleCounts]) -> dict[int, int]:
    """Returns the most bytes of tensors that are alive at a time, weights included, by length of the samples."""
    model, found = source.model, dict[int, int]()
    lines: dict[bool, Mapping[int, int]] = {}
    reading = {tokens: _prompt_bytes(source, tokens) for tokens in PROMPT_TOKENS}
    output = _output_bytes(source, max(recipe.calibration.answer_tokens, TARGETS))
    for length, (samples, texts, validation) in counts.items():
        batch = min(samples + validation, max(1, BATCH_TOKENS // length))
        found[length] = batch * extrapolated_bytes(reading, length)
        if samples or texts:
            twice = length > passes.KEEP_TOKENS
            if twice not in lines:
                lines[twice] = {tokens: _sample_bytes(source, recipe, tokens, twice) for tokens in SAMPLE_TOKENS}
            found[length] = max(found[length], output + extrapolated_bytes(lines[twice], length))
    return {length: resident_bytes(model) + size for length, size in found.items()}


def _prompt_bytes(source: SourceModel, tokens: int) -> int:
    """Returns the most bytes that are alive while a prompt is read, its cache included."""
    ids = example_ids(tokens)[None].to(input_device(source.model))
    with torch.no_grad(), LiveBytes() as live:
        source.model.base_model(input_ids=ids, use_cache=True)
    return int(live.peak)


def _sample_bytes(source: SourceModel, recipe: Recipe, tokens: int, twice: bool) -> int:
    """Returns the most bytes that are alive while a sample with one target is profiled; `twice` as of long samples."""
    with LiveBytes() as live, checkpointed(source.model) if twice else nullcontext():
        _run_sample(source, recipe, tokens, 1)
    return int(live.peak)


def _output_bytes(source: SourceModel, targets: int) -> int:
    """Returns the bytes that the output layer takes to start a backward pass from so many targets."""
    model, text = source.model, source.model.config.get_text_config(decoder=True)
    rows = chunks(targets, int(text.vocab_size))[0].stop
    with torch.enable_grad(), LiveBytes() as live:
        device = input_device(model)
        hidden = torch.zeros(rows, text.hidden_size, dtype=model.dtype, device=device, requires_grad=True)
        logits = output_logits(model, hidden)
        cotangent = FisherCotangent(rows, torch.Generator().manual_seed(0))
        torch.autograd.grad(logits, hidden, cotangent(logits.detach(), slice(0, rows)))
    return int(live.peak)

"""What a profile will take, before anything heavy starts: samples, tokens, time and peak memory of every length.

Two short passes of the real model and one tile of attention are timed, then scaled: what the model does beside
attention grows with the tokens, a tile with its keys, and a sample of N tokens has N / TILE tiles whose mean sees half
the keys. Memory is counted, not modelled: every tensor of the short passes while it is alive, at two lengths, and the
line through both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moacompress.calibration.data.answers import BATCH_TOKENS
from moacompress.calibration.data.plain import TARGETS
from moacompress.calibration.data.sample_sources import check_counts, longer_counts, make_drafts, spread
from moacompress.calibration.gates.training import JUDGED
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.centres import SAMPLES
from moacompress.calibration.profile.influence import TILE
from moacompress.calibration.profile.probe import SHORT, Gathered, Probe
from moacompress.calibration.profile.profiler import check_around, check_lengths, data_recipe, rules_on_offer
from moacompress.calibration.profile.shard import Shard, parse_shard
from moacompress.core.progress import SILENT, Progress
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.devices import makespan, on_devices
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.live_bytes import Line
from moacompress.estimate.rates import Rates
from moacompress.models.source import SourceModel
from moacompress.prompts.pools import SPLITS
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from moacompress.runtime.ready_model import load_for


@dataclass(frozen=True)
class LengthEstimate:
    """What the samples of one length will take.

    Attributes:
        length: nominal length, tokens.
        samples: calibration samples, without those of plain text.
        text_samples: calibration samples of plain text.
        validation_samples: held-out samples, which are answered but not profiled.
        tokens: of all these samples, as if each had `length`.
        answer_seconds: for the dense model's answers, one sample after the other.
        profile_seconds: for the passes.
        peak_bytes: the most bytes of tensors that are alive at a time, weights included; Python and what the allocator
            holds back come on top.
        forward_seconds: of one forward pass at this length.
        decode_seconds: of one more token behind it.
        fitting_seconds: what of `profile_seconds` the forward passes take that gates are fitted and judged in.
    """

    length: int
    samples: int
    text_samples: int
    validation_samples: int
    tokens: int
    answer_seconds: float
    profile_seconds: float
    peak_bytes: int
    forward_seconds: float
    decode_seconds: float
    fitting_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """All of its time."""
        return self.answer_seconds + self.profile_seconds

    @property
    def answers(self) -> list[float]:
        """Seconds of every answer, those for gates among them."""
        count = self.samples + self.validation_samples
        return [self.answer_seconds / count] * count if count else []

    @property
    def passes(self) -> list[float]:
        """Seconds of every sample's passes; those that find the influence for gates are in them."""
        count = self.samples + self.text_samples
        return [(self.profile_seconds - self.fitting_seconds) / count] * count if count else []


@dataclass(frozen=True, kw_only=True)
class ProfileEstimate(Estimate):
    """What a profile will take.

    Attributes:
        lengths: of every length, ascending.
        weight_bytes: the model's weights, part of every `peak_bytes`.
        peak_bytes: the most memory that any length takes.
        rates: of the model that is profiled, what was timed already included; None where nothing was timed.
    """

    lengths: tuple[LengthEstimate, ...]
    weight_bytes: int
    peak_bytes: int
    rates: Rates | None = field(default=None, compare=False)

    @staticmethod
    def of(
        lengths: tuple[LengthEstimate, ...],
        weight_bytes: int,
        slowdown: float = 1.0,
        rates: Rates | None = None,
        devices: int = 1,
        gate_groups: int = 1,
    ) -> ProfileEstimate:
        """Returns the estimate of a whole profile.

        Args:
            lengths: of every length, ascending.
            weight_bytes: the model's weights, part of every `peak_bytes`.
            slowdown: see `Estimate`.
            rates: see above.
            devices: how many there are, as `torchrun` or shards use them.
            gate_groups: passes over the samples in which one device fits the gates of all layers.
        """
        seconds, peak = sum(part.seconds for part in lengths), max(part.peak_bytes for part in lengths)
        names = ("samples", "text_samples", "validation_samples", "tokens")
        counts = {name: sum(getattr(part, name) for part in lengths) for name in names}
        fitting = sum(part.fitting_seconds for part in lengths)
        together = (
            makespan((each for part in lengths for each in part.answers), devices)
            + makespan((each for part in lengths for each in part.passes), devices)
            + fitting * math.ceil(gate_groups / devices) / gate_groups
        )
        said, found = on_devices(seconds, together, devices, peak) if devices > 1 else ("", {})
        return ProfileEstimate(
            seconds=seconds,
            text=(
                "An estimate from a short pass and one tile of attention; nothing was profiled or written.",
                *(
                    f"{part.length:,} tokens: {_counted(asdict(part))}, "
                    f"{readable_seconds(part.seconds)}, {readable_bytes(part.peak_bytes)}"
                    for part in lengths
                ),
                f"In all: {_counted(counts)}, {counts['tokens']:,} tokens, about {readable_seconds(seconds)}.",
                f"Memory: about {readable_bytes(peak)} at most, {readable_bytes(weight_bytes)} of it weights, "
                "beside Python's own.",
                *([said] if said else []),
            ),
            facts={
                **counts,
                **found,
                "peak_bytes": peak,
                "weight_bytes": weight_bytes,
                "lengths": [{**asdict(part), "seconds": part.seconds} for part in lengths],
            },
            slowdown=slowdown,
            lengths=lengths,
            weight_bytes=weight_bytes,
            peak_bytes=peak,
            rates=rates,
        )


def _counted(counts: Mapping[str, Any]) -> str:
    text = f" + {counts['text_samples']} plain-text" if counts["text_samples"] else ""
    return f"{counts['samples']}{text} calibration and {counts['validation_samples']} validation samples"


def dry_run(
    model: str | SourceModel,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    around: Plan | None = None,
    devices: int = 1,
    shard: str | None = None,
    trust_remote_code: bool = False,
) -> ProfileEstimate:
    """Estimates what `profile` would take with the same arguments. Nothing is written; data is read for a shard alone.

    Args:
        model: MODEL, or a loaded model.
        recipe: the run.
        progress: receives the progress.
        around: the plan to profile around, or None.
        devices: also say what it takes on so many, each as fast as this one.
        shard: only this part of the samples: "3/8" is the third of eight.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.

    Raises:
        ModelError: the model cannot be loaded or profiled.
        DataError: lengths that the model or the rules do not allow, or fewer samples than lengths.
        PlanError: as `profile`.
        UsageError: no shard, or one without samples.
    """
    source = load_for(recipe, model, trust_remote_code=trust_remote_code)
    check_lengths(source.context, recipe)
    asked = recipe.calibration
    check_counts(asked.lengths, asked.samples, source.context, "calibration")
    check_counts(asked.lengths, asked.validation_samples, source.context, "validation")
    if around is not None:
        check_around(source, around)
    progress = progress or SILENT
    lengths = asked.lengths
    progress.start("timing short passes", 1 + len(lengths))
    probe = Probe(source, recipe, around)
    gates = recipe.profile.gate_samples if recipe.profile.gates and around is None else 0
    arithmetic = _Arithmetic(probe, recipe.calibration.answer_tokens)
    progress.step(f"{SHORT[-1]} tokens")
    counted = _samples_by_length(source, recipe) if shard is None else _samples_of_shard(source, recipe, around, shard)
    parts = []
    for length, numbers in sorted(counted.items()):
        parts.append(arithmetic.estimate(length, *numbers))
        progress.step(f"{length} tokens")
    if recipe.profile.formats and recipe.profile.centres:  # every shard reads for them
        total = sum(part.samples + part.text_samples for part in parts)
        parts = [arithmetic.with_centres(part, total) for part in parts]
    if gates:  # every shard trains them
        parts[0] = arithmetic.with_gates(parts[0], gates)
    progress.done()
    fits = probe.gate_groups if gates else 1
    return ProfileEstimate.of(tuple(parts), probe.weight_bytes, probe.watch.slowdown, probe, devices, fits)


def _samples_by_length(source: SourceModel, recipe: Recipe) -> dict[int, list[int]]:
    """Returns the numbers of answered calibration, plain-text and validation samples of each length."""
    asked = recipe.calibration
    counts = asked.samples, asked.text_samples, asked.validation_samples
    shares = ([row[0] for row in spread(count, len(asked.lengths), [1.0])] for count in counts)
    found = {length: list(numbers) for length, *numbers in zip(asked.lengths, *shares, strict=True)}
    if longer := sum(longer_counts(recipe, source.context)):
        found[2 * asked.lengths[-1]] = [0, 0, longer]
    return found


def _samples_of_shard(source: SourceModel, recipe: Recipe, around: Plan | None, shard: str) -> dict[int, list[int]]:
    """Returns the same of one shard, from the very samples that it would have."""
    chosen = data_recipe(recipe, rules_on_offer(recipe, around))
    drafts = [make_drafts(source, chosen, split) for split in SPLITS[:2]]
    part = Shard.of(*parse_shard(shard), *drafts)
    found = {length: [0, 0, 0] for length in recipe.calibration.lengths}
    for split, numbers in enumerate((part.calibration, part.validation)):
        for draft in (drafts[split][number] for number in numbers):
            if draft.kind != "text" or not split:  # plain text of validation is not answered
                column = 2 if split else int(draft.kind == "text")
                found.setdefault(draft.length, [0, 0, 0])[column] += 1
    return found


class _Arithmetic:
    """Makes what a probe finds into an estimate.

    Args:
        probe: of the model.
        answer_tokens: longest answer.
    """

    def __init__(self, probe: Probe, answer_tokens: int) -> None:
        self._probe, self._answer = probe, answer_tokens
        self._output = {targets: probe.output_seconds(targets) for targets in {answer_tokens, TARGETS}}
        self._output_bytes = max(map(probe.output_bytes, self._output))
        self._lines: dict[bool, tuple[Line, Line]] = {}

    def estimate(self, length: int, samples: int, texts: int, validation: int) -> LengthEstimate:
        """Returns the estimate of one length from its numbers of samples; only calibration and plain text are profiled."""
        answered, seconds, peak = samples + validation, 0.0, self._answer_bytes(length, samples + validation)
        if samples or texts:
            seconds += samples * self._sample_seconds(length, self._answer)
            seconds += texts * self._sample_seconds(length, TARGETS)
            peak = max(peak, self._peak(length))
        return LengthEstimate(
            length=length,
            samples=samples,
            text_samples=texts,
            validation_samples=validation,
            tokens=(answered + texts) * length,
            answer_seconds=self._answer_seconds(length, answered),
            profile_seconds=seconds,
            peak_bytes=self._probe.weight_bytes + peak,
            forward_seconds=self._probe.forward(length),
            decode_seconds=self._probe.step(length),
        )

    def with_centres(self, estimate: LengthEstimate, total: int) -> LengthEstimate:
        """Returns the estimate of a length with its part of the forward passes for mean keys, of `total` profiled samples."""
        read = min(SAMPLES, total) * (estimate.samples + estimate.text_samples) / max(total, 1)
        return replace(estimate, profile_seconds=estimate.profile_seconds + read * estimate.forward_seconds)

    def with_gates(self, estimate: LengthEstimate, samples: int) -> LengthEstimate:
        """Returns the estimate of a length with so many samples more that gates are trained on."""
        length = estimate.length
        seconds = samples * self._passes_seconds(self._probe.of_gates, length, self._answer)
        fitting = self._again(samples) * self._probe.forward(length)
        return replace(
            estimate,
            tokens=estimate.tokens + samples * length,
            answer_seconds=estimate.answer_seconds + self._answer_seconds(length, samples),
            profile_seconds=estimate.profile_seconds + seconds + fitting,
            fitting_seconds=estimate.fitting_seconds + fitting,
        )

    def _again(self, samples: int) -> int:
        """Returns how often samples that gates are fitted to or judged on go forward once more."""
        return self._probe.gate_groups * (samples + min(JUDGED, samples))

    def _answer_bytes(self, length: int, count: int) -> int:
        """Returns the bytes beside the weights that answering so many prompts takes."""
        return self._probe.answer_bytes(length, min(count, max(1, BATCH_TOKENS // length)))

    def _answer_seconds(self, length: int, count: int) -> float:
        return count * (self._probe.forward(length) + self._answer * self._probe.step(length))

    def _sample_seconds(self, length: int, targets: int) -> float:
        """Returns the seconds of one sample's passes."""
        choosing = sum(layer.choosing for layer in self._probe.attention(length))
        around = self._probe.forward(length) if self._probe.around else 0.0
        return self._passes_seconds(self._probe.passes, length, targets) + choosing + around

    def _passes_seconds(self, wanted: Counter[Gathered], length: int, targets: int) -> float:
        """Returns the seconds of a forward pass and of backward passes of some kinds."""
        forward, attention = self._probe.forward(length), self._probe.attention(length)
        again = forward if length > passes.KEEP_TOKENS else 0.0
        backward = (
            again + self._probe.beside[1] * length + self._output[targets] + sum(layer.idle for layer in attention)
        )
        total = wanted.total() * backward + forward
        for gathered, count in wanted.items():
            *full, last = (layer.tiles[gathered] for layer in attention)
            # in the last layer only the rows of the targets have a gradient
            total += count * (math.ceil(length / TILE) * sum(full) + math.ceil(targets / TILE) * last)
        return total

    def _peak(self, length: int) -> int:
        """Returns the most bytes beside the weights that the passes of a sample take."""
        twice = length > passes.KEEP_TOKENS
        if twice not in self._lines:
            self._lines[twice] = self._probe.sample_lines(twice)
        chosen = self._probe.choice_bytes(length)
        kept, busy = (line.at(length) + chosen for line in self._lines[twice])
        return max(kept + self._output_bytes, busy)

"""The profile on disk: a folder that a run fills sample by sample, and the `Profile` that search reads from it.

    profile.json              what was asked for, the rules, the resolved recipe; "complete": true once all is there
    calibration.safetensors   the samples that are profiled
    validation.safetensors    the samples that plans will be measured on
    samples/00000.safetensors statistics of one finished sample
    influence.safetensors     the statistics of all samples
    gates.safetensors         a gate of every KV head, where rules on offer select
    calibration.shingles      which runs of words all these samples have, and those that gates are trained on

Every file is written aside and moved into place. A sample's file carries the fingerprint of the profile it belongs to
and a digest of its numbers: a resumed run takes exactly the files that it would have written and redoes the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moacompress.calibration.data.samples import Sample, SampleKind, fingerprint_samples, load_samples
from moacompress.calibration.profile.manifest import Manifest, damaged
from moacompress.calibration.profile.statistics import (
    ESTIMATORS,
    OF_RULES,
    ROBUST,
    SIDES,
    Statistics,
    available,
    estimate,
)
from moacompress.core.artefact_names import (
    CALIBRATION_FILE,
    GATES_FILE,
    INFLUENCE_FILE,
    SHINGLES_FILE,
    VALIDATION_FILE,
    sample_file,
)
from moacompress.core.errors import ArtefactError, ModelError, UsageError
from moacompress.core.files import write_bytes
from moacompress.core.shingles import Shingles
from moacompress.core.shown import Shown
from moacompress.recipe import Recipe
from moacompress.rules.candidates import in_formats
from moacompress.rules.key_centres import Centres
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares

TEXT_WEIGHT = 0.5
"""Weight of plain text beside answers; see `kind_weights`."""

if TYPE_CHECKING:
    from moacompress.calibration.gates.training import Gates
    from moacompress.models.source import SourceModel
    from moacompress.rules.gate_weights import GateWeights

KINDS: tuple[SampleKind, ...] = get_args(SampleKind)


@dataclass(frozen=True, eq=False)
class Profile(Shown):
    """How much every rule on every KV head is predicted to cost.

    Attributes:
        path: the folder.
        source: MODEL, as it can be loaded again.
        shape: the model's shape, weights fingerprint included.
        lengths: profiled lengths in tokens, ascending.
        rules: the candidate rules; `rules[0]` is `Rule.FULL`. Of a profile that offers formats, every span in every pair of
            formats, the native pair first.
        min_window: smallest window of any rule, tokens.
        recipe: the resolved recipe.
        fingerprint: of everything that decides the numbers.
        calibration_fingerprint: of the calibration samples' token ids.
        validation: the samples that plans are measured on.
        seconds: time that the samples took.
        sample_lengths: nominal length of every profiled sample, int64 `[samples]`.
        sample_kinds: kind of every profiled sample, "answer" or "text".
        statistics: of every profiled sample.
        formats: of keys and values that `rules` has beside the native one; see `offering`.
        gates_fingerprint: of the gates that rules which select choose by; empty where no rule does.
        centres: mean keys that the keys of plans in codes lie less; empty where no formats were profiled.
        skipped: indices of the calibration samples that were left out because a number was not finite.
    """

    path: Path
    source: str
    shape: ModelShape
    lengths: tuple[int, ...]
    rules: tuple[Rule, ...]
    min_window: int
    recipe: Recipe
    fingerprint: str
    calibration_fingerprint: str
    validation: list[Sample]
    seconds: float
    sample_lengths: npt.NDArray[np.int64]
    sample_kinds: tuple[str, ...]
    statistics: Statistics
    formats: tuple[str, ...] = ()
    gates_fingerprint: str = ""
    centres: Centres = ()
    skipped: tuple[int, ...] = ()

    @property
    def estimators(self) -> tuple[str, ...]:
        """Those of `ESTIMATORS` that the profile holds the statistics of, for all its rules."""
        found = available(self.statistics)
        return tuple(name for name in found if name == ROBUST) if self.formats else found

    @property
    def profiled_formats(self) -> tuple[str, ...]:
        """Formats beside the native one that the profile holds the statistics of."""
        return self.recipe.profile.formats if f"{SIDES[0]}_squares" in self.statistics.arrays else ()

    @property
    def spans(self) -> tuple[Rule, ...]:
        """The rules in the native formats alone: the first of `rules`."""
        return self.rules[: len(self.rules) // (1 + len(self.formats)) ** 2]

    def offering(self, formats: Sequence[str]) -> Profile:
        """Returns the same profile with these formats on offer beside the native one, none by default.

        Raises:
            UsageError: a format that was not profiled.
        """
        missing = [name for name in formats if name not in self.profiled_formats]
        if missing:
            raise UsageError(
                f"the profile in {self.path} says nothing of the format {missing[0]}; run the same profile command again to "
                "add it, or search with --formats native"
            )
        return replace(self, rules=in_formats(self.spans, formats), formats=tuple(formats))

    @property
    def parts(self) -> npt.NDArray[np.int64] | None:
        """What every rule is made of, as places on the last axis of `of_parts`, `[rules, 3]`: span, keys and values.

        None where no formats are on offer: then every rule is a part of its own.
        """
        if not self.formats:
            return None
        spans, offered = len(self.spans), 1 + len(self.formats)
        keys, values, span = np.unravel_index(np.arange(len(self.rules)), (offered, offered, spans))
        return np.stack([span, spans + keys, spans + offered + values], axis=1)

    def of_parts(self, name: str) -> npt.NDArray[np.float64]:
        """Returns a statistic of all parts of the rules, `[samples, ..., layers, kv_heads, parts]`.

        Args:
            name: "squares" or "total".
        """
        arrays = [self.statistics.arrays[name]]
        if self.formats:
            arrays += [self.statistics.arrays[f"{side}_{name}"][..., self._columns] for side in SIDES]
        return np.concatenate(arrays, axis=-1).astype(np.float64)

    @property
    def _columns(self) -> list[int]:
        """Where the native format and those on offer are on the last axis of the statistics of formats."""
        return [0, *(1 + self.recipe.profile.formats.index(name) for name in self.formats)]

    def influence(self, estimator: str, kind: str = "answer") -> npt.NDArray[np.float64]:
        """Returns the predicted KL of one rule on one KV head, in nats per answer token.

        What keys and values lose by their formats is predicted for the full span, and added to what the span costs.

        Args:
            estimator: one of `estimators`.
            kind: of the samples: "answer", or "text" for those of plain text.

        Returns:
            float64 `[lengths, layers, kv_heads, rules]`; 0 for `rules[0]`.

        Raises:
            UsageError: an estimator or a kind of samples that the profile does not hold.
        """
        if estimator not in ESTIMATORS:
            raise UsageError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
        if self.formats and estimator != ROBUST:
            raise UsageError(
                f"the estimator {estimator!r} says nothing of formats; choose {ROBUST}, or search with --formats native"
            )
        if estimator not in self.estimators:
            raise UsageError(f"the profile has no statistics for the estimator {estimator!r}; profile with --baselines")
        if kind not in self.sample_kinds:
            held = ", ".join(sorted(set(self.sample_kinds)))
            raise UsageError(f"the profile has no samples of kind {kind!r} but {held}; profile with such samples")
        found = np.stack([self._at(length, estimator, kind) for length in self.lengths])
        if not self.formats:
            return found
        keys, values = (
            np.stack([self._at(length, estimator, kind, side) for length in self.lengths])[..., self._columns]
            for side in SIDES
        )
        pairs = keys[..., :, None, None] + values[..., None, :, None]
        return (found[..., None, None, :] + pairs).reshape(*found.shape[:-1], -1)

    @cached_property
    def gates(self) -> Gates | None:
        """The gates that rules which select choose by; None where no rule does.

        Raises:
            ArtefactError: they are not those that were profiled.
        """
        from moacompress.calibration.gates.training import Gates

        if not any(rule.selects for rule in self.rules):
            return None
        found = Gates.load(self.path, self.fingerprint)
        if found is None or found.weights.fingerprint != self.gates_fingerprint:
            raise damaged(
                self.path / GATES_FILE, "it is missing, damaged, or has other gates than those that were profiled"
            )
        return found

    @cached_property
    def shingles(self) -> Shingles | None:
        """The shingles of all samples, those that gates were trained on included; None where the profile has none.

        Raises:
            ArtefactError: their file is damaged.
        """
        path = self.path / SHINGLES_FILE
        return Shingles.load(path) if path.is_file() else None

    @property
    def gate_weights(self) -> GateWeights | None:
        """The weights of `gates`; None where no rule selects."""
        return None if self.gates is None else self.gates.weights

    def plan(self, rules: Sequence[Sequence[Rule]], shares: LayerShares = ()) -> Plan:
        """Returns the plan of one rule for every KV head of its model, `rules[layer][kv_head]`, with its gates."""
        return Plan(
            self.shape,
            self.min_window,
            tuple(map(tuple, rules)),
            shares=shares,
            centres=self.centres,
            gates=self.gates_fingerprint,
            gate_weights=self.gate_weights,
        )

    def without_gates(self) -> Profile:
        """Returns the same profile without the rules that select; to be called before formats are on offer."""
        keep = [number for number, rule in enumerate(self.rules) if not rule.selects]
        if len(keep) == len(self.rules):
            return self
        arrays = {
            name: array[..., keep] if name in OF_RULES else array for name, array in self.statistics.arrays.items()
        }
        rules = tuple(self.rules[number] for number in keep)
        return replace(self, rules=rules, statistics=Statistics(arrays), gates_fingerprint="")

    def calibration_samples(self) -> list[Sample]:
        """Reads the samples that were profiled, without those that were left out: their numbers are not finite again.

        Raises:
            ArtefactError: they are not there, or not those that were profiled.
        """
        samples = _samples(self.path / CALIBRATION_FILE, self.calibration_fingerprint)
        return [sample for index, sample in enumerate(samples) if index not in self.skipped]

    def check_model(self, source: SourceModel, doing: str) -> None:
        """Refuses a model that is not the one that was profiled; `doing` is the command that it is wanted for.

        Raises:
            ModelError: other weights.
        """
        ours, theirs = self.shape.weights_fingerprint, source.shape.weights_fingerprint
        if ours != theirs:
            raise ModelError(
                f"the profile in {self.path} is of other weights (fingerprint {ours}) than {source.source} ({theirs}); "
                f"profile this model, or {doing} with the model that was profiled"
            )

    def blended(self, estimator: str) -> npt.NDArray[np.float64]:
        """Returns the influence on the kinds of samples, by `kind_weights`.

        Arguments, shape and errors are those of `influence`.
        """
        kinds = self.kind_weights
        found: npt.NDArray[np.float64] = np.average(
            [self.influence(estimator, kind) for kind in kinds], axis=0, weights=list(kinds.values())
        )
        return found

    @property
    def kind_weights(self) -> dict[str, float]:
        """What each kind of samples weighs, together 1: plain text `TEXT_WEIGHT` times as much as answers."""
        kinds = {kind: TEXT_WEIGHT if kind == "text" else 1.0 for kind in sorted(set(self.sample_kinds))}
        return {kind: weight / sum(kinds.values()) for kind, weight in kinds.items()}

    def samples_of(self, length: int, kind: str) -> npt.NDArray[np.int64]:
        """Returns the indices of the samples of a kind at a length; all of the kind where none has this length."""
        of_kind = np.array([found == kind for found in self.sample_kinds])
        here = np.flatnonzero(of_kind & (self.sample_lengths == length))
        # a few samples of plain text need not be of every length
        return here if len(here) else np.flatnonzero(of_kind)

    def _at(self, length: int, estimator: str, kind: str, side: str = "") -> npt.NDArray[np.float64]:
        chosen = self.samples_of(length, kind)
        return estimate(self.statistics, estimator, chosen, side)

    def subset(self, samples: Sequence[int]) -> Profile:
        """Returns the same profile with only some of its samples, by index; every length must stay."""
        index = np.asarray(samples, np.int64)
        return replace(
            self,
            sample_lengths=self.sample_lengths[index],
            sample_kinds=tuple(self.sample_kinds[number] for number in index.tolist()),
            statistics=self.statistics.take(index),
        )

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Reads a finished profile.

        Raises:
            ArtefactError: missing, half-written, corrupted, or of a version that this one does not read; the message names the
                file and says what to do.
        """
        path = Path(path)
        head = Manifest.read(path)
        if head.shard is not None:
            raise ArtefactError(
                f"{path} is shard {head.shard.name} of a profile; put all shards together with `moacompress profile --merge`"
            )
        if not head.complete:
            raise ArtefactError(
                f"the profile in {path} is not finished; run the same profile command again to finish it"
            )
        validation = _samples(path / VALIDATION_FILE, head.validation_fingerprint)
        lengths, kinds, statistics = _read_merged(path / INFLUENCE_FILE, head)
        return Profile(
            path=path,
            source=head.source,
            shape=head.shape,
            lengths=head.lengths,
            rules=head.rules,
            min_window=head.recipe.profile.min_window,
            recipe=head.recipe,
            fingerprint=head.fingerprint,
            calibration_fingerprint=head.calibration_fingerprint,
            validation=validation,
            seconds=head.seconds,
            sample_lengths=lengths,
            sample_kinds=kinds,
            statistics=statistics,
            gates_fingerprint=head.gates,
            centres=head.centres,
            skipped=head.skipped,
        )


def merge(folder: Path, head: Manifest, samples: Sequence[Sample], statistics: Sequence[Statistics]) -> Manifest:
    """Writes `influence.safetensors` and then marks the profile as complete; returns the head that was written.

    `statistics` are those of every sample, those in `head.skipped` included.
    """
    used = [index for index in range(len(samples)) if index not in head.skipped]
    merged = Statistics.stack([statistics[index] for index in used])
    lengths = np.array([samples[index].length for index in used], np.int64)
    kinds = np.array([KINDS.index(samples[index].kind) for index in used], np.uint8)
    write_bytes(folder / INFLUENCE_FILE, save({**merged.arrays, "lengths": lengths, "kinds": kinds}))
    head = replace(head, digest=merged.digest(), complete=True)
    head.write(folder)
    return head


def write_sample(folder: Path, index: int, statistics: Statistics, owner: str, seconds: float) -> None:
    """Writes the statistics of one finished sample, atomically, and the seconds that it took.

    They may hold numbers that are not finite: then the sample is one to be skipped. `owner` is `Manifest.owner`.
    """
    notes = {"profile": owner, "index": str(index), "digest": statistics.digest(), "seconds": f"{seconds:.3f}"}
    write_bytes(sample_file(folder, index), save(dict(statistics.arrays), metadata=notes))


def read_sample(
    folder: Path, index: int, owner: str, shapes: dict[str, tuple[int, ...]]
) -> tuple[Statistics, float] | None:
    """Returns the statistics and the seconds of a finished sample; None if it has to be done (again)."""
    path = sample_file(folder, index)
    if not path.is_file():
        return None
    try:
        arrays, notes = _read(path)
        seconds = float(notes["seconds"])
    except (ArtefactError, KeyError, ValueError):
        return None
    statistics = Statistics(arrays)
    if statistics.shapes != shapes or (notes.get("profile"), notes.get("index")) != (owner, str(index)):
        return None
    return (statistics, seconds) if notes.get("digest") == statistics.digest() else None


def read_samples(path: Path, expected: str) -> list[Sample] | None:
    """Returns the samples in a file; None if they have to be made (again).

    `expected` is their fingerprint, or empty if it was not recorded yet.
    """
    try:
        return _samples(path, expected) if path.is_file() else None
    except ArtefactError:
        return None


def _samples(path: Path, expected: str) -> list[Sample]:
    try:
        samples = load_samples(path)
    except ArtefactError as error:
        why = str(error).removeprefix(f"cannot read samples {path}: ").removesuffix("; make them from scratch")
        raise damaged(path, why) from error
    if expected and fingerprint_samples(samples) != expected:
        raise damaged(path, f"its samples have fingerprint {fingerprint_samples(samples)}, not {expected}")
    return samples


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError) as error:  # numpy has not all types
        raise damaged(path, str(error)) from error


def _read_merged(path: Path, head: Manifest) -> tuple[npt.NDArray[np.int64], tuple[str, ...], Statistics]:
    arrays, _ = _read(path)
    wanted = head.array_shapes
    if set(arrays) != {*wanted, "lengths", "kinds"}:
        raise damaged(path, f"it holds {', '.join(sorted(arrays)) or 'nothing'}")
    lengths, kinds = arrays.pop("lengths"), arrays.pop("kinds")
    if (lengths.dtype, lengths.ndim, kinds.dtype) != (np.int64, 1, np.uint8):
        raise damaged(path, "its lengths or kinds of samples are of another type")
    statistics = Statistics(arrays)
    for name, shape in statistics.shapes.items():
        if shape != (len(lengths), *wanted[name]):
            raise damaged(path, f"its array {name} has shape {shape}, not {(len(lengths), *wanted[name])}")
    if not statistics.finite or statistics.digest() != head.digest:
        raise damaged(path, "its numbers are not those that were written")
    if set(lengths.tolist()) != set(head.lengths):
        raise damaged(path, f"it has samples of {sorted(set(lengths.tolist()))} tokens, not {list(head.lengths)}")
    if kinds.shape != lengths.shape or (kinds >= len(KINDS)).any():
        raise damaged(path, "its kinds of samples are not known")
    return lengths, tuple(KINDS[kind] for kind in kinds.tolist()), statistics

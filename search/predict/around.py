"""What changes of rules would do around a plan: the model is profiled again under it, where every change has a sign.

At a tight budget nearly every KV head is cut, and what a rule would do to the dense model says little about what it does
to the model under the plan: heads that were spare there are needed here. Around the plan the gradient of the KL is not
zero, so the change of every rule has a sign.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moacompress.calibration.data.samples import Sample, fingerprint_ordered
from moacompress.calibration.profile.manifest import array_shapes
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile, read_sample, write_sample
from moacompress.core.errors import ArtefactError, ModelError
from moacompress.core.files import fingerprint
from moacompress.core.progress import Progress
from moacompress.models.processes import broadcast
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.plan import Plan
from moacompress.rules.rule_table import RuleTable
from moacompress.search.deadline import Deadline
from moacompress.search.measure.claims import ClaimLost, Claims
from moacompress.search.problem.quadratic import Quadratic

Forms: TypeAlias = Callable[[float], Quadratic]
"""The quadratic model of the change of KL around a plan, 0 for the plan itself, by `relative`."""


class Around(Protocol):
    """What a round needs: what changes would do around a plan."""

    def __call__(self, plan: Plan, progress: Progress) -> Forms:
        """Returns the models."""
        ...


@dataclass(frozen=True)
class ProfileAround:
    """Profiles some calibration samples around a plan; each is computed once where there is a folder to keep it.

    Attributes:
        profile: the profile of the dense model, with the formats that are on offer.
        recipe: the estimator, the weight of plain text and the seed count.
        source: the model.
        samples: what is profiled.
        folder: where finished samples are kept, or None for memory.
        deadline: when to stop; it is checked before every sample.
        claims: of the workers that share the samples, which are then kept with them and not in the folder.
    """

    profile: Profile
    recipe: Recipe
    source: SourceModel
    samples: Sequence[Sample]
    folder: Path | None
    deadline: Deadline = field(default_factory=Deadline)
    claims: Claims | None = None

    def __call__(self, plan: Plan, progress: Progress) -> Forms:
        """See `Around`.

        Raises:
            ModelError: a statistic is not finite.
            ArtefactError: the folder cannot be written.
            TimeUp: the time is up, and a sample is not profiled yet.
        """
        profile = self.profile
        formats = profile.profiled_formats if profile.formats else ()
        gates = profile.gate_weights
        chosen = self.recipe.profile.model_copy(
            update={"draws": 1, "baselines": False, "heads": False, "anchors": 0, "formats": formats}
        )
        table = RuleTable.of(profile.spans, profile.min_window)
        shapes = array_shapes(chosen, profile.shape, len(table), around=True)
        marks = [profile.fingerprint, plan.key(), self.recipe.seed, chosen.estimator, fingerprint_ordered(self.samples)]
        marks += [profile.gates_fingerprint] if gates is not None else []
        holder = fingerprint([*marks, *formats])
        of_plan = _OfPlan(plan, table, chosen, shapes, holder)
        progress.start("profiling around the plan", len(self.samples))
        found: dict[int, Statistics] = {}
        while len(found) < len(self.samples):
            before = len(found)
            for index in range(len(self.samples)):
                statistics = None if index in found else self._sample(index, of_plan)
                if statistics is not None:
                    found[index] = statistics
                    progress.step()
            if len(found) == before and self.claims is not None:
                self.deadline.check()
                missing = [index for index in range(len(self.samples)) if index not in found]
                self.claims.pause([of_plan.name(index) for index in missing], self.deadline.left)
        progress.done()
        found = broadcast(found)  # processes that computed it alike, but for the last bits
        lengths = np.array([sample.length for sample in self.samples], np.int64)
        around = replace(
            profile,
            lengths=tuple(sorted(set(lengths.tolist()))),
            sample_lengths=lengths,
            sample_kinds=tuple(sample.kind for sample in self.samples),
            statistics=Statistics.stack([found[index] for index in range(len(self.samples))]),
            around=plan.key(),
        )
        return lambda relative: Quadratic.of(around, relative)

    def _sample(self, index: int, of_plan: _OfPlan) -> Statistics | None:
        """Returns the statistics of a sample; None where another worker is at it."""
        if self.claims is None:
            folder = None if self.folder is None else self.folder / of_plan.plan.key()
            kept = None if folder is None else read_sample(folder, index, of_plan.holder, of_plan.shapes)
            if kept is not None:
                return kept[0]
            statistics = self._profiled(index, of_plan)
            if folder is not None:
                write_sample(folder, index, statistics, of_plan.holder, 0.0)
            return statistics
        name = of_plan.name(index)
        text = self.claims.result(name)
        if text is not None:
            return _from_text(text, of_plan.shapes, name)
        claim = self.claims.acquire(name)
        if claim is None:
            return None
        try:
            statistics = self._profiled(index, of_plan)
            self.claims.finish(claim, [0.0], result=_as_text(statistics))
        except ClaimLost:
            return None
        finally:
            self.claims.release(claim)
        return statistics

    def _profiled(self, index: int, of_plan: _OfPlan) -> Statistics:
        self.deadline.check()
        profile, source, sample = self.profile, self.source, self.samples[index]
        seed, gates = self.recipe.seed, profile.gate_weights
        statistics = sample_statistics(
            source.model,
            profile.shape,
            of_plan.table,
            sample,
            of_plan.chosen,
            of_plan.plan,
            seed,
            index,
            gates,
            profile.centres,
        )
        if not statistics.finite:
            raise ModelError(
                f"under the plan {statistics.not_finite()} is not finite on calibration sample {index}; try --dtype float32"
            )
        return statistics


@dataclass(frozen=True)
class _OfPlan:
    """What all samples that are profiled around a plan have in common.

    Attributes:
        plan: the plan.
        table: of the rules.
        chosen: what is recorded.
        shapes: of every array.
        holder: what files of samples are marked with.
    """

    plan: Plan
    table: RuleTable
    chosen: ProfileRecipe
    shapes: dict[str, tuple[int, ...]]
    holder: str

    def name(self, index: int) -> str:
        """Returns the name of a sample's claim."""
        return f"around:{self.holder}:{index}"


def _as_text(statistics: Statistics) -> str:
    """Returns the statistics of a sample as a study storage keeps them."""
    return base64.b64encode(save(dict(statistics.arrays))).decode("ascii")


def _from_text(text: object, shapes: dict[str, tuple[int, ...]], name: str) -> Statistics:
    """Reads what `_as_text` wrote.

    Raises:
        ArtefactError: it is something else.
    """
    try:
        statistics = Statistics(load(base64.b64decode(str(text), validate=True)))
    except (SafetensorError, ValueError) as error:
        raise ArtefactError(
            f"what the study storage holds as {name} is no sample: {error}; --overwrite starts again"
        ) from error
    if statistics.shapes != shapes or not statistics.finite:
        raise ArtefactError(f"what the study storage holds as {name} is of another shape; --overwrite starts again")
    return statistics


def spread_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Returns `count` of the samples, evenly spread over their order, which goes by length and source."""
    picks = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    return [samples[pick] for pick in picks.tolist()]

"""What changes of rules would do around a plan: the model is profiled again under it, where every change has a sign.

At a tight budget nearly every KV head is cut, and what a rule would do to the dense model says little about what it does
to the model under the plan: heads that were spare there are needed here. Around the plan the gradient of the KL is not
zero, so the change of every rule has a sign.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import numpy as np
from safetensors.numpy import load, save

from moacompress.calibration.data.samples import Sample, fingerprint_ordered
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ModelError
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
    """Profiles some calibration samples around a plan; workers share them, and each is computed once in a search.

    Attributes:
        profile: the profile of the dense model, with the formats that are on offer.
        recipe: the estimator, the weight of plain text and the seed count.
        source: the model.
        samples: what is profiled.
        claims: where finished samples are kept.
        deadline: when to stop; it is checked before every sample.
    """

    profile: Profile
    recipe: Recipe
    source: SourceModel
    samples: Sequence[Sample]
    claims: Claims
    deadline: Deadline = field(default_factory=Deadline)

    def __call__(self, plan: Plan, progress: Progress) -> Forms:
        """See `Around`.

        Raises:
            ModelError: a statistic is not finite.
            ArtefactError: the study storage cannot be used.
            TimeUp: the time is up, and a sample is not profiled yet.
        """
        profile = self.profile
        formats = profile.profiled_formats if profile.formats else ()
        gates = profile.gate_weights
        chosen = self.recipe.profile.model_copy(
            update={"draws": 1, "baselines": False, "heads": False, "anchors": 0, "formats": formats}
        )
        table = RuleTable.of(profile.spans, profile.min_window)
        marks = [profile.fingerprint, plan.key(), self.recipe.seed, chosen.estimator, fingerprint_ordered(self.samples)]
        marks += [profile.gates_fingerprint] if gates is not None else []
        of_plan = _OfPlan(plan, table, chosen, f"around:{fingerprint([*marks, *formats])}")
        progress.start("profiling around the plan", len(self.samples))

        def attempt(index: int) -> Statistics | None:
            statistics = self._sample(index, of_plan)
            if statistics is not None:
                progress.step()
            return statistics

        names = [of_plan.name(index) for index in range(len(self.samples))]
        found = self.claims.together(names, attempt, self.deadline)
        progress.done()
        found = broadcast(found)  # processes that computed it alike, but for the last bits
        lengths = np.array([sample.length for sample in self.samples], np.int64)
        around = replace(
            profile,
            lengths=tuple(sorted(set(lengths.tolist()))),
            sample_lengths=lengths,
            sample_kinds=tuple(sample.kind for sample in self.samples),
            statistics=Statistics.stack(found),
            around=plan.key(),
        )
        return lambda relative: Quadratic.of(around, relative)

    def _sample(self, index: int, of_plan: _OfPlan) -> Statistics | None:
        """Returns the statistics of a sample; None where another worker is at it."""
        name = of_plan.name(index)
        claim = self.claims.acquire(name)
        if claim is None:
            text = self.claims.result(name)
            return None if text is None else _from_text(text)
        try:
            statistics = self._profiled(index, of_plan)
            self.claims.finish(claim, _as_text(statistics))
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
        names: what the names of the samples' claims begin with.
    """

    plan: Plan
    table: RuleTable
    chosen: ProfileRecipe
    names: str

    def name(self, index: int) -> str:
        """Returns the name of a sample's claim."""
        return f"{self.names}:{index}"


def _as_text(statistics: Statistics) -> str:
    """Returns the statistics of a sample as a study storage keeps them."""
    return base64.b64encode(save(dict(statistics.arrays))).decode("ascii")


def _from_text(text: str) -> Statistics:
    """Reads what `_as_text` wrote."""
    return Statistics(load(base64.b64decode(text)))


def spread_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Returns `count` of the samples, evenly spread over their order, which goes by length and source."""
    picks = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    return [samples[pick] for pick in picks.tolist()]

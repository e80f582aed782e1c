"""What changes of rules would do around a plan: the model is profiled again under it, where every change has a sign.

At a tight budget nearly every KV head is cut, and what a rule would do to the dense model says little about what it does
to the model under the plan: heads that were spare there are needed here. Around the plan the gradient of the KL is not
zero, so the change of every rule has a sign.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

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
from moacompress.rules.plan import Plan
from moacompress.rules.rule_table import RuleTable
from moacompress.search.deadline import Deadline
from moacompress.search.measure.claims import Claims
from moacompress.search.problem.quadratic import Quadratic

Forms: TypeAlias = Callable[[float], Quadratic]
"""The quadratic model of the change of KL around a plan, 0 for the plan itself, by `relative`."""
Around: TypeAlias = Callable[[Plan, Progress], Forms]
"""Returns the forms around a plan: what a round needs."""


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
        """Returns the forms around a plan.

        Raises:
            ModelError: a statistic is not finite.
            ArtefactError: the study storage cannot be used.
            TimeUp: the time is up, and a sample is not profiled yet.
        """
        profile, seed = self.profile, self.recipe.seed
        formats = profile.profiled_formats if profile.formats else ()
        recorded = self.recipe.profile.model_copy(
            update={"draws": 1, "baselines": False, "heads": False, "anchors": 0, "formats": formats}
        )
        table = RuleTable.of(profile.spans, profile.min_window)
        marks = [profile.fingerprint, plan.key(), seed, recorded.estimator, fingerprint_ordered(self.samples)]
        marks += [profile.gates_fingerprint] if profile.gate_weights is not None else []
        name = f"around:{fingerprint([*marks, *formats])}"
        names = [f"{name}:{index}" for index in range(len(self.samples))]

        def profiled(index: int) -> str:
            self.deadline.check()
            statistics = sample_statistics(
                self.source.model,
                profile.shape,
                table,
                self.samples[index],
                recorded,
                plan,
                seed,
                index,
                profile.gate_weights,
                profile.centres,
            )
            if not statistics.finite:
                raise ModelError(
                    f"under the plan {statistics.not_finite()} is not finite on calibration sample {index}; try --dtype "
                    "float32"
                )
            return base64.b64encode(save(dict(statistics.arrays))).decode("ascii")

        def attempt(index: int) -> Statistics | None:
            kept = self.claims.once(names[index], lambda claim: profiled(index))
            if kept is None:
                return None
            progress.step()
            return Statistics(load(base64.b64decode(kept)))

        progress.start("profiling around the plan", len(self.samples))
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

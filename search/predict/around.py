"""What changes of rules would do around a plan: the model is profiled again under it, where every change has a sign.

At a tight budget nearly every KV head is cut, and what a rule would do to the dense model says little about what it does
to the model under the plan: heads that were spare there are needed here. Around the plan the gradient of the KL is not
zero, so the change of every rule has a sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from moacompress.calibration.data.samples import Sample, fingerprint_ordered
from moacompress.calibration.profile.manifest import array_shapes
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile, read_sample, write_sample
from moacompress.core.errors import ModelError
from moacompress.core.files import fingerprint
from moacompress.core.progress import Progress
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from moacompress.rules.rule_table import RuleTable
from moacompress.search.deadline import Deadline
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
    """

    profile: Profile
    recipe: Recipe
    source: SourceModel
    samples: Sequence[Sample]
    folder: Path | None
    deadline: Deadline = field(default_factory=Deadline)

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
        folder = None if self.folder is None else self.folder / plan.key()
        found = []
        progress.start("profiling around the plan", len(self.samples))
        for index, sample in enumerate(self.samples):
            kept = None if folder is None else read_sample(folder, index, holder, shapes)
            if kept is None:
                self.deadline.check()
                statistics = sample_statistics(
                    self.source.model, profile.shape, table, sample, chosen, plan, self.recipe.seed, index, gates
                )
                if not statistics.finite:
                    raise ModelError(
                        f"under the plan {statistics.not_finite()} is not finite on calibration sample {index}; try "
                        "--dtype float32"
                    )
                if folder is not None:
                    write_sample(folder, index, statistics, holder, 0.0)
            else:
                statistics = kept[0]
            found.append(statistics)
            progress.step()
        progress.done()
        lengths = np.array([sample.length for sample in self.samples], np.int64)
        around = replace(
            profile,
            lengths=tuple(sorted(set(lengths.tolist()))),
            sample_lengths=lengths,
            sample_kinds=tuple(sample.kind for sample in self.samples),
            statistics=Statistics.stack(found),
            around=plan.key(),
        )
        return lambda relative: Quadratic.of(around, self.recipe.search.text_weight, relative)


def spread_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Returns `count` of the samples, evenly spread over their order, which goes by length and source."""
    picks = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    return [samples[pick] for pick in picks.tolist()]

"""Rounds: profile again under the plan at hand, and move a tenth of its bytes to where they are worth more.

At a tight budget nearly every KV head is cut, and what a rule would do to the dense model says little about what it does
to the model under the plan: heads that were spare there are needed here. Around the plan the gradient of the KL is not
zero, so the change of every rule has a sign. Those of many heads must not be added up, though: what gains alone can be the
same gain, and a few samples around the plan tell less than the many of the profile. So both are joined in one quadratic form,
which is minimised near the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from moacompress.artefacts import fingerprint
from moacompress.calibration.influence import RuleTable
from moacompress.calibration.profiler import sample_statistics
from moacompress.calibration.samples import Sample, fingerprint_ordered
from moacompress.calibration.statistics import Statistics
from moacompress.calibration.store import Profile, read_sample, write_sample
from moacompress.errors import ModelError
from moacompress.models import SourceModel
from moacompress.plan import Plan
from moacompress.progress import Progress
from moacompress.recipe import Recipe
from moacompress.search.cost import Ints
from moacompress.search.knapsack import Knapsack
from moacompress.search.quadratic import Quadratic
from moacompress.search.surrogate import Floats

MOVED = 0.1
"""Share of the budget that one round may move."""


class Around(Protocol):
    """What a round needs: a quadratic model of the change of harm around a plan."""

    def __call__(self, plan: Plan, progress: Progress) -> Quadratic:
        """Returns the model; it is 0 for the rules that the plan has."""
        ...


@dataclass(frozen=True)
class ProfileAround:
    """Profiles some calibration samples around a plan; each is computed once where there is a folder to keep it.

    Attributes:
        profile: the profile of the dense model.
        recipe: the estimator, the weight of plain text and the seed count.
        source: the model.
        samples: what is profiled.
        folder: where finished samples are kept, or None for memory.
    """

    profile: Profile
    recipe: Recipe
    source: SourceModel
    samples: Sequence[Sample]
    folder: Path | None

    def __call__(self, plan: Plan, progress: Progress) -> Quadratic:
        """See `Around`.

        Raises:
            ModelError: a statistic is not finite.
            ArtefactError: the folder can not be written.
        """
        profile = self.profile
        chosen = self.recipe.profile.model_copy(update={"draws": 1, "baselines": False, "heads": False, "anchors": 0})
        table = RuleTable.of(profile.rules, profile.min_window, self.source.model.device)
        size = (profile.shape.layers, profile.shape.kv_heads, len(profile.rules))
        shapes = {"squares": size, "first": size, "total": (1, *size)}
        owner = fingerprint(
            [profile.fingerprint, plan.key(), self.recipe.seed, chosen.estimator, fingerprint_ordered(self.samples)]
        )
        folder = None if self.folder is None else self.folder / plan.key()
        found = []
        progress.start("profiling around the plan", len(self.samples))
        for index, sample in enumerate(self.samples):
            kept = None if folder is None else read_sample(folder, index, owner, shapes)
            if kept is None:
                statistics = sample_statistics(
                    self.source.model, profile.shape, table, sample, chosen, plan, self.recipe.seed, index
                )
                if not statistics.finite:
                    raise ModelError(
                        f"under the plan {statistics.not_finite()} is not finite on calibration sample {index}; try "
                        "--dtype float32"
                    )
                if folder is not None:
                    write_sample(folder, index, statistics, owner, 0.0)
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
        return Quadratic.of(around, self.recipe.search.text_weight)


def spread_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Returns `count` of the samples, evenly spread over their order, which goes by length and source."""
    picks = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    return [samples[pick] for pick in picks.tolist()]


def moved(
    knapsack: Knapsack, form: Quadratic, costs: Floats, weight: float, choice: Ints, share: float = MOVED
) -> Ints:
    """Returns the choice of least predicted harm within reach of the present one.

    Args:
        knapsack: slots and limits.
        form: predicts harm, or its change.
        costs: predicted harm of every rule alone, nats, `[layers, kv_heads, rules]`.
        weight: of `form` beside `costs`, 0 to 1.
        choice: the present rule of every KV head, `[layers, kv_heads]`.
        share: of the longest length's limit that may change hands.

    Returns:
        int64 `[layers, kv_heads]`.
    """
    here = np.take_along_axis(knapsack.slots, choice[None, ..., None], axis=-1)
    distance = np.abs(knapsack.slots - here)[-1:]
    limit = int(2 * share * knapsack.limits[-1])  # what is taken from one head and given to another counts twice
    near = replace(knapsack, slots=np.concatenate([knapsack.slots, distance]), limits=np.append(knapsack.limits, limit))
    return form.refined(choice, costs, weight, near)


def choice_of(profile: Profile, plan: Plan) -> Ints:
    """Returns the number of every KV head's rule among the profile's, int64 `[layers, kv_heads]`."""
    index = {rule: number for number, rule in enumerate(profile.rules)}
    return np.array([[index[rule] for rule in row] for row in plan.rules], np.int64)

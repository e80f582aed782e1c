"""The plan evaluator: the real model on validation samples, and a study storage, so that nothing is measured twice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from moacompress.calibration.data.samples import Sample
from moacompress.core.files import fingerprint
from moacompress.core.progress import Progress
from moacompress.rules.plan import Plan
from moacompress.search.deadline import Deadline, TimeUp
from moacompress.search.measure.objective import Measure
from moacompress.search.measure.study_storage import StudyStorage
from moacompress.search.predict.surrogate import Surrogate, fit, pick_ablations
from moacompress.search.problem.knapsack import ablation
from moacompress.search.search_request import SearchRequest

ABLATION_SAMPLES = 3
"""Samples on which the ablations are measured that the surrogate is calibrated with."""


@dataclass(frozen=True)
class PlanEvaluator:
    """What measures plans.

    Attributes:
        study_storage: what is measured already.
        measure: the model on validation samples.
        order: numbers of the samples, shuffled.
        deadline: when to stop: it is checked before every measurement of a plan on a sample, and what was measured of
            several until then is kept for the next run.
    """

    study_storage: StudyStorage
    measure: Measure
    order: Sequence[int]
    deadline: Deadline = field(default_factory=Deadline)

    @staticmethod
    def of(study_storage: StudyStorage, measure: Measure, seed: int, deadline: Deadline) -> PlanEvaluator:
        """Returns the meter whose samples are shuffled by a seed."""
        return PlanEvaluator(
            study_storage, measure, np.random.default_rng(seed).permutation(measure.size).tolist(), deadline
        )

    def kls(self, kind: str, plan: Plan, numbers: Sequence[int]) -> list[float]:
        """Returns the KL of each numbered sample, measured at most once in the life of the study storage.

        Args:
            kind: what for; with the plan it is what the numbers are filed under.
            plan: the plan.
            numbers: of the samples.

        Raises:
            TimeUp: the time is up, and one of them is not measured yet.
        """

        def measured(done: int) -> Generator[float, None, None]:
            with self.measure.under(plan) as kl:
                for number in numbers[done:]:
                    yield kl(number)

        return self._once(f"{kind}:{plan.key()}", len(numbers), measured)

    def _once(self, name: str, count: int, measured: Callable[[int], Generator[float, None, None]]) -> list[float]:
        """Returns so many KLs, measured at most once in the life of the study storage.

        Args:
            name: what they are filed under.
            count: how many there are.
            measured: measures those behind so many that are known already.
        """
        known = self.study_storage.recall(name)
        if known is not None:
            return [float(kl) for kl in known]
        found = begun = self.study_storage.begun(name)
        with closing(measured(len(begun))) as kls:
            try:
                for _ in range(count - len(begun)):
                    self.deadline.check()
                    found = [*found, next(kls)]
            except TimeUp:
                self.study_storage.stop(name, found)
                raise
        self.study_storage.remember(name, found)
        return found

    def keep(self, kind: str, plan: Plan, kls: Sequence[float]) -> None:
        """Keeps what was measured elsewhere, as `kls` would have."""
        self.study_storage.remember(f"{kind}:{plan.key()}", list(kls))

    def known(self, kind: str, plan: Plan) -> list[float] | None:
        """Returns what `kls` measured before, or None."""
        found = self.study_storage.recall(f"{kind}:{plan.key()}")
        return None if found is None else [float(value) for value in found]

    def many(
        self, kind: str, number: int, plans: Sequence[Plan], base: Plan, measure: Measure | None = None
    ) -> list[float]:
        """Returns the KLs of plans near `base` on one sample, measured at most once in the life of the study storage.

        Args:
            kind: what for.
            number: of the sample.
            plans: quick are those that differ from `base` in late layers only.
            base: a plan.
            measure: the model on other samples than the meter's own.

        Raises:
            TimeUp: the time is up, and one of them is not measured yet.
        """
        name = f"{kind}:{fingerprint([base.key(), *(plan.key() for plan in plans)])}:{number}"
        model = measure or self.measure
        return self._once(name, len(plans), lambda done: model.many(number, plans[done:], base))

    def calibrated(self, request: SearchRequest, progress: Progress) -> Surrogate:
        """Returns the surrogate fitted to measured ablations of single KV heads, at the shortest length (the cheapest).

        A KV head gets another span or other formats, never both: what the two cost is told apart.

        Raises:
            TimeUp: the time is up, and an ablation is not measured yet.
        """
        recipe, profile, surrogate = request.recipe, request.profile, request.surrogate
        shortest = Surrogate(surrogate.rules, surrogate.influence[:1], surrogate.supersets)
        influence = shortest.raw()
        pure = np.array([rule.is_native or rule.sees_all for rule in surrogate.rules])
        picks = pick_ablations(np.where(pure, influence, 0.0), recipe.search.ablations, recipe.seed)
        nearest = sorted(self.order, key=lambda number: _rank(profile.validation[number]))
        numbers = nearest[: ABLATION_SAMPLES if picks else 0]
        plans, full = [ablation(profile, pick) for pick in picks], Plan.full(profile.shape)
        progress.start("calibrating", len(numbers))
        kls = []
        for number in numbers:
            kls.append(self.many("ablations", number, plans, full))
            progress.step(f"{len(plans)} KV heads on sample {number}")
        progress.done()
        measured = np.mean(kls, axis=0) if kls else np.zeros(0)
        return surrogate.calibrated(fit([influence[pick] for pick in picks], measured))


def _rank(sample: Sample) -> tuple[bool, int]:
    """Sorts answers before plain text, and the shortest first."""
    return sample.kind == "text", sample.length

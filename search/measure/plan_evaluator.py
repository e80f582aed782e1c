"""The plan evaluator: the real model on validation samples, and a study storage, so that nothing is measured twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from moacompress.core.progress import SILENT, Progress
from moacompress.core.ranks import work_shard
from moacompress.rules.plan import Plan
from moacompress.search.deadline import Deadline
from moacompress.search.measure.claims import Claim, Claims
from moacompress.search.measure.objective import Measure
from moacompress.search.measure.study_storage import StudyStorage

PART = 4
"""Samples of a plan that a worker measures before another one may take the next."""


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan and its KLs on the validation samples, nats, in the shuffled order; of a baseline that lost on the first ones."""

    plan: Plan
    kls: list[float]

    @property
    def kl(self) -> float:
        """Mean KL, nats."""
        return float(np.mean(self.kls))


@dataclass(frozen=True)
class Job:
    """KLs that one worker measures.

    Attributes:
        name: what they are filed under.
        count: how many there are at most.
        measured: yields those after the given ones, which are measured already; every number that it yields is added to them.
    """

    name: str
    count: int
    measured: Callable[[list[float]], Generator[float, None, None]]


@dataclass(frozen=True)
class PlanEvaluator:
    """What measures plans.

    Attributes:
        study_storage: what is measured already.
        measure: the model on validation samples.
        order: numbers of the samples, shuffled.
        deadline: when to stop: it is checked before every measurement of a plan on a sample, and what was measured of
            several until then is kept for the next run.
        progress: told after every sample that work goes on.
    """

    study_storage: StudyStorage
    measure: Measure
    order: Sequence[int]
    deadline: Deadline = field(default_factory=Deadline)
    progress: Progress = SILENT

    @staticmethod
    def of(
        study_storage: StudyStorage, measure: Measure, seed: int, deadline: Deadline, progress: Progress = SILENT
    ) -> PlanEvaluator:
        """Returns the evaluator whose samples are shuffled by a seed."""
        order = np.random.default_rng(seed).permutation(measure.size).tolist()
        return PlanEvaluator(study_storage, measure, order, deadline, progress=progress)

    @property
    def claims(self) -> Claims:
        """The claims on what is measured."""
        return self.study_storage.claims

    def shown(self, kind: str, plan: Plan, what: str) -> list[float]:
        """Returns the KL of every sample in their order, with a bar of its own; workers share the samples.

        The numbers are filed under the kind and the plan.

        Raises:
            TimeUp: the time is up, and one of them is not measured yet.
        """
        known = self.known(kind, plan)
        if known is not None:
            return known
        ranks = work_shard()[1]
        size = ranks * math.ceil(PART / ranks)
        parts = [self.order[at : at + size] for at in range(0, len(self.order), size)]

        def measured(done: int) -> None:
            for _ in parts[done]:
                self.progress.step()

        self.progress.start(what, len(self.order))
        jobs = [self.job(f"{kind}:{size}:{number}", plan, part) for number, part in enumerate(parts)]
        kls = [kl for part in self.together(jobs, measured) for kl in part]
        self.progress.done()
        self.claims.once(f"{kind}:{plan.key()}", lambda claim: kls)
        return kls

    def job(
        self, kind: str, plan: Plan, numbers: Sequence[int], lost: Callable[[list[float]], bool] = lambda kls: False
    ) -> Job:
        """Returns the job of measuring a plan on numbered samples, filed under the kind and the plan.

        It ends early where `lost`, which is given the KLs so far, says that more of them decide nothing.
        """

        def measured(known: list[float]) -> Generator[float, None, None]:
            with self.measure.under(plan) as kl:
                for number in numbers[len(known) :]:
                    if known and lost(known):
                        return
                    yield kl(number)

        return Job(f"{kind}:{plan.key()}", len(numbers), measured)

    def attempt(self, job: Job) -> list[float] | None:
        """Returns the KLs of a job, measured at most once in the life of the study storage; None where another worker is at it.

        Raises:
            TimeUp: the time is up, and one of them is not measured yet; those that are will not be measured again.
        """

        def measured(claim: Claim) -> list[float]:
            found = claim.numbers
            with closing(job.measured(found)) as kls:
                while len(found) < job.count:
                    self.deadline.check()
                    kl = next(kls, None)
                    if kl is None:
                        break
                    self.claims.add_number(claim, kl)
                    self.progress.beat()
            return found

        kls: list[float] | None = self.claims.once(job.name, measured)
        return kls

    def together(self, jobs: Sequence[Job], done: Callable[[int], None] | None = None) -> list[list[float]]:
        """Returns the KLs of several independent jobs, which workers share: each is done by one of them.

        `done` is told the number of every job that is done, as it is.

        Raises:
            TimeUp: the time is up, and one of them is not measured yet.
        """

        def attempt(number: int) -> list[float] | None:
            kls = self.attempt(jobs[number])
            if kls is not None and done is not None:
                done(number)
            return kls

        return self.claims.together([job.name for job in jobs], attempt, self.deadline)

    def pause(self, names: Sequence[str]) -> None:
        """Waits a moment for the named measurements of other workers.

        Raises:
            TimeUp: the time is up.
        """
        self.deadline.check()
        self.claims.pause(names, self.deadline.left)

    def known(self, kind: str, plan: Plan) -> list[float] | None:
        """Returns what `shown` measured before, or None."""
        kls: list[float] | None = self.claims.result(f"{kind}:{plan.key()}")
        return kls

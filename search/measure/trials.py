"""The trials of a study: search parameters in, a plan by the solver, measured sample by sample until it is done or pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moacompress.core.progress import SILENT, Progress
from moacompress.rules.plan import Plan
from moacompress.search.deadline import TimeUp
from moacompress.search.measure.kl_difference import CAUTION, KlDifference
from moacompress.search.measure.packed_plan import pack
from moacompress.search.measure.plan_evaluator import PlanEvaluator
from moacompress.search.measure.study_storage import FinishedTrial, StartedTrial, StudyStorage

EPSILON = 1e-3
"""Nats added to a KL before its logarithm: differences far below it do not matter."""


def log_ratio(kls: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the mean over samples of `log((kl + eps) / (reference + eps))`: what Optuna's sampler is told of a trial.

    The shorter list decides how many there are.
    """
    return float(np.mean([np.log((kl + EPSILON) / (base + EPSILON)) for kl, base in zip(kls, reference, strict=False)]))


@dataclass(frozen=True)
class TrialResult:
    """A finished trial.

    Attributes:
        index: its number among the trials of its study; 0 is the plan that the others are compared with.
        key: of its plan.
        plan: its rules, packed.
        kls: nats, in the order of the shuffled samples; fewer than all where it was pruned.
        value: mean log-ratio to trial 0, for the sampler.
        pruned: whether it was pruned.
        parameters: its search parameters.
    """

    index: int
    key: str
    plan: dict[str, Any]
    kls: list[float]
    value: float
    pruned: bool
    parameters: dict[str, float]

    @property
    def kl(self) -> float:
        """Mean KL of the samples that it was measured on, nats."""
        return float(np.mean(self.kls))


@dataclass(frozen=True)
class Trials:
    """Runs the trials of a study and knows those that are finished.

    Many workers may run them. Where two trials come to the same plan it is measured once.

    Attributes:
        study_storage: where they are kept.
        evaluator: measures plans, until the time is up.
        plan_of: makes a plan of search parameters; it is within the limits.
        first: the plan of trial 0.
        first_kls: what was measured of it, in the order of the samples.
        progress: told of every trial.
    """

    study_storage: StudyStorage
    evaluator: PlanEvaluator
    plan_of: Callable[[dict[str, Any]], Plan]
    first: Plan
    first_kls: list[float]
    progress: Progress = SILENT

    def finished(self) -> list[TrialResult]:
        """Returns the finished trials; none as long as trial 0 is not among them, which the others are compared with."""
        found = list(map(_tried, self.study_storage.finished()))
        return found if found and found[0].index == 0 else []

    def completed(self, name: str, limit: int, after: Callable[[Sequence[TrialResult]], str]) -> list[TrialResult]:
        """Returns the finished trials, once all of `limit` have run or the time is up.

        None is there where the time was up before another worker had noted trial 0. `after` is given the finished ones after
        each, and returns what is said of it.
        """
        tried, progress, deadline = self.finished(), self.progress, self.evaluator.deadline
        progress.start(name, limit)
        for _ in tried[:limit]:
            progress.step()
        with suppress(TimeUp):
            while not set(range(limit)) <= {trial.index for trial in tried} and not (tried and deadline.over()):
                self.study_storage.run_next(limit, deadline, partial(self._run, tried))
                before, tried = len(tried), self.finished()
                for _ in range(before, min(len(tried), limit)):
                    progress.step(after(tried))
        progress.done()
        return tried

    def _run(self, tried: Sequence[TrialResult], started: StartedTrial) -> None:
        """Runs a trial.

        Raises:
            TimeUp: the time is up before the trial has ended: the next run begins it again, with what is measured of it.
        """
        plan = self.plan_of(started.parameters)
        kls = self._kls(plan, tried)
        self.study_storage.tell(
            started,
            log_ratio(kls, self.first_kls),
            key=plan.key(),
            plan=pack(plan),
            harms=kls,
            pruned=len(kls) < len(self.first_kls),
        )

    def _kls(self, plan: Plan, tried: Sequence[TrialResult]) -> list[float]:
        """Returns the KLs of a trial's plan: all of them, or those until it is clearly worse than the best."""
        if plan.key() == self.first.key():
            return self.first_kls
        hopeless = partial(is_hopeless, best=lowest_trial(tried).kls if tried else self.first_kls)
        job = self.evaluator.job(self.study_storage.name, plan, self.evaluator.order, hopeless)
        return self.evaluator.together([job])[0]


def is_hopeless(kls: Sequence[float], best: Sequence[float]) -> bool:
    """Returns whether a plan is worse than the best one beyond doubt, by Wilcoxon's test of the samples measured of both."""
    import optuna
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study()
    study.add_trial(create_trial(value=float(np.mean(best)), intermediate_values=dict(enumerate(best))))
    running = create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(kls)))
    return bool(optuna.pruners.WilcoxonPruner(p_threshold=0.1).prune(study, running))


def _tried(trial: FinishedTrial) -> TrialResult:
    """Returns a finished trial of a study, whose note `harms` is what was measured."""
    kept = dict(trial.notes)
    return TrialResult(trial.index, value=trial.value, parameters=trial.parameters, kls=kept.pop("harms"), **kept)


def lowest_trial(tried: Sequence[TrialResult]) -> TrialResult:
    """Returns the trial of lowest mean KL among those measured on all samples; trial 0 always is."""
    return min((trial for trial in tried if not trial.pruned), key=lambda trial: (trial.kl, trial.index))


def best_trial(tried: Sequence[TrialResult]) -> TrialResult:
    """Returns the trial of lowest mean KL among those that beat trial 0 by `CAUTION` standard errors; trial 0 if none does."""
    first, *others = tried
    return lowest_trial(
        [first, *(trial for trial in others if KlDifference.of(trial.kls, first.kls).is_lower(CAUTION))]
    )

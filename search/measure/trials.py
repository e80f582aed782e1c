"""The trials of a study: search parameters in, a plan by the solver, measured sample by sample until it is done or hopeless."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.core.progress import Progress
from moacompress.rules.plan import Plan
from moacompress.search.deadline import Deadline, TimeUp
from moacompress.search.measure.objective import Measure
from moacompress.search.measure.packed_plan import pack
from moacompress.search.measure.study_storage import StudyStorage

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

EPSILON = 1e-3
"""Nats added to a KL before its logarithm: differences far below it do not matter."""


CAUTION = 2.0
"""Standard errors by which a trial must beat trial 0. What looks best of many noisy numbers is usually less good: a trial
that was better by 1.3 of them on 28 samples was worse on others."""


def log_ratios(kls: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Returns `log((kl + eps) / (reference + eps))` for each sample; the shorter list decides how many."""
    return [float(np.log((kl + EPSILON) / (base + EPSILON))) for kl, base in zip(kls, reference, strict=False)]


def log_ratio(kls: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the mean of `log_ratios`: what plans are compared by."""
    return float(np.mean(log_ratios(kls, reference)))


@dataclass(frozen=True)
class Tried:
    """A finished trial.

    Attributes:
        index: its place among the finished trials; 0 is the plan that the others are compared with.
        key: of its plan.
        plan: its rules, packed.
        kls: nats, in the order of the shuffled samples; fewer than all where it was pruned.
        value: mean log-ratio to trial 0.
        pruned: whether it was given up half-way.
        measured: whether it was measured, and not known before.
        parameters: its search parameters.
    """

    index: int
    key: str
    plan: dict[str, Any]
    kls: list[float]
    value: float
    pruned: bool
    measured: bool
    parameters: dict[str, float]


@dataclass(frozen=True)
class Trials:
    """Runs the trials of a study and knows those that are finished.

    Attributes:
        study_storage: where they are kept.
        measure: the model.
        order: the samples' numbers, shuffled.
        plan_of: makes a plan of search parameters; it is within the limits.
        deadline: when to stop; it is checked before every sample.
        known: the KLs of plans that are measured already, in the order of the samples, by the plan's key.
    """

    study_storage: StudyStorage
    measure: Measure
    order: Sequence[int]
    plan_of: Callable[[dict[str, Any]], Plan]
    deadline: Deadline = field(default_factory=Deadline)
    known: Mapping[str, list[float]] = field(default_factory=dict)

    def finished(self) -> list[Tried]:
        """Returns the finished trials."""
        trials = self.study_storage.finished()
        return [_tried(index, trial) for index, trial in enumerate(trials)]

    def completed(
        self, name: str, limit: int, progress: Progress, after: Callable[[Sequence[Tried]], str]
    ) -> list[Tried]:
        """Returns the finished trials, once the missing ones have run or the time is up.

        None is there where the time was up before the first one was measured; one whose plan is known takes no time.

        Args:
            name: of what is done, for the progress.
            limit: how many there are to be.
            progress: told of every trial.
            after: is given the finished ones after each, and returns what is said of it.
        """
        tried = self.finished()
        progress.start(name, limit)
        for _ in tried[:limit]:
            progress.step()
        with suppress(TimeUp):
            while len(tried) < limit and not (tried and self.deadline.over()):
                self.run(tried)
                tried = self.finished()
                progress.step(after(tried))
        progress.done()
        return tried

    def run(self, tried: Sequence[Tried]) -> None:
        """Runs the next trial.

        Args:
            tried: those that are finished.

        Raises:
            TimeUp: the time is up before the trial has ended: the next run begins it again, with what is measured of it.
        """
        trial = self.study_storage.ask()
        plan = self.plan_of(trial.params)
        key = plan.key()
        found = {old.key: (old.kls, old.pruned) for old in tried}
        found |= {known: (kls, False) for known, kls in self.known.items()}
        measured = key not in found
        if measured:
            kls, pruned = self._race(trial, plan, tried[0].kls if tried else None)
        else:
            kls, pruned = found[key]
            for step, ratio in enumerate(log_ratios(kls, tried[0].kls if tried else kls)):
                self.study_storage.report(trial, ratio, step)
        value = log_ratio(kls, tried[0].kls if tried else kls)
        self.study_storage.tell(
            trial, value, key=key, plan=pack(plan), harms=list(kls), pruned=pruned, measured=measured
        )

    def _race(self, trial: Trial, plan: Plan, reference: list[float] | None) -> tuple[list[float], bool]:
        """Measures a plan sample by sample until it is done or clearly worse than the best; trial 0 is never pruned."""
        kls: list[float] = []
        name = f"trial:{plan.key()}"
        begun = self.study_storage.begun(name)
        with self.measure.under(plan) as kl:
            for step, number in enumerate(self.order):
                if step < len(begun):
                    kls.append(begun[step])
                else:
                    try:
                        self.deadline.check()
                    except TimeUp:
                        self.study_storage.stop(name, kls)
                        raise
                    kls.append(kl(number))
                ratio = log_ratios(kls[-1:], (reference or kls)[step : step + 1])[0]
                hopeless = self.study_storage.report(trial, ratio, step)
                if hopeless and reference is not None and step + 1 < len(self.order):
                    return kls, True
        return kls, False


def _tried(index: int, trial: FrozenTrial) -> Tried:
    """Returns a finished trial of a study, whose attribute `harms` is what was measured."""
    kept = dict(trial.user_attrs)
    return Tried(index, value=trial.value or 0.0, parameters=trial.params, kls=kept.pop("harms"), **kept)


def standard_error(ratios: Sequence[float]) -> float:
    """Returns the standard error of the mean of log-ratios; 0 for a single one, which says nothing about it."""
    return float(np.std(ratios, ddof=1) / len(ratios) ** 0.5) if len(ratios) > 1 else 0.0


def noise(kls: Sequence[float], reference: Sequence[float], caution: float) -> float:
    """Returns what the gain of one plan over another has to be beyond, to be believed: so many standard errors of it."""
    return caution * standard_error(log_ratios(kls, reference))


def least_trial(tried: Sequence[Tried]) -> Tried:
    """Returns the trial of least value among those measured on all samples; trial 0 always is."""
    return min((trial for trial in tried if not trial.pruned), key=lambda trial: (trial.value, trial.index))


def best_trial(tried: Sequence[Tried], caution: float = CAUTION) -> Tried:
    """Returns the trial of least value among those that beat trial 0 by `caution` standard errors; trial 0 if none does."""
    first = tried[0]
    clear = [trial for trial in tried if trial.value + noise(trial.kls, first.kls, caution) < 0]
    return least_trial([first, *clear])

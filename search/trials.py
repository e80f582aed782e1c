"""The trials of a study: knobs in, a plan by the solver, measured sample by sample until it is done or hopeless."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.core.progress import Progress
from moacompress.rules.plan import Plan
from moacompress.search.deadline import Deadline, TimeUp
from moacompress.search.ledger import Ledger
from moacompress.search.objective import Measure
from moacompress.search.search_result import pack

if TYPE_CHECKING:
    from optuna import Trial

EPSILON = 1e-3
"""Nats added to a harm before its logarithm: differences far below it do not matter."""


CAUTION = 2.0
"""Standard errors by which a trial must beat trial 0. What looks best of many noisy numbers is usually less good: a trial
that was better by 1.3 of them on 28 samples was worse on others."""


def log_ratios(harms: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Returns `log((harm + eps) / (reference + eps))` for each sample; the shorter list decides how many."""
    return [float(np.log((harm + EPSILON) / (base + EPSILON))) for harm, base in zip(harms, reference, strict=False)]


def log_ratio(harms: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the mean of `log_ratios`: what plans are compared by."""
    return float(np.mean(log_ratios(harms, reference)))


@dataclass(frozen=True)
class Tried:
    """A finished trial.

    Attributes:
        index: its place among the finished trials; 0 is the plan that the others are compared with.
        key: of its plan.
        plan: its rules, packed.
        harms: nats, in the order of the shuffled samples; fewer than all where it was pruned.
        value: mean log-ratio to trial 0.
        pruned: whether it was given up half-way.
        measured: whether it was measured, and not known before.
        knobs: its knobs.
    """

    index: int
    key: str
    plan: dict[str, Any]
    harms: list[float]
    value: float
    pruned: bool
    measured: bool
    knobs: dict[str, float]


@dataclass(frozen=True)
class Trials:
    """Runs the trials of a study and knows those that are finished.

    Attributes:
        ledger: where they are kept.
        measure: the model.
        order: the samples' numbers, shuffled.
        plan_of: makes a plan of knobs; it is within the limits.
        deadline: when to stop; it is checked before every sample.
        known: the harms of plans that are measured already, in the order of the samples, by the plan's key.
    """

    ledger: Ledger
    measure: Measure
    order: Sequence[int]
    plan_of: Callable[[dict[str, Any]], Plan]
    deadline: Deadline = field(default_factory=Deadline)
    known: Mapping[str, list[float]] = field(default_factory=dict)

    def finished(self) -> list[Tried]:
        """Returns the finished trials."""
        trials = self.ledger.finished()
        return [
            Tried(index, value=trial.value or 0.0, knobs=trial.params, **trial.user_attrs)
            for index, trial in enumerate(trials)
        ]

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
        trial = self.ledger.ask()
        plan = self.plan_of(trial.params)
        key = plan.key()
        found = {old.key: (old.harms, old.pruned) for old in tried}
        found |= {known: (harms, False) for known, harms in self.known.items()}
        measured = key not in found
        if measured:
            harms, pruned = self._race(trial, plan, tried[0].harms if tried else None)
        else:
            harms, pruned = found[key]
            for step, ratio in enumerate(log_ratios(harms, tried[0].harms if tried else harms)):
                self.ledger.report(trial, ratio, step)
        value = log_ratio(harms, tried[0].harms if tried else harms)
        self.ledger.tell(trial, value, key=key, plan=pack(plan), harms=list(harms), pruned=pruned, measured=measured)

    def _race(self, trial: Trial, plan: Plan, reference: list[float] | None) -> tuple[list[float], bool]:
        """Measures a plan sample by sample until it is done or clearly worse than the best; trial 0 is never pruned."""
        harms: list[float] = []
        name = f"trial:{plan.key()}"
        begun = self.ledger.begun(name)
        with self.measure.under(plan) as harm:
            for step, number in enumerate(self.order):
                if step < len(begun):
                    harms.append(begun[step])
                else:
                    try:
                        self.deadline.check()
                    except TimeUp:
                        self.ledger.stop(name, harms)
                        raise
                    harms.append(harm(number))
                ratio = log_ratios(harms[-1:], (reference or harms)[step : step + 1])[0]
                hopeless = self.ledger.report(trial, ratio, step)
                if hopeless and reference is not None and step + 1 < len(self.order):
                    return harms, True
        return harms, False


def standard_error(ratios: Sequence[float]) -> float:
    """Returns the standard error of the mean of log-ratios; 0 for a single one, which says nothing about it."""
    return float(np.std(ratios, ddof=1) / len(ratios) ** 0.5) if len(ratios) > 1 else 0.0


def noise(harms: Sequence[float], rival: Sequence[float], caution: float) -> float:
    """Returns what the gain of one plan over another has to be beyond, to be believed: so many standard errors of it."""
    return caution * standard_error(log_ratios(harms, rival))


def least_trial(tried: Sequence[Tried]) -> Tried:
    """Returns the trial of least value among those measured on all samples; trial 0 always is."""
    return min((trial for trial in tried if not trial.pruned), key=lambda trial: (trial.value, trial.index))


def best_trial(tried: Sequence[Tried], caution: float = CAUTION) -> Tried:
    """Returns the trial of least value among those that beat trial 0 by `caution` standard errors; trial 0 if none does."""
    first = tried[0]
    clear = [trial for trial in tried if trial.value + noise(trial.harms, first.harms, caution) < 0]
    return least_trial([first, *clear])

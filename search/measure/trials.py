"""The trials of a study: search parameters in, a plan by the solver, measured sample by sample until it is done or pruned."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moacompress.core.progress import SILENT, Progress
from moacompress.rules.plan import Plan
from moacompress.search.deadline import Deadline, TimeUp
from moacompress.search.measure.claims import Claim, ClaimLost
from moacompress.search.measure.kl_difference import CAUTION, KlDifference
from moacompress.search.measure.objective import Measure
from moacompress.search.measure.packed_plan import pack
from moacompress.search.measure.study_storage import FinishedTrial, StartedTrial, StudyStorage

EPSILON = 1e-3
"""Nats added to a KL before its logarithm: differences far below it do not matter."""


def log_ratios(kls: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Returns `log((kl + eps) / (reference + eps))` for each sample; the shorter list decides how many."""
    return [float(np.log((kl + EPSILON) / (base + EPSILON))) for kl, base in zip(kls, reference, strict=False)]


def log_ratio(kls: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the mean of `log_ratios`: what Optuna's sampler is told of a trial."""
    return float(np.mean(log_ratios(kls, reference)))


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
        measured: whether it was measured, and not known before: of several trials of one plan the first is.
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

    @property
    def kl(self) -> float:
        """Mean KL of the samples that it was measured on, nats."""
        return float(np.mean(self.kls))


@dataclass
class _PendingTrial:
    """A trial of this worker that is not finished.

    Attributes:
        started: the trial.
        plan: its plan.
    """

    started: StartedTrial
    plan: Plan


@dataclass(frozen=True)
class Trials:
    """Runs the trials of a study and knows those that are finished.

    Many workers may run them. Two trials can come to the same plan: it is measured once, and the other trial waits for it while
    its worker runs the next ones. So does one that is measured before trial 0 is.

    Attributes:
        study_storage: where they are kept.
        measure: the model.
        order: the samples' numbers, shuffled.
        plan_of: makes a plan of search parameters; it is within the limits.
        deadline: when to stop; it is checked before every sample.
        known: the KLs of plans that are measured already, in the order of the samples, by the plan's key.
        progress: told of every trial, and after every sample that work goes on.
    """

    study_storage: StudyStorage
    measure: Measure
    order: Sequence[int]
    plan_of: Callable[[dict[str, Any]], Plan]
    deadline: Deadline = field(default_factory=Deadline)
    known: Mapping[str, list[float]] = field(default_factory=dict)
    progress: Progress = SILENT

    def finished(self) -> list[TrialResult]:
        """Returns the finished trials."""
        seen = set(self.known)
        found = []
        for trial in self.study_storage.finished():
            tried = _tried(trial, seen)
            seen.add(tried.key)
            found.append(tried)
        return found

    def completed(self, name: str, limit: int, after: Callable[[Sequence[TrialResult]], str]) -> list[TrialResult]:
        """Returns the finished trials, once the missing ones have run or the time is up.

        None is there where the time was up before the first one was measured; one whose plan is known takes no time.

        Args:
            name: of what is done, for the progress.
            limit: how many there are to be.
            after: is given the finished ones after each, and returns what is said of it.
        """
        tried, progress = self.finished(), self.progress
        progress.start(name, limit)
        for _ in tried[:limit]:
            progress.step()
        unfinished: list[_PendingTrial] = []
        try:
            with suppress(TimeUp):
                while not _complete(tried, limit) and not (tried and self.deadline.over()):
                    if not self._advance(unfinished, limit, tried):
                        self.deadline.check()
                        self.study_storage.pause(limit, _indices(tried), self.deadline.left)
                    before, tried = len(tried), self.finished()
                    for _ in range(before, min(len(tried), limit)):
                        progress.step(after(tried))
        finally:
            for trial in unfinished:
                self.study_storage.release(trial.started)
        progress.done()
        return tried

    def _advance(self, unfinished: list[_PendingTrial], limit: int, tried: Sequence[TrialResult]) -> bool:
        """Finishes a trial that waits, or else runs the next one; returns False where there is nothing to do but wait.

        Raises:
            TimeUp: the time is up before the trial has ended: the next run begins it again, with what is measured of it.
        """
        for trial in unfinished:
            if self._ran(trial, unfinished, tried):
                return True
        started = self.study_storage.ask(limit, _indices(tried))
        if started is None:
            return False
        try:
            trial = _PendingTrial(started, self.plan_of(started.parameters))
        except BaseException:
            self.study_storage.release(started)
            raise
        unfinished.append(trial)
        self._ran(trial, unfinished, tried)
        return True

    def _ran(self, trial: _PendingTrial, unfinished: list[_PendingTrial], tried: Sequence[TrialResult]) -> bool:
        """Returns whether a trial has ended, or is another worker's now; if so it is none of the unfinished any more."""
        try:
            done = self._run(trial, tried)
        except ClaimLost:
            self.study_storage.release(trial.started)
            done = True
        if done:
            unfinished.remove(trial)
        return done

    def _run(self, trial: _PendingTrial, tried: Sequence[TrialResult]) -> bool:
        """Runs a trial; returns False where it has to wait for what other workers measure: its plan, or trial 0."""
        key, started = trial.plan.key(), trial.started
        found = self._measured(trial, key, tried)
        if found is None:
            return False
        kls, pruned = found
        reference = kls
        if started.index:
            tried = tried or self.finished()
            if not tried:
                return False
            reference = tried[0].kls
        value = log_ratio(kls, reference)
        measured = key not in self.known
        self.study_storage.tell(
            started, value, key=key, plan=pack(trial.plan), harms=list(kls), pruned=pruned, measured=measured
        )
        return True

    def _measured(
        self, trial: _PendingTrial, key: str, tried: Sequence[TrialResult]
    ) -> tuple[list[float], bool] | None:
        """Returns the KLs of a trial's plan, and whether it was given up half-way; None where another worker measures it."""
        if key in self.known:
            return self.known[key], False
        for old in tried:
            if old.key == key:
                return old.kls, old.pruned
        name = f"{self.study_storage.name}:{key}"
        claims = self.study_storage.claims
        claim = claims.acquire(name)
        if claim is None:
            found = claims.result(name)
            return None if found is None else (list(map(float, found["kls"])), bool(found["pruned"]))
        try:
            kls, pruned = self._race(trial, claim, tried)
            claims.finish(claim, [float(np.mean(kls))], result={"kls": kls, "pruned": pruned})
        finally:
            claims.release(claim)
        return kls, pruned

    def _race(self, trial: _PendingTrial, claim: Claim, tried: Sequence[TrialResult]) -> tuple[list[float], bool]:
        """Measures a plan sample by sample until it is done or clearly worse than the best; trial 0 is never pruned."""
        kls: list[float] = []
        with self.measure.under(trial.plan) as kl:
            for step, number in enumerate(self.order):
                if step < len(claim.begun):
                    kls.append(claim.begun[step])
                else:
                    self.deadline.check()
                    kls.append(kl(number))
                    self.study_storage.claims.put(claim, kls)
                    self.progress.beat()
                if trial.started.index and step + 1 < len(self.order):
                    tried = tried or self.finished()
                    if tried and is_hopeless(kls, tried):
                        return kls, True
        return kls, False


def is_hopeless(kls: Sequence[float], tried: Sequence[TrialResult]) -> bool:
    """Returns whether a plan is worse than the best trial beyond doubt, by Wilcoxon's test of what is measured of both.

    Args:
        kls: of the plan, nats, in the order of the shuffled samples, as far as they are measured.
        tried: the finished trials, of which there is one at least.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    best = least_trial(tried)
    study = optuna.create_study()
    study.add_trial(create_trial(value=best.kl, intermediate_values=dict(enumerate(best.kls))))
    running = create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(kls)))
    return bool(optuna.pruners.WilcoxonPruner(p_threshold=0.1).prune(study, running))


def _indices(tried: Sequence[TrialResult]) -> set[int]:
    return {trial.index for trial in tried}


def _complete(tried: Sequence[TrialResult], limit: int) -> bool:
    """Returns whether all trials below a limit are finished."""
    return set(range(limit)) <= _indices(tried)


def _tried(trial: FinishedTrial, seen: Container[str]) -> TrialResult:
    """Returns a finished trial of a study, whose note `harms` is what was measured."""
    kept = dict(trial.notes)
    kept["measured"] = kept["key"] not in seen
    return TrialResult(trial.index, value=trial.values[0], parameters=trial.parameters, kls=kept.pop("harms"), **kept)


def least_trial(tried: Sequence[TrialResult]) -> TrialResult:
    """Returns the trial of lowest mean KL among those measured on all samples; trial 0 always is."""
    return min((trial for trial in tried if not trial.pruned), key=lambda trial: (trial.kl, trial.index))


def best_trial(tried: Sequence[TrialResult], caution: float = CAUTION) -> TrialResult:
    """Returns the trial of lowest mean KL among those that beat trial 0 by `caution` standard errors; trial 0 if none does."""
    first, *others = tried
    return least_trial([first, *(trial for trial in others if KlDifference.of(trial.kls, first.kls).is_lower(caution))])

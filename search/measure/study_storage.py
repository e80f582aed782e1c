"""The study storage of a search: an Optuna study that holds everything measured, so that nothing is measured twice.

A search that was killed and started again finds its finished trials and baselines here and resumes as if it
had never stopped, and many processes may work on one study: each trial has an index, and who works on it has its claim, in
which all of it is kept; the finished ones are put into the study as trials of Optuna's, for its own tools. The sampler is made
again for every trial, from the seed and the index, of the trials that are finished and of those that others are at, so that
no random state is lost and nothing depends on who samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.core.errors import ArtefactError
from moacompress.models.processes import broadcast
from moacompress.search.deadline import Deadline
from moacompress.search.measure.claims import Claim, ClaimLost, Claims
from moacompress.search.measure.storages import guarded

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STARTUP_TRIALS = 5
"""Trials, the first included, before the Gaussian process has anything to say."""
TRIAL = ":trial:"
"""Stands in the name of a trial's claim, between the name of its study and its index."""
SHOWN = "index"
"""Note of a trial that Optuna's own tools are shown: its index."""
SHORT = (bool, int, float, str)
"""Notes of these types are shown with a trial in Optuna's tools."""


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that is done.

    Attributes:
        index: 0 is the trial of the neutral search parameters.
        parameters: its search parameters.
        value: what was measured; less is better.
        notes: JSON values that it was finished with.
    """

    index: int
    parameters: dict[str, float]
    value: float
    notes: dict[str, Any]


@dataclass
class StartedTrial:
    """A trial that this worker has the claim of."""

    index: int
    parameters: dict[str, float]
    claim: Claim
    begun: datetime = field(default_factory=datetime.now)


class StudyStorage:
    """What one search has measured so far.

    Args:
        claims: of the workers of the search.
        name: name of the study.
        distributions: the search parameters.
        seed: of the sampler.
        starts: search parameters of trial 0, and those that are tried right after, such as what won at another budget.

    Raises:
        ArtefactError: the storage cannot be used.
    """

    def __init__(
        self,
        claims: Claims,
        name: str,
        distributions: Mapping[str, BaseDistribution],
        seed: int,
        starts: Sequence[Mapping[str, float]],
    ) -> None:
        import optuna

        self.claims, self.name = claims, name
        self._distributions, self._seed = dict(distributions), seed
        self._starts: list[dict[str, float]] = []
        for start in map(self._ordered, starts):
            if start not in self._starts:
                self._starts.append(start)
        with guarded(claims.where):
            self._study = optuna.create_study(
                storage=claims.storage,
                study_name=name,
                load_if_exists=True,
            )

    def finished(self) -> list[FinishedTrial]:
        """Returns the finished trials, in the order of their indices."""
        found = {}
        for trial in self._claimed("COMPLETE"):
            index = self._index(trial.user_attrs["name"])
            found[index] = FinishedTrial(index, **trial.user_attrs["result"])
        return [found[index] for index in sorted(found)]

    def importances(self) -> dict[str, float]:
        """Returns the share of the variation between trials that goes with each parameter; empty where there are too few."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        finished = self.finished()
        if len({trial.value for trial in finished}) < STARTUP_TRIALS:
            return {}
        try:
            with guarded(self.claims.where):
                study = self._in_memory(finished, [])
                found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
        except (RuntimeError, ArtefactError):  # search parameters that never changed
            return {}
        return {name: float(share) for name, share in found.items()}

    def ask(self, limit: int) -> StartedTrial | None:
        """Starts the next of `limit` trials; None where each is finished, or another live worker's."""
        claim = self.claims.acquire_first(self._names(limit))
        if claim is None:
            return None
        try:
            return self._started(self._index(claim.name), claim)
        except ClaimLost:
            return None
        except BaseException:
            self.claims.release(claim)
            raise

    def tell(self, started: StartedTrial, value: float, **notes: Any) -> None:
        """Finishes a trial with its value; from then on it is never repeated.

        Raises:
            ClaimLost: another worker has the trial.
        """
        self.claims.finish(started.claim, {"parameters": started.parameters, "value": value, "notes": notes})
        self._show(started, value, notes)

    def run_next(self, limit: int, deadline: Deadline, run: Callable[[StartedTrial], None]) -> None:
        """Runs the next of `limit` trials, which `run` tells of; where others are at all that are missing, waits a moment.

        A trial that is not told of is given up: another run, or another worker, begins it again.

        Raises:
            TimeUp: the time is up.
        """
        started = self.ask(limit)
        if started is None:
            deadline.check()
            self.claims.pause(self._names(limit), deadline.left)
            return
        try:
            run(started)
        except ClaimLost:
            pass
        finally:
            self.claims.release(started.claim)

    def sampled(self, index: int, pending: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """Returns the search parameters that the sampler, which is seeded by the index, chooses for a trial.

        It looks elsewhere than where trials are pending.
        """
        from optuna.samplers import GPSampler

        seed = int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0])
        study = self._in_memory(self.finished(), pending)
        study.sampler = GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False)
        return self._ordered(broadcast(study.ask(self._distributions).params))

    def _names(self, limit: int) -> list[str]:
        return [f"{self.name}{TRIAL}{index}" for index in range(limit)]

    def _index(self, name: str) -> int:
        return int(name.removeprefix(self.name + TRIAL))

    def _claimed(self, *states: str, fresh: bool = True) -> list[FrozenTrial]:
        """Returns the claims on this study's trials that are in one of some states, in the order of their numbers."""
        return [
            trial
            for trial in self.claims.trials(fresh)
            if trial.state.name in states and trial.user_attrs["name"].startswith(self.name + TRIAL)
        ]

    def _show(self, started: StartedTrial, value: float, notes: Mapping[str, Any]) -> None:
        """Puts a finished trial into the study, where Optuna's own tools look."""
        from optuna.trial import create_trial

        short = {name: note for name, note in notes.items() if isinstance(note, SHORT)}
        trial = create_trial(
            params=started.parameters,
            distributions=self._distributions,
            value=value,
            user_attrs={SHOWN: started.index, **short},
        )
        trial.datetime_start = started.begun
        with guarded(self.claims.where):
            self._study.add_trial(trial)

    def _started(self, index: int, claim: Claim) -> StartedTrial:
        """Returns a claimed trial with its search parameters: those that an earlier claim of it had, or new ones."""
        unfinished = [
            trial
            for trial in self._claimed("FAIL", "RUNNING", fresh=False)  # as when it was claimed
            if "parameters" in trial.user_attrs
        ]
        begun = [trial for trial in unfinished if trial.user_attrs["name"] == claim.name]
        if begun:
            parameters = begun[0].user_attrs["parameters"]
        elif index < len(self._starts):
            parameters = self._starts[index]
        else:
            running = {
                trial.user_attrs["name"]: trial.user_attrs["parameters"]
                for trial in unfinished
                if trial.state.name == "RUNNING"
            }
            parameters = self.sampled(index, [running[name] for name in sorted(running)])
        self.claims.note(claim, parameters=parameters)
        return StartedTrial(index, parameters, claim)

    def _in_memory(self, finished: Sequence[FinishedTrial], pending: Sequence[Mapping[str, float]]) -> Study:
        """Returns a study of its own of finished trials and of some that are not finished."""
        import optuna
        from optuna.trial import TrialState, create_trial

        study = optuna.create_study()
        for trial in finished:
            study.add_trial(create_trial(params=trial.parameters, distributions=self._distributions, value=trial.value))
        for parameters in pending:
            study.add_trial(
                create_trial(state=TrialState.RUNNING, params=dict(parameters), distributions=self._distributions)
            )
        return study

    def _ordered(self, parameters: Mapping[str, float]) -> dict[str, float]:
        """Returns search parameters in the order of the distributions."""
        return {name: parameters[name] for name in self._distributions if name in parameters}

"""The workers of a search: processes on one machine or on many that share a study, and which of them are alive.

A worker is a running trial of the study that `Claims` are in, which says what process it is, and counts up a number, its beat,
as long as it lives. A process of this machine can be looked at. Of one elsewhere only its beat is known, and it is dead once
whoever looks has seen the same beat for `SILENT_SECONDS`, by its own clock: no two clocks are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moacompress.core.lock_holders import HeartbeatMonitor, LockHolder, heartbeat, held

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Worker:
    """One of the workers of a search.

    Attributes:
        number: of its trial.
        holder: what process it is.
        beat: how often it was heard of.
        alone: whether it shares the study with no other.
        trials: how many trials it wants; None where it does not say.
        state: `RUNNING`, `COMPLETE` for one that has ended, `FAIL` for one that was found dead.
        heard: when it was last heard of, by its own clock, in seconds since 1970.
    """

    number: int
    holder: LockHolder
    beat: int
    alone: bool
    trials: int | None
    state: str
    heard: float

    @staticmethod
    def of(trial: FrozenTrial) -> Worker | None:
        """Reads a trial; None for one that is no worker."""
        notes = trial.user_attrs
        holder = LockHolder.from_dict(notes.get("holder"))
        if holder is None:
            return None
        beat = notes.get("beat")
        count, heard = beat if isinstance(beat, list) and len(beat) == 2 else (0, holder.begun)
        trials = notes.get("trials")
        return Worker(
            trial.number,
            holder,
            int(count),
            bool(notes.get("alone")),
            trials if isinstance(trials, int) else None,
            trial.state.name,
            float(heard),
        )


class Workers:
    """Those of one search.

    Args:
        storage: where its studies are.
        study_id: of the study that its workers and claims are in.
        holder: this process; another one in tests.
        monotonic: the clock that silence is measured by, in seconds.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        holder: LockHolder | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._study_id = storage, study_id
        self.holder = holder or LockHolder.new()
        self._trial_id: int | None = None
        self._notes: dict[str, Any] = {}
        self._beats = 0
        self._beats_of_others = HeartbeatMonitor(monotonic)

    @property
    def token(self) -> str:
        """What this worker's claims are marked with."""
        return self.holder.token

    def all(self, trials: Sequence[FrozenTrial] | None = None) -> list[Worker]:
        """Returns all workers that the study has had, in the order of their coming.

        Args:
            trials: of the study, where they are known.
        """
        if trials is None:
            trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        return [worker for worker in map(Worker.of, trials) if worker is not None]

    def others(self) -> list[Worker]:
        """Returns the other workers that are alive."""
        running = [worker for worker in self.all() if worker.state == "RUNNING"]
        return [worker for worker in running if worker.holder.token != self.token and self._is_alive(worker)]

    def is_heard(self, worker: Worker) -> bool:
        """Returns whether a worker is known to live, and not only not yet known to be dead."""
        return worker.holder.is_here or self._beats_of_others.is_heard(worker.number)

    def mark_dead(self, worker: Worker) -> None:
        """Notes that a worker has died, so that nobody else need find it out."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, worker.number)
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def by_token(self, token: str, trials: Sequence[FrozenTrial] | None = None) -> Worker | None:
        """Returns the last one of a token.

        Args:
            token: what its claims are marked with.
            trials: of the study, where they are known.
        """
        return next((worker for worker in reversed(self.all(trials)) if worker.holder.token == token), None)

    def alive(self, token: str, trials: Sequence[FrozenTrial] | None = None) -> bool:
        """Returns whether what is marked with a token is being worked on.

        Args:
            token: what it is marked with.
            trials: of the study, where they are known.
        """
        if token == self.token:
            return True
        worker = self.by_token(token, trials)
        return worker is not None and worker.state == "RUNNING" and self._is_alive(worker)

    @contextmanager
    def joined(self, alone: bool, trials: int | None = None) -> Iterator[None]:
        """Makes this process a worker as long as the block runs.

        Args:
            alone: whether it shares the study with no other.
            trials: how many it wants.
        """
        self._notes = {"alone": alone, "trials": trials}
        with held(self.holder):
            self._announce()
            try:
                with heartbeat(self.beat):
                    yield
            finally:
                self._end()

    def beat(self) -> None:
        """Lets the others know that this worker lives; one that was found dead meanwhile comes back."""
        from optuna.exceptions import UpdateFinishedTrialError

        if self._trial_id is None:
            return
        self._beats += 1
        try:
            self._storage.set_trial_user_attr(self._trial_id, "beat", [self._beats, time.time()])
        except UpdateFinishedTrialError:
            self._announce()

    def _announce(self) -> None:
        from optuna.trial import TrialState, create_trial

        notes = {"holder": self.holder.to_dict(), "beat": [self._beats, time.time()], **self._notes}
        trial = create_trial(state=TrialState.RUNNING, user_attrs=notes)
        self._trial_id = self._storage.create_new_trial(self._study_id, trial)

    def _end(self) -> None:
        from optuna.trial import TrialState

        if self._trial_id is not None:
            with suppress(Exception):  # what went wrong with the storage was said, or is no reason to fail any more
                self._storage.set_trial_state_values(self._trial_id, TrialState.COMPLETE, [0.0])
            self._trial_id = None

    def _is_alive(self, worker: Worker) -> bool:
        """Returns whether a running worker lives; a dead one is marked."""
        if worker.holder.is_alive(lambda: self._beats_of_others.silence(worker.number, worker.beat)):
            return True
        self.mark_dead(worker)
        return False

"""Claims: which worker measures what, so that nothing is measured twice and what a killed worker had begun is taken over.

Everything that is measured has a name. A worker that is about to measure it adds a running trial of that name to an Optuna
study, and has the claim if no trial of the name with a lower number is done or is a live worker's; otherwise it withdraws.
Trials get their numbers one after the other, so workers that claim at the same time agree on who has it. A claim of a dead
worker is marked as failed, and the next one begins with the numbers that were kept. A trial that has ended cannot be changed,
so a worker that was taken for dead and comes back loses its claim, and a name has at most one result.

Each worker has a trial of its own as well, with its heartbeat. Whether a process of this machine lives is looked up. One of
another machine is dead once its heartbeat has not changed for `SILENT_SECONDS` by the clock of whoever watches, so that
workers compare no clocks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from moacompress.core.errors import InUseError
from moacompress.core.lock_holders import HeartbeatMonitor, LockHolder, heartbeat, held
from moacompress.core.progress import SILENT, Progress
from moacompress.search.deadline import Deadline
from moacompress.search.measure.storages import guarded, open_storage, shown

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CLAIMS = "-claims"
"""End of the name of the study that a search's workers and claims are in."""
WORKER = "worker:"
"""Begins the name of a worker's own trial; its token follows."""
KEEP_SECONDS = 5.0
"""Seconds after which the numbers so far are kept: a killed worker loses at most those and the measurement that it was at.
Keeping each alone would take much of the time of short ones."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds after which a worker that waits looks again: more each time."""
SAID_AFTER = 5.0
"""Seconds of waiting after which it says so."""


class ClaimLost(Exception):
    """This worker was taken for dead, and another one has its claim."""


@dataclass
class Claim:
    """What this worker measures.

    Attributes:
        name: of what is measured.
        trial_id: of the trial that stands for it.
        number: of that trial in the study.
        numbers: measured so far, those of earlier claims of the name included; the storage has the first `kept` of them.
        kept_at: when they were kept, by `time.monotonic`.
        ended: whether it is finished or released.
    """

    name: str
    trial_id: int
    number: int = -1
    numbers: list[float] = field(default_factory=list)
    kept: int = 0
    kept_at: float = field(default_factory=lambda: time.monotonic())
    ended: bool = False


class Claims:
    """The claims in one study, as one worker (`holder`, by default this process) makes them.

    Args:
        where: the storage, as it may be shown.
        progress: told where this worker waits for others.
        monotonic: the clock that the silence of others is measured by, in seconds.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        where: str,
        progress: Progress = SILENT,
        holder: LockHolder | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.storage, self.study_id, self.where = storage, study_id, where
        self.holder = holder or LockHolder.new()
        self._lost_races = 0
        self._open: set[int] = set()  # numbers of the claims that this worker has
        self._progress = progress
        self._heartbeats = HeartbeatMonitor(monotonic)
        self._seen: list[FrozenTrial] = []
        self._waited = 0.0

    def trials(self, fresh: bool = True) -> list[FrozenTrial]:
        """Returns the trials of claims and workers by their numbers: as they are (`fresh`), or were at the last look."""
        if fresh:
            with guarded(self.where):
                self._seen = self.storage.get_all_trials(self.study_id, deepcopy=False)
        return self._seen

    def result(self, name: str) -> Any:
        """Returns the result under a name, or None."""
        done = (trial.user_attrs["result"] for trial in self._named(name) if trial.state.name == "COMPLETE")
        return next(done, None)

    def acquire_first(self, names: Sequence[str]) -> Claim | None:
        """Claims the first of some names that is neither done nor a live worker's; None where there is none."""
        self.trials()
        taken = {trial.user_attrs["name"] for trial in self._seen if self._counts(trial)}
        free, at = [name for name in names if name not in taken], 0
        while at < len(free):
            claim = self._claim(free[at])
            if claim is not None:
                return claim
            at += max(1, self._lost_races)  # each of those that come at the same moment goes to another one
        return None

    def acquire(self, name: str) -> Claim | None:
        """Claims what is to be measured; None where it is done already, or a live worker is at it."""
        return None if self._is_taken(self._named(name)) else self._claim(name)

    def add_number(self, claim: Claim, number: float) -> None:
        """Adds a number that was measured; it is kept within `KEEP_SECONDS`, or when the claim is released.

        Raises:
            ClaimLost: another worker has it.
        """
        claim.numbers.append(number)
        if time.monotonic() - claim.kept_at >= KEEP_SECONDS:
            self._keep_numbers(claim)

    def note(self, claim: Claim, **notes: Any) -> None:
        """Keeps JSON values with a claim.

        Raises:
            ClaimLost: another worker has it.
        """
        with self._changing():
            for name, value in notes.items():
                self.storage.set_trial_user_attr(claim.trial_id, name, value)

    def finish(self, claim: Claim, result: Any) -> None:
        """Ends a claim with a JSON value, which `result` returns; it is never measured again.

        Raises:
            ClaimLost: another worker has it.
        """
        from optuna.trial import TrialState

        self.note(claim, result=result)
        with self._changing():
            self.storage.set_trial_state_values(claim.trial_id, TrialState.COMPLETE, [0.0])
        claim.ended = True
        self._open.discard(claim.number)

    def release(self, claim: Claim) -> None:
        """Gives up a claim for others to take, with what was measured of it, unless it has ended."""
        if not claim.ended:
            claim.ended = True
            self._open.discard(claim.number)
            with suppress(Exception):  # where the storage is gone this worker's claims go with it
                with suppress(ClaimLost):
                    self._keep_numbers(claim)
                self._fail(claim.trial_id)

    def once(self, name: str, measure: Callable[[Claim], Any]) -> Any:
        """Returns the JSON value that `measure` comes to, which one worker calls once; None where another one is at it."""
        claim = self.acquire(name)
        if claim is None:
            return self.result(name)
        try:
            found = measure(claim)
            self.finish(claim, found)
        except ClaimLost:
            return None
        finally:
            self.release(claim)
        return found

    def together(
        self, names: Sequence[str], attempt: Callable[[int], Result | None], deadline: Deadline
    ) -> list[Result]:
        """Returns the results of several measurements, which workers share: each is made by one of them.

        None of them depends on another. `attempt` makes one, by its number, or returns what was found before; None where
        another worker is at it.

        Raises:
            TimeUp: the time is up, and others are at what is missing.
        """
        found: dict[int, Result] = {}
        while len(found) < len(names):
            before = len(found)
            for number in range(len(names)):
                result = None if number in found else attempt(number)
                if result is not None:
                    found[number] = result
            if len(found) == before:
                deadline.check()
                self.pause([name for number, name in enumerate(names) if number not in found], deadline.left)
        return [found[number] for number in range(len(names))]

    def pause(self, names: Sequence[str], longest: float | None = None) -> None:
        """Waits a moment, at most `longest` seconds, for others to measure something; says for whom where it takes long."""
        seconds = min(max(FIRST_PAUSE, self._waited), LONGEST_PAUSE)
        seconds = seconds if longest is None else min(seconds, longest)
        if self._waited < SAID_AFTER <= self._waited + seconds:
            running = [trial for trial in self.trials() if trial.state.name == "RUNNING"]
            holders = {holder_of(trial) for trial in running if trial.user_attrs["name"] in names}
            who = ", ".join(sorted(f"process {holder.pid} on {holder.host}" for holder in holders))
            text = f"waiting for what {who or 'another worker'} measures"
            logger.info(text)
            self._progress.say(text)
        time.sleep(seconds)
        self._waited += seconds

    @contextmanager
    def joined(self, trials: int | None) -> Iterator[None]:
        """Shows this process as a worker that wants so many trials, with its heartbeat, as long as the block runs."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        def announce() -> int:
            return self._new_trial(WORKER + self.holder.token, trials=trials, heard=time.time())

        with held(self.holder):
            trial_id = announce()

            def beat() -> None:
                nonlocal trial_id
                try:
                    self.storage.set_trial_user_attr(trial_id, "heard", time.time())
                except UpdateFinishedTrialError:  # it was taken for dead
                    trial_id = announce()

            try:
                with heartbeat(beat):
                    yield
            finally:
                with suppress(Exception):  # what went wrong with the storage was said, or is no reason to fail any more
                    self.storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])

    def fail_running(self) -> None:
        """Marks whatever is claimed as failed, but for living processes of this machine: no other one can be at work."""
        with guarded(self.where):
            for trial in self.trials():
                if trial.state.name == "RUNNING" and not holder_of(trial).is_alive(lambda: math.inf):
                    self._fail(self._trial_id(trial))

    def _named(self, name: str) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.user_attrs["name"] == name]

    def _trial_id(self, trial: FrozenTrial) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, trial.number)

    def _claim(self, name: str) -> Claim | None:
        """Claims what seems to be free; None where another worker was faster."""
        claim, self._lost_races = Claim(name, self._new_trial(name)), 0
        try:
            named = self._named(name)
            claim.number = max(trial.number for trial in named if holder_of(trial) == self.holder)
            self._open.add(claim.number)
            earlier = [trial for trial in named if trial.number < claim.number]
            if self._is_taken(earlier):
                self._lost_races = sum(trial.state.name != "FAIL" for trial in earlier)
                self.release(claim)
                return None
            # looked up again, as a dead worker's last numbers may have come after the last look
            kept = (trial.user_attrs.get("numbers", ()) for trial in (self._named(name) if earlier else ()))
            claim.numbers = list(map(float, max(kept, key=len, default=())))
        except BaseException:
            self.release(claim)
            raise
        claim.kept = len(claim.numbers)
        self._waited = 0.0
        return claim

    def _new_trial(self, name: str, **notes: Any) -> int:
        """Adds a running trial of this worker and returns its id."""
        from optuna.trial import TrialState, create_trial

        notes = {"name": name, "holder": self.holder.to_dict(), **notes}
        with guarded(self.where):
            return self.storage.create_new_trial(
                self.study_id, create_trial(state=TrialState.RUNNING, user_attrs=notes)
            )

    def _is_taken(self, trials: Sequence[FrozenTrial]) -> bool:
        """Returns whether one of the trials of a name is finished, or a live worker's; those of dead ones fail."""
        with guarded(self.where):
            return any(
                self._counts(trial) or (trial.state.name == "RUNNING" and self._finished(self._trial_id(trial)))
                for trial in trials
            )

    def _finished(self, trial_id: int) -> bool:
        """Marks a dead worker's trial as failed; returns whether it has been finished meanwhile."""
        return not self._fail(trial_id) and self.storage.get_trial(trial_id).state.name == "COMPLETE"

    def _counts(self, trial: FrozenTrial) -> bool:
        """Returns whether a claim is finished, or its worker alive, as far as the last look says."""
        if trial.state.name != "RUNNING":
            return trial.state.name == "COMPLETE"
        holder = holder_of(trial)
        if holder == self.holder:
            return trial.number in self._open  # what it could not release is not its own any more
        own = [worker for worker in self._seen if worker.user_attrs["name"] == WORKER + holder.token]
        if own and not any(worker.state.name == "RUNNING" for worker in own):
            return False  # it ended, or was marked as failed

        def silence() -> float:
            return self._heartbeats.silence(holder.token, own[-1].user_attrs["heard"] if own else 0.0)

        return holder.is_alive(silence)

    def _fail(self, trial_id: int) -> bool:
        """Marks a trial as failed; returns False where it has ended already."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False
        return True

    def _keep_numbers(self, claim: Claim) -> None:
        if len(claim.numbers) > claim.kept:
            self.note(claim, numbers=list(claim.numbers))
        claim.kept, claim.kept_at = len(claim.numbers), time.monotonic()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        from optuna.exceptions import UpdateFinishedTrialError

        with guarded(self.where):
            try:
                yield
            except UpdateFinishedTrialError as error:
                raise ClaimLost from error


def holder_of(trial: FrozenTrial) -> LockHolder:
    """Returns the worker whose trial this is."""
    return LockHolder(**trial.user_attrs["holder"])


def is_alive(worker: FrozenTrial) -> bool:
    """Returns whether the worker of a trial of its own lives; of another machine's, the clocks of both decide."""
    heartbeat = worker.user_attrs["heard"]
    return worker.state.name == "RUNNING" and holder_of(worker).is_alive(lambda: time.time() - heartbeat)


@contextmanager
def open_claims(
    storage: str | None,
    name: str,
    *,
    alone: bool,
    from_scratch: bool = False,
    trials: int | None = None,
    progress: Progress = SILENT,
) -> Iterator[Claims]:
    """Makes this process a worker of a search as long as the block runs, and yields the claims on what is measured.

    The name is of the search's study; those of its steps begin with it. Where the storage is of one process at a time, whose
    lock this one holds (`alone`), whatever is claimed is a dead one's. `from_scratch` forgets what was measured. `trials` is
    how many this worker wants, for whoever asks how far the search is.

    Raises:
        RecipeError: `storage` is none.
        InUseError: other workers are alive, and this one is to begin from scratch.
        ArtefactError: the storage cannot be used.
    """
    import optuna

    where = shown(storage)
    backend = open_storage(storage)

    def claims() -> Claims:
        with guarded(where):
            study = optuna.create_study(storage=backend, study_name=name + CLAIMS, load_if_exists=True)
            return Claims(backend, backend.get_study_id_from_name(study.study_name), where, progress)

    found = claims()
    if alone:
        found.fail_running()
    if from_scratch:
        others = [trial for trial in found.trials() if trial.user_attrs["name"].startswith(WORKER) and is_alive(trial)]
        if others:
            raise InUseError(holder_of(others[0]).refusal(f"the study {name} in {where}", "leave out --overwrite"))
        with guarded(where):
            for study in optuna.get_all_study_names(backend):
                if study == name or study.startswith(f"{name}-"):
                    optuna.delete_study(study_name=study, storage=backend)
        found = claims()
    with found.joined(trials):
        yield found

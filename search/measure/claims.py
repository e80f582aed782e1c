"""Claims: which worker measures what, so that nothing is measured twice and nothing is lost.

Everything that is measured has a name. A worker that is about to measure it adds a trial to a study, with that name and its
own, and has the claim if no trial of that name with a lower number is done or is a live worker's; otherwise it withdraws.
So two that claim in the same moment agree on who has it, as trials get their numbers one after the other. The numbers that
are measured are noted every few seconds, and what has come of them when the trial ends: it then cannot be changed any more. A
claim of a dead worker is marked as failed, and another one made, which begins with the numbers that were there. A worker that
was held for dead and comes back finds its claim failed and leaves its result: a name has at most one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moacompress.core.errors import InUseError
from moacompress.core.lock_holders import SILENT_SECONDS, readable_age
from moacompress.core.progress import SILENT, Progress
from moacompress.search.measure.storages import guarded, open_storage, shown
from moacompress.search.measure.workers import Worker, Workers

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

CHOOSE_STORAGE = "choose another one with --storage"
CLAIMS = "-claims"
"""End of the name of the study that a search's workers and claims are in."""
PIECE = 16_000
"""Characters of the longest text that is written as one: MySQL's are of 65,535 bytes at most."""
KEEP_SECONDS = 5.0
"""Seconds of measuring after which the numbers so far are kept: what a worker that is killed loses at most, besides the
measurement that it was at. Keeping each alone would take much of the time of short ones."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds after which a worker that waits looks again: more each time."""
LOOK_SECONDS = 5.0
"""Seconds after which it is looked again whether a worker elsewhere has been heard of."""
SAID_AFTER = 5.0
"""Seconds of waiting after which it says so."""


class ClaimLost(Exception):
    """This worker was held for dead, and another one has its claim."""


@dataclass(frozen=True)
class Claim:
    """What one worker measures.

    Attributes:
        name: of what is measured.
        trial_id: of the trial that stands for it.
        begun: numbers that earlier claims of the name have measured, in order.
    """

    name: str
    trial_id: int
    begun: tuple[float, ...] = ()


class Claims:
    """The claims in one study.

    Args:
        storage: where it is.
        study_id: of the study.
        workers: of the search.
        where: the storage, as it may be shown.
        progress: told where a worker waits for others.
    """

    def __init__(
        self, storage: BaseStorage, study_id: int, workers: Workers, where: str, progress: Progress = SILENT
    ) -> None:
        self.storage, self.study_id, self.workers, self.where = storage, study_id, workers, where
        self._progress = progress
        self.lost_races = 0
        self._mine: set[int] = set()
        self._unkept: dict[int, list[float]] = {}
        self._kept_at = 0.0
        self._pause, self._waited, self._said = FIRST_PAUSE, 0.0, False
        self._seen: list[FrozenTrial] | None = None

    def trials(self, fresh: bool = True) -> list[FrozenTrial]:
        """Returns the trials that stand for claims, in the order of their numbers.

        Args:
            fresh: look into the storage; otherwise they are as they were at the last look.
        """
        return [trial for trial in self._look(fresh) if "name" in trial.user_attrs]

    def result(self, name: str) -> Any:
        """Returns what was kept under a name, or None."""
        done = next((trial for trial in self._named(name) if trial.state.name == "COMPLETE"), None)
        return None if done is None else attributes(done).get("result")

    def free(self, names: Sequence[str]) -> list[str]:
        """Returns the names that are neither done nor claimed by a live worker, as far as the last look says."""
        taken, alive = set(), {self.workers.token: True}
        for trial in self.trials(fresh=False):
            name, token = trial.user_attrs["name"], trial.user_attrs.get("worker", "")
            if trial.state.name == "RUNNING" and token not in alive:
                alive[token] = self._alive(token)
            if trial.state.name == "COMPLETE" or (trial.state.name == "RUNNING" and alive[token]):
                taken.add(name)
        return [name for name in names if name not in taken]

    def acquire(self, name: str) -> Claim | None:
        """Claims what is to be measured; None where it is measured already, or a live worker is at it.

        Where others claim it in the same moment, `lost_races` says how many of them were faster.
        """
        from optuna.trial import TrialState, create_trial

        self.lost_races = 0
        seen = any(trial.state.name != "FAIL" for trial in self._named(name, fresh=False))
        if seen and self._taken(self._named(name)):
            return None
        notes = {"name": name, "worker": self.workers.token}
        with guarded(self.where):
            trial_id = self.storage.create_new_trial(
                self.study_id, create_trial(state=TrialState.RUNNING, user_attrs=notes)
            )
        self._mine.add(trial_id)
        claim = Claim(name, trial_id)
        try:
            named = self._named(name)
            number = max(trial.number for trial in named if trial.user_attrs.get("worker") == self.workers.token)
            earlier = [trial for trial in named if trial.number < number]
            if self._taken(earlier):
                self.lost_races = len(earlier)
                self.release(claim)
                return None
        except BaseException:
            self.release(claim)
            raise
        self._pause, self._waited, self._said = FIRST_PAUSE, 0.0, False
        self._kept_at = time.monotonic()
        # a dead worker may have kept a number between the look at its claim and the end of that
        later = any(trial.state.name == "RUNNING" for trial in earlier)
        return Claim(name, trial_id, _begun(self._named(name) if later else earlier))

    def put(self, claim: Claim, numbers: Sequence[float]) -> None:
        """Keeps the numbers that a claim is about, as far as they are measured; those of the last seconds later on.

        Raises:
            ClaimLost: another worker has it.
        """
        self._unkept[claim.trial_id] = list(numbers)
        if time.monotonic() - self._kept_at >= KEEP_SECONDS:
            self._keep_numbers(claim)

    def _keep_numbers(self, claim: Claim) -> None:
        numbers = self._unkept.pop(claim.trial_id, None)
        if numbers is not None:
            self.note(claim, numbers=numbers)
        self._kept_at = time.monotonic()

    def note(self, claim: Claim, **notes: Any) -> None:
        """Keeps JSON values with a claim.

        Raises:
            ClaimLost: another worker has it.
        """
        with self._changing():
            for name, value in notes.items():
                for key, piece in _pieces(name, value).items():
                    self.storage.set_trial_user_attr(claim.trial_id, key, piece)

    def finish(self, claim: Claim, values: Sequence[float], **notes: Any) -> None:
        """Ends a claim with what came of it; from then on it is never measured again.

        Args:
            claim: of this worker.
            values: of its trial, one for every objective of the study.
            **notes: JSON values; `result` is what `Claims.result` returns.

        Raises:
            ClaimLost: another worker has it.
        """
        from optuna.trial import TrialState

        self._unkept.pop(claim.trial_id, None)
        self.note(claim, **notes)
        with self._changing():
            self.storage.set_trial_state_values(claim.trial_id, TrialState.COMPLETE, list(values))
        self._mine.discard(claim.trial_id)

    def release(self, claim: Claim) -> None:
        """Gives up a claim for others to take, with what was measured of it, unless it is finished."""
        if claim.trial_id in self._mine:
            self._mine.discard(claim.trial_id)
            with suppress(Exception):  # where the storage is gone this worker's claims go with it
                with suppress(ClaimLost):
                    self._keep_numbers(claim)
                self._fail(claim.trial_id)

    def keep(self, name: str, value: Any) -> None:
        """Keeps a JSON value under a name that nobody else measures."""
        claim = self.acquire(name)
        if claim is not None:
            with suppress(ClaimLost):
                self.finish(claim, [0.0], result=value)

    def pause(self, names: Sequence[str], longest: float | None = None) -> None:
        """Waits a moment for what others measure; says whom for where it takes long.

        Args:
            names: of what is waited for.
            longest: seconds that it may take.
        """
        seconds = self._pause if longest is None else min(self._pause, longest)
        if self._waited >= SAID_AFTER and not self._said:
            self._said = True
            text = self._waiting_for(names)
            logger.info(text)
            self._progress.say(text)
        time.sleep(seconds)
        self._waited += seconds
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _waiting_for(self, names: Sequence[str]) -> str:
        """Returns the sentence that says whom this worker waits for."""
        tokens = {
            trial.user_attrs["worker"]
            for trial in self.trials()
            if trial.state.name == "RUNNING" and trial.user_attrs["name"] in set(names)
        }
        asked = [self.workers.by_token(token, self._look(fresh=False)) for token in sorted(tokens)]
        found = [worker for worker in asked if worker is not None]
        who = ", ".join(f"process {worker.holder.pid} on {worker.holder.host}" for worker in found)
        return f"waiting for what {who or 'another worker'} measures"

    def _look(self, fresh: bool = True) -> list[FrozenTrial]:
        """Returns all trials of the study, workers and claims."""
        if fresh or self._seen is None:
            with guarded(self.where):
                self._seen = self.storage.get_all_trials(self.study_id, deepcopy=False)
        return self._seen

    def _named(self, name: str, fresh: bool = True) -> list[FrozenTrial]:
        return [trial for trial in self.trials(fresh) if trial.user_attrs["name"] == name]

    def _alive(self, token: str) -> bool:
        """Returns whether a worker is alive, as far as the last look says of one of another machine."""
        with guarded(self.where):
            return self.workers.alive(token, self._look(fresh=False))

    def _taken(self, trials: Sequence[FrozenTrial]) -> bool:
        """Returns whether one of the trials of a name is finished, or a live worker's; those of dead ones fail."""
        for trial in trials:
            if trial.state.name == "COMPLETE":
                return True
            if trial.state.name != "RUNNING":
                continue
            with guarded(self.where):
                trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, trial.number)
                token = trial.user_attrs.get("worker", "")
                left = token == self.workers.token and trial_id not in self._mine  # by an interrupt
                if not left and self._alive(token):
                    return True
                if not self._fail(trial_id) and self.storage.get_trial(trial_id).state.name == "COMPLETE":
                    return True  # it has ended meanwhile
        return False

    def _fail(self, trial_id: int) -> bool:
        """Marks a trial as failed; returns False where it has ended already."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False
        return True

    @contextmanager
    def _changing(self) -> Iterator[None]:
        from optuna.exceptions import UpdateFinishedTrialError

        with guarded(self.where):
            try:
                yield
            except UpdateFinishedTrialError as error:
                raise ClaimLost from error


def attributes(trial: FrozenTrial) -> dict[str, Any]:
    """Returns the JSON values that are kept with a trial, long ones put together again."""
    found = dict(trial.user_attrs)
    for name in [key.removesuffix(":0") for key in found if key.endswith(":0")]:
        pieces: list[str] = []
        while f"{name}:{len(pieces)}" in found:
            pieces.append(found.pop(f"{name}:{len(pieces)}"))
        found[name] = json.loads("".join(pieces))
    return found


def _pieces(name: str, value: Any) -> dict[str, Any]:
    """Returns a JSON value as it is kept: a long one in pieces, `name:0` last, without which it is not read."""
    text = json.dumps(value)
    if len(text) <= PIECE:
        return {name: value}
    parts = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    return {f"{name}:{number}": parts[number] for number in reversed(range(len(parts)))}


def _begun(trials: Sequence[FrozenTrial]) -> tuple[float, ...]:
    """Returns the most numbers that a claim of a name has kept; the first of those that kept as many counts."""
    kept = (attributes(trial).get("numbers", ()) for trial in trials)
    return tuple(map(float, max(kept, key=len, default=())))


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
    """Makes this process a worker of a search as long as the block runs.

    Args:
        storage: as that of `open_storage`.
        name: of the search's study; those of its steps begin with it.
        alone: refuse to work beside others, and refuse them; then `storage` is of one process at a time, whose lock this
            one holds.
        from_scratch: forget what was measured.
        trials: how many this worker wants, for whoever asks how far the search is.
        progress: told where this worker waits for others.

    Yields:
        The claims on what is measured beside trials.

    Raises:
        RecipeError: `storage` is none.
        InUseError: other workers are alive and this one is to be alone or to begin from scratch, or one of them is alone.
        ArtefactError: the storage cannot be used.
    """
    import optuna

    where = shown(storage)
    what = f"the study {name} in {where}"

    def claims() -> Claims:
        with guarded(where):
            study = optuna.create_study(storage=backend, study_name=name + CLAIMS, load_if_exists=True)
            study_id = backend.get_study_id_from_name(study.study_name)
            return Claims(backend, study_id, Workers(backend, study_id), where, progress)

    backend = open_storage(storage)
    found = claims()
    if from_scratch:
        _refuse(_living(found, alone, lambda other: True, progress), what, "leave out --overwrite")
        with guarded(where):
            _forget(backend, name)
        found = claims()
    with _joined(found, alone, trials):
        _refuse(_living(found, alone, lambda other: alone or other.alone, progress), what, CHOOSE_STORAGE)
        yield found


@contextmanager
def _joined(claims: Claims, alone: bool, trials: int | None) -> Iterator[None]:
    """Makes this process a worker; only what the storage says of that is said as of the storage."""
    joined = claims.workers.joined(alone, trials)
    with guarded(claims.where):
        joined.__enter__()
    try:
        yield
    finally:
        joined.__exit__(None, None, None)


def _living(claims: Claims, alone: bool, in_the_way: Callable[[Worker], bool], progress: Progress) -> list[Worker]:
    """Returns the workers in the way that live; waits where only time tells, of one elsewhere that has not been heard of.

    Args:
        claims: of the search.
        alone: whether this process holds a lock without which no other would have been alone.
        in_the_way: whether a worker matters.
        progress: told what is waited for.
    """
    workers, said = claims.workers, False
    while True:
        with guarded(claims.where):
            others = [other for other in workers.others() if in_the_way(other)]
            if alone:
                for other in [one for one in others if one.alone and not one.holder.is_here]:
                    workers.mark_dead(other)  # by a reboot, or with its container or machine
                    others.remove(other)
        heard = [other for other in others if workers.is_heard(other)]
        if heard or not others:
            return heard
        if not said:
            said, holder = True, others[0].holder
            progress.say(
                f"waiting to hear of process {holder.pid} on {holder.host}, for {readable_age(SILENT_SECONDS)} at most: it was "
                "at work on this search when it was last heard of"
            )
        time.sleep(LOOK_SECONDS)


def _refuse(others: Sequence[Worker], what: str, choose: str) -> None:
    if others:
        more = "" if len(others) == 1 else f" ({len(others)} workers are there)"
        raise InUseError(others[0].holder.refusal(what + more, choose))


def _forget(storage: BaseStorage, name: str) -> None:
    """Deletes a study and those whose names begin with its name."""
    import optuna

    for found in optuna.get_all_study_names(storage):
        if found == name or found.startswith(f"{name}-"):
            optuna.delete_study(study_name=found, storage=storage)

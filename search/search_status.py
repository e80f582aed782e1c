"""How far the searches in a storage are: their workers, their trials and what they have found. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.core.errors import ArtefactError
from moacompress.core.lock_holders import LockHolder, readable_age
from moacompress.core.tables import readable_seconds
from moacompress.search.measure.claims import CLAIMS, WORKER, holder_of, is_alive
from moacompress.search.measure.storages import guarded, journal_file, open_storage, quiet_optuna, shown
from moacompress.search.measure.study_storage import TRIAL

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class WorkerStatus:
    """One worker of a search.

    Attributes:
        host: its machine.
        pid: its process.
        state: `alive`, `dead` or `ended`. One of another machine is dead after five minutes without a heartbeat, by the
            clocks of both; workers themselves compare no clocks.
        silence: seconds since its last heartbeat.
        measures: names of what it has claimed.
    """

    host: str
    pid: int
    state: str
    silence: float
    measures: tuple[str, ...]


@dataclass(frozen=True)
class SearchStatus:
    """One search of a storage.

    Attributes:
        study: name of its study.
        workers: all that it has had, in the order of their coming.
        trials: how many are `done`, `running` and `failed`, and how many are `wanted` (None where no worker says it). Failed
            are those whose worker died or stopped; their index is tried again.
        measurements: the same of what is measured beside trials, without `wanted`.
        best_kl: lowest mean KL of a trial that was measured on all samples, nats; None where there is none.
        best_trial: its index.
        seconds_left: about how long the trials that are left will take the workers that are alive; None where nothing is known.
    """

    study: str
    workers: tuple[WorkerStatus, ...]
    trials: dict[str, int | None]
    measurements: dict[str, int]
    best_kl: float | None
    best_trial: int | None
    seconds_left: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Returns what a person reads."""
        trials, wanted = self.trials, self.trials["wanted"]
        of = "" if wanted is None else f" of {wanted}"
        found = [
            f"{self.study}",
            f"  trials: {trials['done']}{of} done, {trials['running']} running, {trials['failed']} failed and tried again",
            f"  other measurements: {self.measurements['done']} done, {self.measurements['running']} running",
        ]
        if self.best_kl is not None:
            found.append(f"  best so far: {self.best_kl:.3g} nats (trial {self.best_trial})")
        if self.seconds_left is not None:
            found.append(f"  trials that are left: about {readable_seconds(self.seconds_left)}")
        for worker in self.workers:
            at = f", at {len(worker.measures)} measurements" if worker.measures else ""
            heartbeat = f", heartbeat {readable_age(worker.silence)} ago" if worker.state != "ended" else ""
            found.append(f"  process {worker.pid} on {worker.host}: {worker.state}{heartbeat}{at}")
        return found


def search_status(storage: str) -> list[SearchStatus]:
    """Returns how far every search of a storage, a journal file or a database URL, is.

    Raises:
        RecipeError: `storage` is neither.
        ArtefactError: it is not there, cannot be read, or holds no search.
    """
    import optuna

    where = shown(storage)
    if not _is_there(storage):
        raise ArtefactError(f"there is no study storage {where}; a search makes it with --storage {where}")
    with quiet_optuna():
        opened = open_storage(storage)
        with guarded(where):
            names = optuna.get_all_study_names(opened)
            searches = [name.removesuffix(CLAIMS) for name in names if name.endswith(CLAIMS)]
            found = [_status(opened, name) for name in searches if name in names]
    if not found:
        raise ArtefactError(f"{where} holds no search that has begun")
    return found


def _is_there(storage: str) -> bool:
    """Returns whether a storage that is a file is there; of a server nothing is known yet."""
    if "://" not in storage:
        return journal_file(storage).exists()
    return not storage.startswith("sqlite") or Path(storage.partition("///")[2].partition("?")[0]).is_file()


def _status(storage: BaseStorage, name: str) -> SearchStatus:
    found = storage.get_all_trials(storage.get_study_id_from_name(name + CLAIMS), deepcopy=False)
    workers = [trial for trial in found if trial.user_attrs["name"].startswith(WORKER)]
    trials = [trial for trial in found if trial.user_attrs["name"].startswith(name + TRIAL)]
    beside = [trial for trial in found if not trial.user_attrs["name"].startswith((WORKER, name + TRIAL))]
    alive = [holder_of(worker) for worker in workers if is_alive(worker)]
    wanted = max((worker.user_attrs["trials"] or 0 for worker in workers), default=0) or None
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    measured = [(trial.user_attrs["result"]["notes"], trial.user_attrs["name"]) for trial in done]
    whole = [(notes["harms"], name) for notes, name in measured if notes.get("harms") and not notes["pruned"]]
    best = min(((float(np.mean(kls)), int(name.rpartition(":")[2])) for kls, name in whole), default=(None, None))
    return SearchStatus(
        study=name,
        workers=tuple(_worker(worker, [*trials, *beside], alive) for worker in workers),
        trials={**_counts(trials, alive), "wanted": wanted},
        measurements=_counts(beside, alive),
        best_kl=best[0],
        best_trial=best[1],
        seconds_left=_seconds_left(done, wanted, len(alive)),
    )


def _worker(worker: FrozenTrial, claims: Sequence[FrozenTrial], alive: Sequence[LockHolder]) -> WorkerStatus:
    holder = holder_of(worker)
    state = "alive" if holder in alive else "ended" if worker.state.name == "COMPLETE" else "dead"
    running = [trial for trial in claims if trial.state.name == "RUNNING" and holder_of(trial) == holder]
    measures = tuple(trial.user_attrs["name"] for trial in running if state == "alive")
    return WorkerStatus(holder.host, holder.pid, state, max(0.0, time.time() - worker.user_attrs["heard"]), measures)


def _counts(trials: Sequence[FrozenTrial], alive: Sequence[LockHolder]) -> dict[str, int]:
    """Returns how many are done, are run by live workers, and failed; those of dead ones will be taken over."""
    done = sum(trial.state.name == "COMPLETE" for trial in trials)
    running = sum(trial.state.name == "RUNNING" and holder_of(trial) in alive for trial in trials)
    return {"done": done, "running": running, "failed": len(trials) - done - running}


def _seconds_left(done: Sequence[FrozenTrial], wanted: int | None, alive: int) -> float | None:
    """Returns about how many seconds the trials that are left take; None where nothing is known."""
    times = [trial.duration.total_seconds() for trial in done if trial.duration is not None]
    if not times or wanted is None or not alive:
        return None
    return float(np.mean(times)) * max(0, wanted - len(done)) / alive

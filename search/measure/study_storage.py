"""The study storage of a search: an Optuna study that holds everything measured, so that nothing is measured twice.

A search that was killed and started again finds its finished trials, ablations and baselines here and resumes as if it
had never stopped: the sampler is made again for every trial from the seed and the number of finished trials, so that no
random state is lost. One process works on a study at a time, its owner: a trial marked as running when it is opened was
killed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from moacompress.core.artefact_names import holder_of_study, holders_of_studies
from moacompress.core.errors import ArtefactError, RecipeError
from moacompress.core.lock_holders import LockHolder, heard_of, held, own, release_dead

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

JOURNAL_SUFFIXES = (".log", ".journal")
STARTUP_TRIALS = 5
"""Trials, the first included, before the Gaussian process has anything to say."""
CHOOSE_STORAGE = "choose another one with --storage"
LOCK_GRACE = 5
"""Seconds after which the lock of a killed process is taken over; a lock is held for milliseconds."""


class StudyStorage:
    """What one search has measured so far.

    Args:
        storage: None for memory, a journal file ending in .log or .journal, or a database URL.
        name: name of the study.
        profile: fingerprint of the profile that the study belongs to.
        distributions: the search parameters.
        neutral: search parameters of the first trial.
        seed: of the sampler.
        starts: parameters that are tried right after, such as those that won at another budget.
        objectives: numbers that a trial has, all to be small; only with one are trials given up half-way.

    Raises:
        RecipeError: `storage` is none of these.
        ArtefactError: the storage cannot be used, or holds a study of another profile under this name.
    """

    def __init__(
        self,
        storage: str | None,
        name: str,
        profile: str,
        distributions: Mapping[str, BaseDistribution],
        neutral: Mapping[str, float],
        seed: int,
        starts: Sequence[Mapping[str, float]] = (),
        objectives: int = 1,
    ) -> None:
        self._where = shown(storage)
        self._distributions, self._seed = dict(distributions), seed
        with self._guard():
            self._study = self._open(storage, name, profile, objectives)
            self._fail_stale()
            if not self._study.get_trials(deepcopy=False, states=_states("COMPLETE", "WAITING")):
                for parameters in (neutral, *starts):
                    self._study.enqueue_trial(dict(parameters), skip_if_exists=True)

    def recall(self, name: str) -> Any:
        """Returns what `remember` kept under this name, or None."""
        with self._guard():
            return self._study.user_attrs.get(name)

    def remember(self, name: str, value: Any) -> None:
        """Keeps a JSON value."""
        with self._guard():
            self._study.set_user_attr(name, value)

    def begun(self, name: str) -> list[float]:
        """Returns the numbers that `stop` kept under this name; none where nothing was stopped."""
        return [float(number) for number in self.recall(f"begun:{name}") or ()]

    def stop(self, name: str, numbers: Sequence[float]) -> None:
        """Keeps the first numbers of a list whose others are left to the next run."""
        if list(numbers) != self.begun(name):
            self.remember(f"begun:{name}", list(numbers))

    def finished(self) -> list[FrozenTrial]:
        """Returns the finished trials, in order; their place in the list is their index."""
        with self._guard():
            return self._study.get_trials(deepcopy=False, states=_states("COMPLETE"))

    def importances(self) -> dict[str, float]:
        """Returns the share of the variation between trials that goes with each parameter; empty where there are too few."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        if len({trial.value for trial in self.finished()}) < STARTUP_TRIALS:
            return {}
        try:
            with self._guard():
                found = get_param_importances(self._study, evaluator=PedAnovaImportanceEvaluator())
        except (RuntimeError, ArtefactError):  # search parameters that never changed
            return {}
        return {name: float(share) for name, share in found.items()}

    def ask(self) -> Trial:
        """Starts the next trial; its `params` are the search parameters."""
        from optuna.samplers import GPSampler

        index = len(self.finished())
        seed = int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0])
        with self._guard():
            self._study.sampler = GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False)
            return self._study.ask(self._distributions)

    def report(self, trial: Trial, value: float, step: int) -> bool:
        """Keeps the value of one sample; returns whether the trial is hopeless already."""
        with self._guard():
            trial.report(value, step)
            return trial.should_prune()

    def tell(self, trial: Trial, value: float | Sequence[float], **attributes: Any) -> None:
        """Finishes a trial with its value, or one for every objective; from then on it is never repeated."""
        with self._guard():
            for name, attribute in attributes.items():
                trial.set_user_attr(name, attribute)
            self._study.tell(trial, value)

    def _open(self, storage: str | None, name: str, profile: str, objectives: int) -> Study:
        import optuna

        study = optuna.create_study(
            storage=_storage(storage),
            study_name=name,
            directions=["minimize"] * objectives,
            pruner=optuna.pruners.WilcoxonPruner(p_threshold=0.1),
            load_if_exists=True,
        )
        holder = study.user_attrs.get("profile")
        if holder is None:
            study.set_user_attr("profile", profile)
        elif holder != profile:
            raise ArtefactError(
                f"{self._where} holds the study {name} of another profile ({holder}, this one is {profile}); choose "
                "another storage"
            )
        return study

    def _fail_stale(self) -> None:
        """Marks the trials of a killed process as failed and queues their search parameters again."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=_states("RUNNING")):
            parameters = trial.system_attrs.get("fixed_params") or trial.params
            self._study.tell(trial.number, state=TrialState.FAIL)
            # incomplete search parameters need no queue: the sampler draws the same ones again
            if set(parameters) == set(self._distributions):
                self._study.enqueue_trial(parameters)

    def _guard(self) -> AbstractContextManager[None]:
        return _guarded(self._where)


@contextmanager
def own_study(storage: str | None, name: str, objectives: int = 1, from_scratch: bool = False) -> Iterator[None]:
    """Makes this process the lock holder of a study, and of those whose names begin with its name, as long as the block runs.

    Args:
        storage: as that of a `StudyStorage`.
        name: name of the study.
        objectives: numbers that a trial has.
        from_scratch: forget what is in them.

    Raises:
        RecipeError: `storage` is none.
        ArtefactError: a live process is its lock holder, or the storage cannot be used.
    """
    what = f"the study {name} in {shown(storage)}"
    if storage is None:
        yield
    elif "://" in storage:
        with _owned_in_database(storage, name, what, objectives, from_scratch):
            yield
    else:
        journal = _journal_file(storage)
        for file in holders_of_studies(journal):  # killed processes leave theirs, of whichever study
            release_dead(file)
        with own(what, holder_of_study(journal, name), CHOOSE_STORAGE):
            if from_scratch and journal.exists():
                with _guarded(shown(storage)):
                    _forget(_journal(journal), name)
            yield


@contextmanager
def _owned_in_database(storage: str, name: str, what: str, objectives: int, from_scratch: bool) -> Iterator[None]:
    """Is `own` for a study that is not in a file: its lock holder stands in one of its attributes.

    A database has no lock that several hosts and databases agree on, so two that begin in the same moment may both become
    the lock holder; the later one is.
    """
    import optuna

    def open_study() -> Study:
        return optuna.create_study(
            storage=backend, study_name=name, directions=["minimize"] * objectives, load_if_exists=True
        )

    def read() -> tuple[LockHolder | None, float]:
        found = study.user_attrs.get("owner")
        heard = found.pop("heard", None) if isinstance(found, dict) else None
        return LockHolder.from_dict(found), heard if isinstance(heard, float) else 0.0

    def write(holder: LockHolder | None) -> None:
        study.set_user_attr("owner", None if holder is None else {**holder.to_dict(), "heard": time.time()})

    def tell(holder: LockHolder | None) -> None:
        if read()[0] == ours:  # and nobody took over, because nothing was heard of this process
            write(holder)

    ours = LockHolder.new()
    with held(ours):
        with _guarded(shown(storage)):
            backend = _storage(storage)
            study = open_study()
            other, heard = read()
            if other is not None and other.is_alive(lambda: time.time() - heard):
                raise ArtefactError(other.refusal(what, CHOOSE_STORAGE))
            if from_scratch:
                _forget(backend, name)
                study = open_study()
            write(ours)
        try:
            with heard_of(lambda: tell(ours)):
                yield
        finally:
            with suppress(Exception):  # what went wrong with the storage was said, or is no reason to fail any more
                tell(None)


def _forget(storage: BaseStorage, name: str) -> None:
    """Deletes a study and those whose names begin with its name."""
    import optuna

    for found in optuna.get_all_study_names(storage):
        if found == name or found.startswith(f"{name}-"):
            optuna.delete_study(study_name=found, storage=storage)


@contextmanager
def _guarded(where: str) -> Iterator[None]:
    """Turns whatever a storage raises into one error that names it."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError, OSError, ImportError, ValueError, KeyError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise ArtefactError(
            f"cannot use the study storage {where}: {reason[:300]}; check that it is there and writable, or "
            "choose another one with --storage"
        ) from error


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna's log and its warnings about experimental parts off the screen; its settings are set back."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def shown(storage: str | None) -> str:
    """Returns a storage as it may be shown: without user and password."""
    if storage is None:
        return "in memory"
    if "://" not in storage:
        return storage
    try:
        parts = urlsplit(storage)
    except ValueError:
        return storage.split("://")[0] + "://..."
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _storage(storage: str | None) -> BaseStorage:
    from optuna.storages import InMemoryStorage, RDBStorage

    if storage is None:
        return InMemoryStorage()
    if "://" in storage:
        return RDBStorage(storage)
    return _journal(_journal_file(storage))


def _journal_file(storage: str) -> Path:
    if not storage.endswith(JOURNAL_SUFFIXES):
        raise RecipeError(
            f"storage {storage!r} is neither a journal file ending in .journal or .log nor a URL such as "
            "sqlite:///study.db"
        )
    return Path(storage).absolute()


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path), grace_period=LOCK_GRACE)
    if path.exists():
        lock.acquire()
        try:
            _drop_half_line(path)
        finally:
            lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _drop_half_line(path: Path) -> None:
    """Cuts what a killed process left of its last line; the journal would be unreadable after the next one."""
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def _states(*names: str) -> tuple[Any, ...]:
    from optuna.trial import TrialState

    return tuple(TrialState[name] for name in names)

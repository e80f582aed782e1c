"""Workers of one search in processes of their own, some of which are killed; and what they leave in a storage.

Nothing runs a model: a stand-in measures, says so in a file, and takes its time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import optuna

from moacompress.calibration.profile.store import Profile
from moacompress.recipe import Recipe
from moacompress.search.measure.claims import CLAIMS, WORKER
from moacompress.search.measure.storages import open_storage, quiet_optuna
from tests.search.conftest import FakeObjective, model_of

Make = Callable[..., Profile]
FORK = multiprocessing.get_context("fork")


class SlowObjective(FakeObjective):
    """Measures as `FakeObjective` does, takes its time for it, and notes every measurement in a file.

    It begins once `others` have come, where there are some to wait for.
    """

    def __init__(self, profile: Profile, notes: Path, seconds: float, others: Barrier | None) -> None:
        super().__init__(profile)
        self._notes, self._seconds, self._others = notes, seconds, others

    @contextmanager
    def under(self, plan: Any) -> Iterator[Callable[[int], float]]:
        """The KL of single samples."""
        with super().under(plan) as kl:

            def noted(number: int) -> float:
                if self._others is not None:
                    self._others.wait(60)
                    self._others = None
                time.sleep(self._seconds)
                found = float(kl(number))
                with self._notes.open("a") as file:
                    file.write(f"{os.getpid()} {plan.key()} {number}\n")
                return found

            yield noted


@dataclass
class SearchRun:
    """A search that several workers share.

    `find` searches, by default with `find_plan`, and returns one result or more; all workers pass the barrier before their
    first measurement, which takes some seconds. What they write is in the folder.
    """

    profile: Profile
    storage: str
    folder: Path
    out: Path
    seconds: float = 0.002
    find: Callable[..., Any] | None = None
    barrier: Barrier | None = None
    workers: list[ForkProcess] = field(default_factory=list)
    killed: int = 0

    @property
    def recipe(self) -> Recipe:
        """The profile's, with the storage."""
        return self.profile.recipe.override(search__storage=self.storage)

    def start(self, out: Path | None = None) -> ForkProcess:
        """Starts one more worker."""
        preload()
        number = len(self.workers)
        worker = FORK.Process(target=self._work, args=(number, out or self.out))
        worker.start()
        self.workers.append(worker)
        return worker

    def kill(self, worker: ForkProcess) -> None:
        """Kills a worker at once."""
        if worker.pid is not None and worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            self.killed += worker.exitcode == -signal.SIGKILL

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Waits for all workers; returns their exit codes."""
        end = time.monotonic() + seconds
        for worker in self.workers:
            worker.join(max(0.0, end - time.monotonic()))
        left = [worker for worker in self.workers if worker.is_alive()]
        for worker in left:
            self.kill(worker)
        assert not left, f"{len(left)} workers did not end; {self.errors()}"
        return [worker.exitcode for worker in self.workers]

    def results(self) -> list[dict[str, Any]]:
        """Returns what every worker that ended well said."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("result-*.json"))]

    def errors(self) -> str:
        """Returns what the others said."""
        return "; ".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("error-*.txt")))

    def measured(self) -> Counter[str]:
        """Returns how often every plan was measured on every sample."""
        notes = self.folder / "measured.txt"
        lines = notes.read_text().splitlines() if notes.exists() else []
        return Counter(line.partition(" ")[2] for line in lines)

    def kept(self) -> tuple[Counter[str], Counter[str]]:
        """Returns what is in the storage, by names: how many numbers are kept, and how many claims are done."""
        numbers: Counter[str] = Counter()
        done: Counter[str] = Counter()
        with quiet_optuna():
            storage = open_storage(self.storage)
            for study in optuna.get_all_study_names(storage):
                if study.endswith(CLAIMS):
                    for trial in optuna.load_study(study_name=study, storage=storage).trials:
                        name = trial.user_attrs["name"]
                        if not name.startswith(WORKER):
                            numbers[name] = max(numbers[name], len(trial.user_attrs.get("numbers", ())))
                            done[name] += trial.state.name == "COMPLETE"
        return numbers, done

    def _work(self, number: int, out: Path) -> None:
        from moacompress.search import study
        from moacompress.search.measure import claims

        profile = self.profile
        objective = SlowObjective(profile, self.folder / "measured.txt", self.seconds, self.barrier)
        fakes: list[tuple[Any, str, Any]] = [
            (claims, "KEEP_SECONDS", 0.0),  # each number as it is measured
            (study, "Objective", lambda *arguments: objective),
        ]
        for place, name, fake in fakes:  # this process is forked for nothing else
            setattr(place, name, fake)
        try:
            find = self.find or partial(study.find_plan, budget="50%")
            results = find(profile, recipe=self.recipe, out=out, model=model_of(profile))
        except BaseException as error:
            (self.folder / f"error-{number}.txt").write_text(f"{type(error).__name__}: {error}")
            raise
        for which, found in enumerate(results if isinstance(results, list) else [results]):
            said = {
                "written": found.written,
                "path": str(found.path),
                "plan": found.plan.to_dict(),
                "trials": found.trials,
            }
            (self.folder / f"result-{number}-{which}.json").write_text(json.dumps(said))


@cache
def preload() -> None:
    """Imports what workers need before they are forked, so that it takes them no time."""
    import optuna.importance
    import optuna.samplers
    import scipy.stats  # noqa: F401

    with quiet_optuna():
        study = optuna.create_study(storage=open_storage("sqlite://"), sampler=optuna.samplers.GPSampler(seed=0))
        optuna.create_study(pruner=optuna.pruners.WilcoxonPruner(), sampler=study.sampler)


def killed_at_random(run: SearchRun, seed: int, workers: int = 3, kills: int = 4, longest: float = 0.4) -> None:
    """Runs a search to its end, and kills workers on the way, for each of which another one starts after at most `longest`."""
    drawn = random.Random(seed)
    for _ in range(workers):
        run.start()
    for _ in range(kills):
        time.sleep(drawn.uniform(0, longest))
        alive = [worker for worker in run.workers if worker.is_alive()]
        if not alive:
            break
        run.kill(drawn.choice(alive))
        run.start()
    codes = run.wait()
    assert codes.count(0) == len(codes) - run.killed, f"{codes}; {run.errors()}"


def check_nothing_is_lost_or_doubled(run: SearchRun) -> None:
    """Checks what the workers of a finished search measured against what is in its storage."""
    numbers, done = run.kept()
    assert max(done.values()) == 1, [name for name, count in done.items() if count > 1]
    measured = run.measured().total()
    # what a worker had measured when it was killed, and had not kept yet
    assert numbers.total() <= measured <= numbers.total() + run.killed
    assert sum(result["written"] for result in run.results()) <= 1  # who wrote it may have been killed then
    assert run.out.exists()

"""64 workers of one study, of which some die, some stall and come back, and all wait for a storage that answers late.

The code of claims, workers and trials is the real one; workers are threads, each of a machine of its own as far as the others
can see, with a clock that runs at another speed. Time is a hundred times as fast: three seconds of silence are as five minutes.
MOACOMPRESS_TEST_SEEDS makes more of these runs, and MOACOMPRESS_TEST_JOURNAL=1 puts their study into a journal file.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution

from moacompress.core import lock_holders
from moacompress.core.lock_holders import LockHolder
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.measure.claims import CLAIMS, WORKER, Claims
from moacompress.search.measure.plan_evaluator import PlanEvaluator
from moacompress.search.measure.storages import open_storage, quiet_optuna
from moacompress.search.measure.study_storage import StudyStorage
from moacompress.search.measure.trials import Trials, log_ratio

WORKERS, TRIALS, SAMPLES = 64, 96, 4
KILLS, STALLS = 12, 12
SEEDS = int(os.environ.get("MOACOMPRESS_TEST_SEEDS", "1"))
IN_JOURNAL = os.environ.get("MOACOMPRESS_TEST_JOURNAL") == "1"
SHAPE = ModelShape("llama", 2, 2, 2, 16, "float32", (None, None), "none")


class Killed(BaseException):
    """A worker is dead: whatever it would still do has no effect."""


class Disturbed:
    """A storage as one worker meets it: it answers late, or not before a stall is over, or never again."""

    def __init__(self, storage: Any, drawn: Random) -> None:
        self._storage, self._drawn = storage, drawn
        self.dead, self.stalled_until = False, 0.0

    def live(self) -> None:
        """Passes once the worker is not stalled any more."""
        time.sleep(max(0.0, self.stalled_until - time.monotonic()))
        if self.dead:
            raise Killed

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._storage, name)

        def late(*arguments: Any, **named: Any) -> Any:
            self.live()
            time.sleep(0.05 if self._drawn.random() < 0.01 else 0.0005 * self._drawn.random())
            found = method(*arguments, **named)
            self.live()
            return found

        return late


@dataclass
class Simulated:
    """One of the workers, in a thread, with the storage as it meets it."""

    run: Run
    number: int
    thread: threading.Thread = field(init=False)
    storage: Disturbed = field(init=False)

    def __post_init__(self) -> None:
        drawn = Random(f"{self.run.seed} {self.number}")
        self.storage = Disturbed(self.run.opened(), drawn)
        self.speed, self.ahead = drawn.uniform(0.7, 1.4), drawn.uniform(-1e6, 1e6)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    @property
    def size(self) -> int:
        """Number of samples."""
        return SAMPLES

    @contextmanager
    def under(self, plan: Plan) -> Iterator[Callable[[int], float]]:
        """Measures."""

        def kl(sample: int) -> float:
            time.sleep(0.004)
            self.storage.live()
            with self.run.lock:
                self.run.measured[plan.key(), sample] += 1
            return true_kl(plan, sample)

        yield kl

    def many(self, number: int, plans: Any, base: Plan) -> Any:
        """Measures nothing."""
        raise NotImplementedError

    def clock(self) -> float:
        """Returns the time by its own clock."""
        return self.ahead + self.speed * time.monotonic()

    def _work(self) -> None:
        real: Any = self.storage
        self.run.begun.wait()
        holder = LockHolder(f"host{self.number}", f"boot{self.number}", "", 1, "1", 0.0, f"token{self.number}")
        try:
            study = optuna.create_study(storage=real, study_name="s" + CLAIMS, load_if_exists=True)
            study_id = real.get_study_id_from_name(study.study_name)
            claims = Claims(real, study_id, "simulated", holder=holder, monotonic=self.clock)
            with claims.joined(TRIALS):
                storage = Unsampled(claims, "s", {"x": FloatDistribution(0.0, 1.0)}, 0, [{"x": 0.5}])
                evaluator = PlanEvaluator(storage, self, list(range(SAMPLES)))
                first = plan_of({"x": 0.5})
                kls = evaluator.shown("trial0", first, "")
                Trials(storage, evaluator, plan_of, first, kls).completed("", TRIALS, lambda tried: "")
        except Killed:
            pass
        except BaseException as error:
            self.run.errors.append(repr(error))


class Unsampled(StudyStorage):
    """Draws search parameters without a model of them."""

    def sampled(self, index: int, pending: Any = ()) -> dict[str, float]:
        """Returns a number; some trials come to the same plan."""
        return {"x": Random(index).randrange(2 * TRIALS) / (2 * TRIALS)}


def plan_of(parameters: Any) -> Plan:
    return Plan.uniform(SHAPE, Rule(4, 32 + round(2 * TRIALS * parameters["x"]), 0), 16)


def true_kl(plan: Plan, sample: int) -> float:
    return 0.1 + 0.05 * Random(f"{plan.rules[0][0].alpha} {sample}").random()


class Run:
    """A study from its first worker to its last trial; the seed is of all that goes wrong."""

    def __init__(self, seed: int, journal: Path | None) -> None:
        self.seed, self.lock = seed, threading.Lock()
        self.measured: Counter[tuple[str, int]] = Counter()
        self.errors: list[str] = []
        self.begun = threading.Event()
        self._journal = journal
        self._memory = open_storage(None)
        self.killed = self.stalled = 0

    def opened(self) -> Any:
        """Returns the storage: of each worker its own where it is a file."""
        return self._memory if self._journal is None else open_storage(str(self._journal))

    def simulate(self, longest: float) -> None:
        """Runs it to its end."""
        drawn = Random(self.seed)
        workers = [Simulated(self, number) for number in range(WORKERS)]
        self.begun.set()
        ends = time.monotonic() + longest
        whats = [*(["kill"] * KILLS), *(["stall"] * STALLS)]
        drawn.shuffle(whats)
        for what in whats:
            time.sleep(drawn.uniform(0, 0.1))
            alive = [worker for worker in workers if worker.thread.is_alive() and not worker.storage.dead]
            if not alive:
                break
            one = drawn.choice(alive)
            if what == "kill":
                one.storage.dead = True
                self.killed += 1
                workers.append(Simulated(self, len(workers)))
            else:
                one.storage.stalled_until = time.monotonic() + drawn.uniform(0.5, 2) * lock_holders.SILENT_SECONDS
                self.stalled += 1
        for worker in workers:
            worker.thread.join(max(0.0, ends - time.monotonic()))
        assert not any(worker.thread.is_alive() for worker in workers), "some did not end"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_holders, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(lock_holders, "SILENT_SECONDS", 3.0)
    monkeypatch.setattr("moacompress.search.measure.claims.KEEP_SECONDS", 0.0)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # beats of killed workers
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_study_of_64_workers_comes_to_its_end_whatever_befalls_them(seed: int, fast: None, tmp_path: Path) -> None:
    run = Run(seed, tmp_path / "s.journal" if IN_JOURNAL else None)
    with quiet_optuna():
        run.simulate(longest=300)
        storage = run.opened()
        claims = [
            trial
            for trial in optuna.load_study(study_name="s" + CLAIMS, storage=storage).trials
            if not trial.user_attrs["name"].startswith(WORKER)
        ]
        shown = optuna.load_study(study_name="s", storage=storage).trials
    assert run.errors == []
    assert run.killed == KILLS
    assert any(trial.state.name == "FAIL" for trial in claims)
    done = {trial.user_attrs["name"]: trial.user_attrs for trial in claims if trial.state.name == "COMPLETE"}
    found = {int(name.removeprefix("s:trial:")): kept["result"] for name, kept in done.items() if ":trial:" in name}
    assert sorted(found) == list(range(TRIALS))
    reference = [true_kl(plan_of({"x": 0.5}), sample) for sample in range(SAMPLES)]
    for trial in found.values():
        notes, plan = trial["notes"], plan_of(trial["parameters"])
        assert notes["key"] == plan.key()
        assert notes["harms"] == [true_kl(plan, sample) for sample in range(len(notes["harms"]))]
        assert trial["value"] == pytest.approx(log_ratio(notes["harms"], reference))
    # what Optuna's own tools see; a worker may have been killed before it showed a trial
    indices = [trial.user_attrs["index"] for trial in shown]
    assert TRIALS - run.killed - run.stalled <= len(indices) == len(set(indices))
    for trial in shown:
        assert trial.state.name == "COMPLETE"
        assert trial.params == found[trial.user_attrs["index"]]["parameters"]
        assert trial.value == found[trial.user_attrs["index"]]["value"]
    keys = {trial["notes"]["key"] for trial in found.values()}
    assert len(keys) < TRIALS  # some came to the same plan, measured once
    for name, count in Counter(trial.user_attrs["name"] for trial in claims if trial.state.name == "COMPLETE").items():
        assert count == 1, name
    # a worker measures again only what one that died or was held for dead had not kept, a sample, or was still at
    extra = run.measured.total() - len(run.measured)
    assert extra <= run.killed + SAMPLES * run.stalled

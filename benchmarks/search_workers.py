"""What sharing a search costs: the part of a worker's time that the study storage and the claims on it take.

    python benchmarks/search_workers.py --storage /tmp/study.journal
    python benchmarks/search_workers.py --storage sqlite:////tmp/study.db
    python tests/services/postgres.py python benchmarks/search_workers.py

Workers are processes that run trials of one study. A trial measures its samples one after the other, each of which is a sleep;
the sampler is left out, as it costs one worker as much. What is neither sleep nor waiting for another worker is
overhead: claims, numbers that are kept, reading what others have done. The storage is that of --storage, or of the
environment variable MOACOMPRESS_STORAGE.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

import numpy as np
import scipy.stats  # noqa: F401  what prunes a trial imports it at its first one
from optuna.distributions import FloatDistribution

from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.measure.claims import open_claims
from moacompress.search.measure.storages import quiet_optuna, shown
from moacompress.search.measure.study_storage import StudyStorage
from moacompress.search.measure.trials import Trials

SHAPE = ModelShape("llama", 32, 32, 8, 128, "bfloat16", (None,) * 32, "none")
"""Of a model of 8 billion parameters: the size of what is kept of a plan."""
RANGES = {str(number): FloatDistribution(0.0, 1.0) for number in range(10)}
"""As many search parameters as a search has."""
FORK = multiprocessing.get_context("fork")


class Asleep:
    """Stands in for the model: every sample is a sleep."""

    def __init__(self, samples: int, seconds: float) -> None:
        self.size, self._seconds, self.slept = samples, seconds, 0.0

    @contextmanager
    def under(self, plan: Plan) -> Iterator[Callable[[int], float]]:
        """Yields what sleeps; the number that it returns depends on the plan and the sample alone."""
        level = plan.rules[0][0].alpha

        def kl(number: int) -> float:
            started = time.perf_counter()
            time.sleep(self._seconds)
            self.slept += time.perf_counter() - started
            return 0.1 + 0.01 * float(np.random.default_rng([level, number]).random())

        yield kl

    def many(self, number: int, plans: Sequence[Plan], base: Plan) -> Any:
        """Measures nothing: trials do not ask for it."""
        raise NotImplementedError


class Unsampled(StudyStorage):
    """Draws search parameters by the index of a trial, and adds up how long it waits for others."""

    waited = 0.0

    def sampled(self, index: int, pending: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """Returns a random number."""
        return dict(zip(RANGES, np.random.default_rng(index).random(len(RANGES)).tolist(), strict=True))

    def pause(self, limit: int, finished: Container[int], longest: float | None = None) -> None:
        """Waits."""
        started = time.perf_counter()
        super().pause(limit, finished, longest)
        self.waited += time.perf_counter() - started


def plan_of(parameters: Mapping[str, float]) -> Plan:
    """Returns a plan of its own for every number."""
    return Plan.uniform(SHAPE, Rule(4, 32 + int(1e6 * parameters["0"]), 0), 32)


def work(storage: str, name: str, trials: int, measure: Asleep, start: Any, said: Any) -> None:
    """Is one worker."""
    with quiet_optuna(), open_claims(storage, name, alone=False) as claims:
        study = Unsampled(claims, name, "none", RANGES, dict.fromkeys(RANGES, 0.5), 0)
        start.wait()
        started = time.perf_counter()
        run = Trials(study, measure, list(range(measure.size)), plan_of)
        done = run.completed("", trials, lambda tried: "")
        elapsed = time.perf_counter() - started
    said.put({"elapsed": elapsed, "slept": measure.slept, "waited": study.waited, "trials": len(done)})


def measured(storage: str, workers: int, each: int, seconds: float, samples: int) -> dict[str, Any]:
    """Returns what so many workers took, each of which has about `each` trials to run."""
    start, said, name = FORK.Barrier(workers), FORK.Queue(), f"benchmark-{workers}-{os.getpid()}-{time.time_ns()}"
    arguments = [
        (storage, name, workers * each, Asleep(samples, seconds / samples), start, said) for _ in range(workers)
    ]
    processes = [FORK.Process(target=work, args=one) for one in arguments]
    for process in processes:
        process.start()
    found = [said.get() for _ in processes]
    for process in processes:
        process.join()
    overhead = [one["elapsed"] - one["slept"] - one["waited"] for one in found]
    return {
        "workers": workers,
        "trials": workers * each,
        "trials_per_s": workers * each / max(one["elapsed"] for one in found),
        "elapsed_s": max(one["elapsed"] for one in found),
        "waited_share": mean(one["waited"] / one["elapsed"] for one in found),
        "overhead_share": mean(over / (over + one["slept"]) for over, one in zip(overhead, found, strict=True)),
        "overhead_of_a_trial_s": sum(overhead) / (workers * each),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", default=os.environ.get("MOACOMPRESS_STORAGE"), help="journal file or database URL")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--trials", type=int, default=2, help="for each worker")
    parser.add_argument("--seconds", type=float, default=10.0, help="that a trial takes")
    parser.add_argument("--samples", type=int, default=12, help="of a trial")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.storage:
        parser.error("name a --storage, or set MOACOMPRESS_STORAGE")
    rows = [measured(args.storage, count, args.trials, args.seconds, args.samples) for count in args.workers]
    if args.json:
        print(json.dumps({"storage": shown(args.storage), "rows": rows}))
        return
    print(f"{shown(args.storage)}: trials of {args.seconds:g} s, {args.samples} samples each")
    for row in rows:
        print(
            f"{row['workers']} workers, {row['trials']} trials: {row['elapsed_s']:.1f} s, {row['trials_per_s']:.2f} trials/s, "
            f"overhead {row['overhead_share']:.1%} "
            f"({row['overhead_of_a_trial_s'] * 1e3:.0f} ms a trial), waiting {row['waited_share']:.1%}"
        )


if __name__ == "__main__":
    main()

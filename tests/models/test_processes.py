"""Processes of one run, forked here and joined by gloo: tasks are shared out, and what fails is said once."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moacompress.core import lock_holders
from moacompress.core.errors import MoaCompressError, ModelError, UsageError
from moacompress.core.ranks import local_rank, named_rank, rank, world_size
from moacompress.models import processes

Work = Callable[[], Any]
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def in_processes(count: int, work: Work, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns what `work` returns in every one of so many processes, or the text of the error that it raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()

    def one(number: int) -> None:
        for name, value in zip(VARIABLES, (number, number, count, "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, str(value))
        try:
            processes.join()
            found = work()
        except MoaCompressError as error:
            found = f"{type(error).__name__}: {error}"
        queue.put((number, found))
        if rank() == 0:
            ended.wait(60)  # the first one keeps the store
        processes.leave()

    ended = context.Event()
    running = [context.Process(target=one, args=(number,)) for number in range(count)]
    for process in running:
        process.start()
    found = dict(queue.get(timeout=60) for _ in running)
    ended.set()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    return [found[number] for number in range(count)]


@pytest.mark.parametrize(("count", "tasks"), [(2, 7), (3, 2)])
def test_every_task_is_done_once_and_told_to_all(
    count: int, tasks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> Any:
        told: list[tuple[int, Any]] = []
        mine = {}
        for round_ in range(2):

            def do(task: int, round_: int = round_) -> list[Any]:
                (tmp_path / f"{round_} {task}").open("x").close()
                mine[round_, task] = rank()
                return [rank(), task / 3]

            processes.shared(range(tasks), do, lambda task, result: told.append((task, result)))
        return told, processes.gathered(mine), processes.broadcast({"of": rank()}, of=count - 1)

    first, *others = in_processes(count, work, monkeypatch)
    assert all(other == first for other in others)
    told, together, agreed = first
    for part in (told[:tasks], told[tasks:]):
        assert sorted(task for task, _ in part) == list(range(tasks))
        assert all(result[1] == task / 3 for task, result in part)
    assert [together[divmod(place, tasks)[0], task] for place, (task, _) in enumerate(told)] == [
        r for _, (r, _) in told
    ]
    assert agreed == {"of": count - 1}


def test_who_waits_for_a_process_that_failed_ends_and_one_alone_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> Any:
        def do(task: int) -> None:
            if task == 1:
                raise ModelError("numbers")
            while not processes._store().add(processes._FAILURES, 0):
                pass

        try:
            processes.shared(range(3), do, lambda task, _: None)
        except MoaCompressError as error:
            first = processes.fails_first()
            if first:
                processes.said_why()
            else:
                processes.await_message()
            return first, str(error)

    found = in_processes(2, work, monkeypatch)
    assert sorted(found) == [(False, "another process of the run failed; its message says why"), (True, "numbers")]


def test_who_waits_for_a_process_on_a_machine_that_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher stops the processes of its own machine alone."""
    monkeypatch.setattr(lock_holders, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(processes, "SILENT_SECONDS", 1.0)

    def work() -> Any:
        def do(task: int) -> int:
            processes._store().add("begun", 1)
            while processes._store().add("begun", 0) < 2:
                pass
            if rank() == 1:
                processes._beats.close()  # as killed
                time.sleep(4)
            return task

        done: list[int] = []
        processes.shared(range(2), do, lambda task, _: done.append(task))
        return done

    slow, gone = in_processes(2, work, monkeypatch)
    assert slow.startswith("MoaCompressError: rank 1 of the run has sent no heartbeat for")
    assert sorted(gone) == [0, 1]


def test_processes_with_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = in_processes(2, lambda: processes.check_alike({"weights": f"w{min(rank(), 1)}"}), monkeypatch)
    assert found == ["ModelError: rank 1 has another weights (w1) than rank 0 (w0); give all the same"] * 2


def test_a_process_alone_does_everything() -> None:
    told: list[tuple[int, int]] = []
    processes.join()
    processes.shared(range(3), lambda task: task * task, lambda *each: told.append(each))
    processes.check_alike({"weights": "any"})
    assert told == [(0, 0), (1, 1), (2, 4)]
    assert (processes.broadcast(5), processes.gathered({1: 2})) == (5, {1: 2})
    assert (rank(), local_rank(), world_size(), named_rank()) == (0, 0, 1, "")
    assert processes.fails_first()


def test_an_environment_that_says_half_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert rank() == 0  # of one process
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), named_rank()[:17]) == (3, " in rank 3 of 4 o")
    with pytest.raises(UsageError, match="4 processes .* not MASTER_ADDR, MASTER_PORT; start them with torchrun"):
        processes.join()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UsageError, match="WORLD_SIZE='many'"):
        world_size()

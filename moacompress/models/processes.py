"""What the processes of one run do together, as `torchrun` starts them: they agree, gather, and share tasks out.

All that passes between them lies in the host's memory and goes by gloo, whatever device they compute on. A task goes to
whichever process has time for one, so machines need not be equally fast. A process alone does everything itself.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moacompress.core.errors import MoaCompressError, ModelError, UsageError
from moacompress.core.lock_holders import BEAT_SECONDS, SILENT_SECONDS, HeartbeatMonitor, heartbeat, readable_age
from moacompress.core.ranks import local_rank, rank, splits_model, world_size

Task = TypeVar("Task")

PATIENCE = timedelta(days=1)
"""A process waits so long for the others: one of them may have hours of work that the others do not share."""
POLL_SECONDS = 0.05
"""Between two looks whether another process has done its task."""
REPORT_SECONDS = 10.0
"""A process that fails after another one waits so long for the other's message, as its own end may end the other."""
_FAILURES, _REPORTED, _BEAT = "failures", "reported", "beat"
_beats = ExitStack()
"""Lets the others know that this process lives, from `join` to `leave`."""
_lists = itertools.count()
"""Numbers the lists of tasks; all processes share out the same ones in the same order."""


def join() -> None:
    """Brings up the group of the run's processes; alone, or the second time, it does nothing.

    Where machines have GPUs, the device `cuda` is then another one in every process of a machine.

    Raises:
        UsageError: the environment does not say where the first process is.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"the environment says that the run has {world_size()} processes (WORLD_SIZE) and not {', '.join(missing)}; start "
            "them with torchrun, or unset WORLD_SIZE"
        )
    on_gpus = torch.cuda.is_available()
    if on_gpus and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    _beats.enter_context(heartbeat(lambda: _store().add(f"{_BEAT} {rank()}", 1)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=PrefixStore("group", _store()),
        rank=rank(),
        world_size=world_size(),
        timeout=PATIENCE,
    )


def leave() -> None:
    """Takes the group down, if there is one."""
    _beats.close()
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _store() -> Store:
    """Returns the store of keys and values that all processes of the run reach."""
    store, _, _ = next(rendezvous("env://", rank(), world_size(), timeout=PATIENCE))
    return PrefixStore("moacompress", store)


def broadcast(value: Any, of: int = 0) -> Any:
    """Returns what one process gave, by default the first, in all of them; every process must call it."""
    if world_size() == 1:
        return value
    held = [value if rank() == of else None]
    dist.broadcast_object_list(held, src=of)
    return held[0]


def gathered(values: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the values of all processes together, those of later ones where keys are alike; every process must call it."""
    if world_size() == 1:
        return values
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, values)
    return {key: value for part in parts for key, value in part.items()}


@contextmanager
def own_files(file: Path) -> Iterator[Path]:
    """Gives each process that holds a part of one model a place to write to: the first the file, the others a copy of it.

    So all can do the same work and write what they do, and what the first one has written stays. The file need not be there;
    what is beside it with a name that begins as its stem does goes with it. The copies are in temporary folders.

    Raises:
        ModelError: the processes do not see the same files.
    """
    there = [path for path in file.parent.glob("*") if path.name.partition(".")[0] == file.name.partition(".")[0]]
    check_alike({f"files beside {file.name}": ", ".join(sorted(path.name for path in there)) or "none"})
    with TemporaryDirectory(prefix="moacompress-") as folder:
        if rank():
            for path in there:
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, Path(folder) / path.name)
        gathered({})  # nothing is written before all have their copy
        yield Path(folder) / file.name if rank() else file


def check_alike(facts: Mapping[str, str]) -> None:
    """Refuses processes that would not compute the same; every process must call it.

    What is to be the same goes by the words of a person, such as "version of moacompress".

    Raises:
        ModelError: it is not.
    """
    found = gathered({rank(): dict(facts)})
    for number, theirs in found.items():
        for name, value in theirs.items():
            if value != found[0][name]:
                raise ModelError(
                    f"rank {number} has another {name} ({value}) than rank 0 ({found[0][name]}); give all the same"
                )


def shared(tasks: Sequence[Task], work: Callable[[Task], Any], done: Callable[[Task, Any], None]) -> None:
    """Does each task in one of the processes, whichever has time first; every process must call it with the same tasks.

    Processes that hold one model together do every task together, and are told what the first one has.

    Args:
        tasks: the longest first, so that no process waits long for the last one.
        work: does a task and returns JSON values; what else it makes stays in its process.
        done: is told of every task and what it returned, in all processes and in the same order.

    Raises:
        MoaCompressError: another process failed; and whatever `work` and `done` raise.
    """
    if world_size() == 1 or splits_model():
        for task in tasks:
            done(task, broadcast(work(task)))
        return
    store, name, told = _store(), f"tasks {next(_lists)}", 0
    others = _Others(store)

    def tell(wait: bool) -> None:
        nonlocal told
        while told < len(tasks):
            key = f"{name} result {told}"
            while not store.check([key]):
                if not wait:
                    return
                if store.add(_FAILURES, 0):
                    raise MoaCompressError("another process of the run failed; its message says why")
                others.check()
                time.sleep(POLL_SECONDS)
            number, result = json.loads(store.get(key))
            told += 1
            done(tasks[number], result)

    while (number := store.add(f"{name} taken", 1) - 1) < len(tasks):
        result = json.dumps([number, work(tasks[number])])
        store.set(f"{name} result {store.add(f'{name} finished', 1) - 1}", result)
        tell(wait=False)
    tell(wait=True)


class _Others:
    """Heartbeats of the processes of a run; a launcher knows only the processes of its own machine."""

    def __init__(self, store: Store) -> None:
        self._store, self._beats = store, HeartbeatMonitor()
        self._looked = time.monotonic()

    def check(self) -> None:
        """Looks from time to time.

        Raises:
            MoaCompressError: one has sent no heartbeat for too long.
        """
        now = time.monotonic()
        if now - self._looked < BEAT_SECONDS:
            return
        self._looked = now
        for number in range(world_size()):
            silence = self._beats.silence(number, self._store.add(f"{_BEAT} {number}", 0))
            if silence > SILENT_SECONDS:
                raise MoaCompressError(
                    f"rank {number} of the run has sent no heartbeat for {readable_age(silence)}: it was killed or its machine "
                    "is gone; start the run again, and it resumes"
                )


def fails_first() -> bool:
    """Notes that this process failed; returns whether it is the one of the run that says why."""
    if world_size() == 1 or not dist.is_initialized():
        return True
    try:
        return int(_store().add(_FAILURES, 1)) == 1
    except RuntimeError:  # whoever kept the store is gone
        return True


def said_why() -> None:
    """Notes that the message of the process that failed first is out."""
    if world_size() > 1 and dist.is_initialized():
        with suppress(RuntimeError):
            _store().set(_REPORTED, "1")


def await_message() -> None:
    """Waits for the message of the process that failed first, but not for long."""
    if world_size() > 1 and dist.is_initialized():
        with suppress(RuntimeError):
            _store().wait([_REPORTED], timedelta(seconds=REPORT_SECONDS))

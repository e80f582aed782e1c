"""Which of the processes of one run this is, as `torchrun` says it in the environment; a process alone is rank 0 of 1."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from moacompress.core.errors import UsageError


def rank() -> int:
    """Returns the number of this process among those of the run, from 0 on."""
    return _number("RANK", 0) if world_size() > 1 else 0


def world_size() -> int:
    """Returns how many processes the run has."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Returns the number of this process among those of the run on this machine."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


_split = False


@contextmanager
def splitting(model: bool) -> Iterator[None]:
    """Has the processes of the run hold one model together while the block runs, each a part of every layer, or one each.

    Together (tensor parallelism) all do the same work, in the same order.
    """
    global _split
    before, _split = _split, model
    try:
        yield
    finally:
        _split = before


def splits_model() -> bool:
    """Returns whether the processes of the run hold one model together."""
    return _split and world_size() > 1


def work_shard() -> tuple[int, int]:
    """Returns whose turn this process takes where work is dealt out, and of how many: all of it where they do the same."""
    return (0, 1) if splits_model() else (rank(), world_size())


def named_rank() -> str:
    """Returns what a person is told of where an error happened: " in rank 1 of 2 on HOST"; empty for a process alone."""
    return f" in rank {rank()} of {world_size()} on {socket.gethostname()}" if world_size() > 1 else ""


def _number(name: str, default: int) -> int:
    """Returns a variable of the environment.

    Raises:
        UsageError: it is no number.
    """
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"the environment has {name}={text!r}, which is no rank or number of processes; unset it")
    return int(text)

"""Which of the processes of one run this is, as `torchrun` says it in the environment; a process alone is rank 0 of 1."""

from __future__ import annotations

import os
import socket

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

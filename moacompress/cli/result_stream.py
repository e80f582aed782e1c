"""The standard output while a command works: for its result alone, whatever libraries print."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

STDOUT, _STDERR = 1, 2


@contextlib.contextmanager
def for_the_result() -> Iterator[TextIO]:
    """Sends to stderr what is printed, by libraries in C and by child processes as well; yields the standard output."""
    if not _is_the_process_own(sys.stdout):
        out = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            yield out
        return
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    try:
        os.dup2(_STDERR, STDOUT)
        with (
            open(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False) as out,
            contextlib.redirect_stdout(sys.stderr),
        ):
            yield out
    finally:
        # or what C holds back would go to where it then leads
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)


def open_streams() -> None:
    """Gives a process that was started without a standard output or error one that leads nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _is_the_process_own(stream: TextIO) -> bool:
    """Returns whether a stream is the process' own standard output, and there is a stderr to send others to."""
    try:
        os.fstat(_STDERR)
        return stream.fileno() == STDOUT
    except (OSError, io.UnsupportedOperation):
        return False

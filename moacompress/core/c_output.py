"""What libraries in C print to the standard output, which Python's `sys.stdout` does not see."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

STDOUT = 1
_ALONE = threading.Lock()  # a second thread would take the first one's null device for the standard output


def flush_c_output() -> None:
    """Has C write out what it holds back, where there is such a library to ask."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)


@contextlib.contextmanager
def without_c_output() -> Iterator[None]:
    """Discards what is printed to the process' standard output meanwhile, by other threads too: keep the block short."""
    with _ALONE, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a standard output there is nothing to discard
            kept = os.dup(STDOUT)
            stack.callback(os.close, kept)
            null = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, null)
            flush_c_output()
            os.dup2(null, STDOUT)
            stack.callback(os.dup2, kept, STDOUT)
            stack.callback(flush_c_output)
        yield

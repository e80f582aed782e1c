"""The one definition of window, visible, kept and slots, in integers: search, cost, cache and report agree to the token."""

from __future__ import annotations

from typing import Any, TypeVar

BLOCK = 16
"""Tokens in a cache block."""
BETA_ONE = 1024
"""`beta_q` of a window that grows by one token per token."""
Counts = TypeVar("Counts")  # a Python int, or an int64 numpy array or torch tensor


def _max(a: Any, b: Any) -> Any:
    return a + (b - a) * (b > a)


def _min(a: Any, b: Any) -> Any:
    return a + (b - a) * (b < a)


def window(n: Counts, alpha: Any, beta_q: Any, min_window: int) -> Counts:
    """Returns the window of the query at position `n - 1`.

    `w(n) = min(n, max(min_window, alpha + ((beta_q * n) >> 10)))`, in int64. It works alike on Python ints, numpy arrays
    and torch tensors, which broadcast.

    Args:
        n: number of tokens so far in the row, the query included.
        alpha: fixed part, tokens.
        beta_q: growth per token in 1/1024.
        min_window: smallest window of the plan, tokens.
    """
    w: Any = alpha + ((beta_q * n) >> 10)
    return _min(_max(w, min_window), n)  # type: ignore[no-any-return]


def segments(n: Any, sink: Any, alpha: Any, beta_q: Any, min_window: int, native_window: int | None = None) -> Any:
    """Returns `(first, sink_end, start)`: query `n - 1` sees the keys `[first, sink_end)` and `[start, n)`.

    `first <= sink_end <= start`; on a native sliding layer no key before `n - native_window` is visible, sinks included.
    """
    w = window(n, alpha, beta_q, min_window)
    if native_window is None:
        first, start = n * 0, n - w
    else:
        first = _max(n - native_window, 0)
        start = _max(n - w, first)
    return first, _min(_max(sink, first), start), start


def kept(n: Any, sink: Any, alpha: Any, beta_q: Any, min_window: int, native_window: int | None = None) -> Any:
    """Returns the number of keys visible to the query at position `n - 1`."""
    first, sink_end, start = segments(n, sink, alpha, beta_q, min_window, native_window)
    return n - start + sink_end - first


def block_runs(
    n: Any, sink: Any, alpha: Any, beta_q: Any, min_window: int, native_window: int | None = None
) -> tuple[Any, Any, Any, Any]:
    """Returns the cache blocks that `kept(n)` touches, as two runs of block numbers.

    Token j lives in block `j // 16`. The sinks lie in the blocks `[a, b)`, the window in `[c, d)`, `b <= c`; a block that
    both touch belongs to the window's run.

    Returns:
        `(a, b, c, d)`.
    """
    first, sink_end, start = segments(n, sink, alpha, beta_q, min_window, native_window)
    a, c, d = first // BLOCK, start // BLOCK, (n + BLOCK - 1) // BLOCK
    b = _min((sink_end + BLOCK - 1) // BLOCK, c)
    return a, a + (b - a) * (b > a) * (sink_end > first), c, d


def slots(n: Any, sink: Any, alpha: Any, beta_q: Any, min_window: int, native_window: int | None = None) -> Any:
    """Returns `kept(n)` in whole cache blocks touched: the tokens that the cache holds memory for."""
    a, b, c, d = block_runs(n, sink, alpha, beta_q, min_window, native_window)
    return (b - a + d - c) * BLOCK

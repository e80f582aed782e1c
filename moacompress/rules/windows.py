"""The one definition of window, visible, kept and slots, in integers: search, cost, cache and report agree to the token."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

BLOCK = 16
"""Tokens in a cache block."""
BETA_ONE = 1024
"""`beta_q` of a window that grows by one token per token."""
RUNS = 2
"""Runs of blocks of a KV head: the sinks' and the window's."""
Counts = TypeVar("Counts")  # a Python int, or an int64 numpy array or torch tensor


class Span(NamedTuple):
    """What decides which keys are visible: of one KV head as Python ints, of many as int64 arrays or tensors.

    Attributes:
        sink: first tokens that are always kept.
        alpha: fixed part of the window, tokens.
        beta_q: growth of the window per token in 1/1024.
        min_window: smallest window of the plan, tokens.
        native_window: the layer's own sliding window, tokens; 0 for none.
    """

    sink: Any
    alpha: Any
    beta_q: Any
    min_window: Any
    native_window: Any = 0


def _max(a: Any, b: Any) -> Any:
    return a + (b - a) * (b > a)


def _min(a: Any, b: Any) -> Any:
    return a + (b - a) * (b < a)


def window(n: Counts, alpha: Any, beta_q: Any, min_window: Any) -> Counts:
    """Returns the window, tokens, of the query at position `n - 1`.

    `w(n) = min(n, max(min_window, alpha + ((beta_q * n) >> 10)))`, in int64. It works alike on Python ints, numpy arrays
    and torch tensors, which broadcast.
    """
    w: Any = alpha + ((beta_q * n) >> 10)
    return _min(_max(w, min_window), n)  # type: ignore[no-any-return]


def visible_intervals(n: Any, span: Span) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Returns the intervals of keys that the query at position `n - 1` sees, ascending; `n` and the span broadcast.

    The sinks' `[first, sink_end)` and the window's `[start, n)`, with `first <= sink_end <= start`. On a native sliding layer
    no key before `n - native_window` is visible, sinks included.
    """
    first = _max(n - span.native_window, 0) * (span.native_window > 0)
    start = _max(n - window(n, span.alpha, span.beta_q, span.min_window), first)
    return (first, _min(_max(span.sink, first), start)), (start, n)


def kept(n: Any, span: Span) -> Any:
    """Returns the number of keys of sinks and window that are visible to the query at position `n - 1`."""
    return sum(end - begin for begin, end in visible_intervals(n, span))


def tokens_left(n: Any, span: Span) -> Any:
    """Returns how many tokens are evicted from the window, sinks not counted, when the query at position `n - 1` attends.

    Of a layer with a sliding window of its own it is none: it sees nothing that is evicted.
    """
    (_, sink_end), (start, _) = visible_intervals(n, span)
    return (start - sink_end) * (span.native_window == 0)


def selected(left: Any, select_alpha: Any, select_beta_q: Any) -> Any:
    """Returns how many tokens a gate keeps of the `left` that are evicted from the window.

    `k = min(left, select_alpha + ((select_beta_q * left) >> 10))`, in int64: it grows by one token at most as one more leaves,
    so that there is one to fill every place with.
    """
    return _min(select_alpha + ((select_beta_q * left) >> 10), left)


def whole_blocks(tokens: Any) -> Any:
    """Returns a number of tokens in whole cache blocks: the tokens that the cache holds memory for."""
    return (tokens + BLOCK - 1) // BLOCK * BLOCK


def block_runs(n: Any, span: Span) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Returns the cache blocks that `kept(n)` touches, as `RUNS` runs of block numbers, ascending.

    Token j lies in block `j // 16`. A block that sinks and window both touch belongs to the window's run.

    Returns:
        `(begin, end)` of the sinks' blocks and of the window's.
    """
    (first, sink_end), (start, _) = visible_intervals(n, span)
    a, c, d = first // BLOCK, start // BLOCK, (n + BLOCK - 1) // BLOCK
    b = _min((sink_end + BLOCK - 1) // BLOCK, c)
    return (a, a + (b - a) * (b > a) * (sink_end > first)), (c, d)


def slots(n: Any, span: Span) -> Any:
    """Returns `kept(n)` in whole cache blocks touched, the tokens that the cache holds memory for."""
    return sum(end - begin for begin, end in block_runs(n, span)) * BLOCK

"""Serving as a server does it, in little: requests wait, join the running batch where memory is left, and leave it when done.

The scheduler admits in the order of arrival, and reserves the KV bytes of a whole request, so that none is ever preempted. A
prompt is read alone, at once, while the running rows wait; then its row joins them. Compared models get the same requests and
the same KV memory. Every answer has the length that its request says.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from moacompress.bench.request_mix import Request
from moacompress.core.errors import UsageError
from moacompress.core.progress import SILENT, Progress
from moacompress.core.tables import readable_bytes

Clock = Callable[[], float]


class RunningRows(Protocol):
    """The rows that a model decodes together, each with its cache; see `running_rows`."""

    def add(self, prompt: torch.Tensor) -> int:
        """Reads a prompt, `[1, tokens]`, whose row joins behind the others; returns its first new token."""

    def step(self, tokens: Sequence[int]) -> list[int]:
        """Feeds every row its last token; returns the next ones."""

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all rows but those of these numbers, ascending."""


@dataclass
class _Served:
    """A request that has been admitted.

    Attributes:
        request: the request.
        first: seconds from its arrival to its first token.
        last: its last token so far.
        left: tokens that are still to come.
        seconds: from its arrival to its last token; None while it runs.
    """

    request: Request
    first: float
    last: int
    left: int
    seconds: float | None = None


@dataclass
class Served:
    """What serving came to.

    Attributes:
        seconds: in all.
        first: seconds from arrival to the first token of every request.
        token: mean seconds from one token to the next of every request of more than one token.
        running: mean number of rows at once, over time.
        most: rows at once.
        steps: decode steps.
        reserved: most KV bytes that were reserved at once.
    """

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    running: float = 0.0
    most: int = 0
    steps: int = 0
    reserved: int = 0

    def row(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Returns the numbers of a row of `serve` in a benchmark's result; see docs/measuring.md."""
        prompts, new = (sum(getattr(request, name) for request in requests) for name in ("prompt_tokens", "new_tokens"))
        return {
            "requests": len(requests),
            "prompt_tokens": prompts,
            "new_tokens": new,
            "seconds": self.seconds,
            "requests_per_s": len(requests) / self.seconds,
            "tokens_per_s": new / self.seconds,
            "first_token_s": _spread(self.first),
            "token_s": _spread(self.token),
            "running": {"mean": self.running, "most": self.most},
            "preemptions": 0,
            "steps": self.steps,
            "reserved_bytes": self.reserved,
        }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99]).tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p99": p99}


def check_requests(requests: Sequence[Request], bytes_of: Callable[[int], int], memory: int, name: str) -> None:
    """Refuses a request that would never be admitted to so many bytes of KV memory; `bytes_of` gives those of a row's tokens.

    Raises:
        UsageError: says how much memory the largest takes.
    """
    largest = max(requests, key=lambda request: bytes_of(request.tokens))
    need = bytes_of(largest.tokens)
    if need > memory:
        raise UsageError(
            f"a request of {largest.prompt_tokens:,} + {largest.new_tokens:,} tokens takes {readable_bytes(need)} of KV cache "
            f"under {name}, and --kv-memory is {readable_bytes(memory)}; give more, or shorter requests"
        )


def serve(
    rows: RunningRows,
    requests: Sequence[Request],
    prompt_of: Callable[[int], torch.Tensor],
    bytes_of: Callable[[int], int],
    memory: int,
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    progress: Progress = SILENT,
) -> Served:
    """Serves requests until all are answered.

    Args:
        rows: of the model, none yet.
        requests: in the order of arrival; each fits into the memory alone.
        prompt_of: returns the ids of the numbered request's prompt, `[1, tokens]`.
        bytes_of: returns the KV bytes of a row of so many tokens.
        memory: most KV bytes that are reserved at once.
        clock: seconds.
        sleep: waits so many seconds.
        progress: told of every request that is answered.
    """
    waiting, running = deque(enumerate(requests)), list[_Served]()
    result, reserved, began = Served(), 0, clock()
    busy, then = 0.0, began

    def passed(rows_running: int) -> float:
        """Counts the time since the last call for so many rows; returns seconds since the beginning."""
        nonlocal busy, then
        now = clock()
        busy, then = busy + rows_running * (now - then), now
        return now - began

    def leave() -> None:
        """Lets the rows that are done go, with what was reserved for them."""
        nonlocal reserved
        done = [one for one in running if not one.left]
        if not done:
            return
        rows.keep([number for number, one in enumerate(running) if one.left])
        running[:] = [one for one in running if one.left]
        for one in done:
            reserved -= bytes_of(one.request.tokens)
            assert one.seconds is not None
            result.first.append(one.first)
            if one.request.new_tokens > 1:
                result.token.append((one.seconds - one.first) / (one.request.new_tokens - 1))
            progress.step(f"{len(running)} running, {len(waiting)} waiting")

    while waiting or running:
        now = passed(len(running))
        while waiting and waiting[0][1].arrival <= now:
            number, request = waiting[0]
            size = bytes_of(request.tokens)
            if reserved + size > memory:
                break
            waiting.popleft()
            reserved += size
            token = rows.add(prompt_of(number))
            now = passed(len(running) + 1)
            one = _Served(request, now - request.arrival, token, request.new_tokens - 1)
            one.seconds = None if one.left else one.first
            running.append(one)
            result.most, result.reserved = max(result.most, len(running)), max(result.reserved, reserved)
            leave()
        if running:
            tokens = rows.step([one.last for one in running])
            result.steps += 1
            now = passed(len(running))
            for one, token in zip(running, tokens, strict=True):
                one.last, one.left = token, one.left - 1
                one.seconds = None if one.left else now - one.request.arrival
            leave()
        elif waiting:
            sleep(max(0.0, waiting[0][1].arrival - now))
    result.seconds = clock() - began
    result.running = busy / result.seconds if result.seconds else 0.0
    return result

"""Caches of earlier prompts and answers, kept for prompts that begin with the same tokens."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.runtime.cache.plan_cache import PlanCache


class KeptPrefix(NamedTuple):
    """What was kept.

    Attributes:
        tokens: int64 `[tokens]`.
        cache: of just these tokens, one row, with memory of its own; never run, only copied.
        nbytes: of the cache.
    """

    tokens: Ints
    cache: PlanCache
    nbytes: int


class KeptPrefixes:
    """Caches of earlier prompts and answers of one model, in no more bytes than a limit; those longest unused go first.

    A cache under a plan has evicted tokens, so it can be continued from its end alone: it serves prompts that begin with all of
    its tokens, and no others. Threads may share it.

    Args:
        limit: bytes.

    A copy, and what is read of a pickled one, has the same limit and holds nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[KeptPrefix] = []  # those used last come last
        self._weights: Hashable = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches that are kept."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept)

    def longest(self, tokens: Ints, weights: Hashable) -> PlanCache | None:
        """Returns a copy of the cache of the longest prefix of a prompt, at least one token shorter than it, or None.

        Args:
            tokens: of the prompt, int64 `[tokens]`.
            weights: tells the weights that will continue it from others; what others computed is given up.
        """
        with self._lock:
            self._give_up_others(weights)
            fitting = [kept for kept in self._kept if _begins(tokens, kept.tokens)]
            if not fitting:
                return None
            found = max(fitting, key=lambda kept: len(kept.tokens))
            self._put_last(found)
        return found.cache.compact()

    def keep(self, tokens: Ints, cache: PlanCache, weights: Hashable) -> None:
        """Keeps a copy of a cache, unless it takes more than the limit alone.

        Args:
            tokens: that it is of, int64 `[tokens]`.
            cache: one row, without padding, between two forwards.
            weights: as `longest`.
        """
        if cache.used_bytes() > self.limit:
            return
        own = cache.compact()
        kept = KeptPrefix(tokens.copy(), own, own.kv_bytes())
        with self._lock:
            self._give_up_others(weights)
            self._put_last(kept)
            while sum(kept.nbytes for kept in self._kept) > self.limit:
                del self._kept[0]

    def _put_last(self, found: KeptPrefix) -> None:
        others = (kept for kept in self._kept if not np.array_equal(kept.tokens, found.tokens))
        self._kept = [*others, found]

    def _give_up_others(self, weights: Hashable) -> None:
        if weights != self._weights:
            self._kept, self._weights = [], weights

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptPrefixes, (self.limit,)


def _begins(tokens: Ints, prefix: Ints) -> bool:
    """Returns whether tokens begin with a prefix and go on."""
    return len(prefix) < len(tokens) and np.array_equal(tokens[: len(prefix)], prefix)

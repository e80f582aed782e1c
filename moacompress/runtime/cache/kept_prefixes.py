"""Caches of earlier prompts and answers, kept for prompts that begin with the same tokens."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.core.errors import UnsupportedError
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

    def longest(self, tokens: Ints, weights: Hashable) -> tuple[PlanCache | None, int]:
        """Looks for the longest kept prefix of a prompt, at least one token shorter than it.

        `tokens`: of the prompt, int64 `[tokens]`. `weights`: tells the weights that will continue it from others; what others
        computed is given up.

        Returns:
            A copy of its cache, or None; and how many tokens the prompt and some kept prefix begin with alike, at most one less
            than the prompt has. Where these are more than the cache's, a prefix that may be wanted again ends there.
        """
        with self._lock:
            self._give_up_others(weights)
            shared = [_shared(tokens[:-1], kept.tokens) for kept in self._kept]
            fitting = [kept for kept, count in zip(self._kept, shared, strict=True) if count == len(kept.tokens)]
            found = max(fitting, key=lambda kept: len(kept.tokens), default=None)
            if found is not None:
                self._put_last(found)
        return (None if found is None else found.cache.compact()), max(shared, default=0)

    def keep(self, tokens: Ints, cache: PlanCache, weights: Hashable) -> None:
        """Keeps a copy of a cache, unless it takes more than the limit alone.

        `tokens`: that it is of, int64 `[tokens]`. `cache`: one row, without padding, between two forwards.

        Raises:
            UnsupportedError: the cache is of another number of tokens, or a forward is running.
        """
        if cache.get_seq_length() != len(tokens):
            raise UnsupportedError(f"a cache of {cache.get_seq_length()} tokens cannot be kept for {len(tokens)}")
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


def _shared(tokens: Ints, others: Ints) -> int:
    """Returns how many tokens two texts begin with alike."""
    count = min(len(tokens), len(others))
    differ = np.flatnonzero(tokens[:count] != others[:count])
    return int(differ[0]) if len(differ) else count

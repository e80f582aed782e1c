"""What one KV head keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moacompress.rules.windows import BETA_ONE, kept, slots

SINKS = (4, 16, 64)
MIN_WINDOWS = (16, 32, 64)
MAX_ALPHA = 1 << 24


@dataclass(frozen=True, order=True)
class Rule:
    """What one KV head keeps: the first `sink` tokens, and a window of `alpha + beta_q / 1024 * n` tokens."""

    sink: int
    alpha: int
    beta_q: int
    FULL: ClassVar[Rule]

    @property
    def is_full(self) -> bool:
        """Whether every key (of a native window) is visible at every length."""
        return self.beta_q >= BETA_ONE

    def kept(self, n: Any, min_window: int, native_window: int | None = None) -> Any:
        """Returns the number of keys visible to query `n - 1` (`windows.kept`)."""
        return kept(n, self.sink, self.alpha, self.beta_q, min_window, native_window)

    def slots(self, n: Any, min_window: int, native_window: int | None = None) -> Any:
        """Returns the tokens held by the cache (`windows.slots`)."""
        return slots(n, self.sink, self.alpha, self.beta_q, min_window, native_window)

    def __str__(self) -> str:
        if self.is_full:
            return "full"
        growth = f"+{self.beta_q / BETA_ONE:.3g}n" if self.beta_q else ""
        return f"{self.sink}|{self.alpha}{growth}"


Rule.FULL = Rule(sink=SINKS[0], alpha=0, beta_q=BETA_ONE)

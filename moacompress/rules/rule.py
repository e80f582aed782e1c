"""What one KV head keeps, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from moacompress.rules.formats import FORMATS, NATIVE
from moacompress.rules.windows import BETA_ONE, Span, kept, slots

SINKS = (4, 16, 64)
MIN_WINDOWS = (16, 32, 64)
MAX_ALPHA = 1 << 24


@dataclass(frozen=True, order=True)
class Rule:
    """What one KV head keeps, the first `sink` tokens and a window of `alpha + beta_q / 1024 * n` tokens, and in which formats.

    Attributes:
        sink: first tokens that are always kept.
        alpha: fixed part of the window, tokens.
        beta_q: growth of the window per token in 1/1024.
        key_format: of its keys, one of `formats.FORMATS`.
        value_format: of its values.
    """

    sink: int
    alpha: int
    beta_q: int
    key_format: str = NATIVE
    value_format: str = NATIVE
    FULL: ClassVar[Rule]

    @property
    def sees_all(self) -> bool:
        """Whether every key (of a native window) is visible at every length."""
        return self.beta_q >= BETA_ONE

    @property
    def is_native(self) -> bool:
        """Whether keys and values are kept as the model computes them."""
        return self.key_format == self.value_format == NATIVE

    @property
    def is_full(self) -> bool:
        """Whether the KV head is as in the dense model."""
        return self.sees_all and self.is_native

    def in_formats(self, keys: str, values: str) -> Rule:
        """Returns the same span in a format of keys and one of values."""
        return replace(self, key_format=keys, value_format=values)

    def span(self, min_window: int, native_window: int | None = None) -> Span:
        """Returns what decides which keys are visible, in a plan of this smallest window and a layer of this native one."""
        return Span(self.sink, self.alpha, self.beta_q, min_window, native_window or 0)

    def kept(self, n: Any, min_window: int, native_window: int | None = None) -> Any:
        """Returns the number of keys visible to query `n - 1` (`windows.kept`)."""
        return kept(n, self.span(min_window, native_window))

    def slots(self, n: Any, min_window: int, native_window: int | None = None) -> Any:
        """Returns the tokens held by the cache (`windows.slots`)."""
        return slots(n, self.span(min_window, native_window))

    def token_bytes(self, head_dim: int, value_dim: int, dtype: str) -> int:
        """Returns the bytes of one token's key and value.

        Args:
            head_dim: numbers of a key.
            value_dim: numbers of a value.
            dtype: the model's.
        """
        keys, values = FORMATS[self.key_format], FORMATS[self.value_format]
        return keys.vector_bytes(head_dim, dtype) + values.vector_bytes(value_dim, dtype)

    def to_list(self) -> list[Any]:
        """Returns the JSON form: its numbers, then its formats where one is not native."""
        numbers: list[Any] = [self.sink, self.alpha, self.beta_q]
        return numbers if self.is_native else [*numbers, self.key_format, self.value_format]

    @staticmethod
    def from_list(data: Sequence[Any]) -> Rule:
        """Reads what `to_list` returned.

        Raises:
            ValueError: something else.
        """
        if len(data) not in (3, 5) or any(name not in FORMATS for name in map(str, data[3:])):
            raise ValueError(f"{data!r} is no rule: three numbers, and two formats of {', '.join(FORMATS)} or none")
        sink, alpha, beta_q = map(int, data[:3])
        return Rule(sink, alpha, beta_q, *map(str, data[3:]))

    def __str__(self) -> str:
        growth = f"+{self.beta_q / BETA_ONE:.3g}n" if self.beta_q else ""
        span = "full" if self.sees_all else f"{self.sink}|{self.alpha}{growth}"
        return span if self.is_native else f"{span} {self.key_format}/{self.value_format}"


Rule.FULL = Rule(sink=SINKS[0], alpha=0, beta_q=BETA_ONE)

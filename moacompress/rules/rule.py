"""What one KV head keeps, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from moacompress.rules.formats import NATIVE, all_formats, find_format, is_format
from moacompress.rules.windows import BETA_ONE, Span, kept, selected, slots, tokens_left, whole_blocks

SINKS = (4, 16, 64)
MIN_WINDOWS = (16, 32, 64)
MAX_ALPHA = (1 << 24) - 1
SCORE_BYTES = 2
"""Bytes of the score of a token that a gate may choose, which is kept beside its key and value."""


@dataclass(frozen=True, order=True)
class Rule:
    """What one KV head keeps, the first `sink` tokens and a window of `alpha + beta_q / 1024 * n` tokens, and in which formats.

    A rule that selects also keeps those of the tokens evicted from the window that its gate scores highest.

    Attributes:
        sink: first tokens that are always kept.
        alpha: fixed part of the window, tokens.
        beta_q: growth of the window per token in 1/1024.
        key_format: of its keys, one of `formats.all_formats`.
        value_format: of its values.
        select_alpha: fixed part of how many tokens a gate keeps; see `windows.selected`.
        select_beta_q: its growth per token evicted from the window, in 1/1024.
    """

    sink: int
    alpha: int
    beta_q: int
    key_format: str = NATIVE
    value_format: str = NATIVE
    select_alpha: int = 0
    select_beta_q: int = 0
    FULL: ClassVar[Rule]

    @property
    def sees_all(self) -> bool:
        """Whether every key (of a native window) is visible at every length."""
        return self.beta_q >= BETA_ONE

    @property
    def selects(self) -> bool:
        """Whether tokens evicted from the window can be kept by their score."""
        return bool(self.select_alpha or self.select_beta_q)

    @property
    def is_native(self) -> bool:
        """Whether keys and values are kept as the model computes them."""
        return self.key_format == self.value_format == NATIVE

    @property
    def is_full(self) -> bool:
        """Whether the KV head is as in the dense model."""
        return self.sees_all and self.is_native and not self.selects

    def in_formats(self, keys: str, values: str) -> Rule:
        """Returns the same span in a format of keys and one of values."""
        return replace(self, key_format=keys, value_format=values)

    def without_choice(self) -> Rule:
        """Returns the same rule without what a gate keeps."""
        return replace(self, select_alpha=0, select_beta_q=0)

    def span(self, min_window: int, native_window: int | None = None) -> Span:
        """Returns what decides which keys are visible, in a plan of this smallest window and a layer of this native one."""
        return Span(self.sink, self.alpha, self.beta_q, min_window, native_window or 0)

    def kept(self, n: Any, min_window: int, native_window: int | None = None) -> Any:
        """Returns the number of keys visible to query `n - 1` (`windows.kept`, and `windows.selected`)."""
        span = self.span(min_window, native_window)
        return kept(n, span) + self._selected(n, span)

    def slots(self, n: Any, min_window: int, native_window: int | None = None) -> Any:
        """Returns the tokens that the cache holds memory for (`windows.slots`, and those selected in blocks of their own)."""
        span = self.span(min_window, native_window)
        return slots(n, span) + whole_blocks(self._selected(n, span))

    def _selected(self, n: Any, span: Span) -> Any:
        return selected(tokens_left(n, span), self.select_alpha, self.select_beta_q)

    def token_bytes(self, head_dim: int, value_dim: int, dtype: str) -> int:
        """Returns the bytes of one token's key and value, and of its score where the rule selects."""
        keys, values = find_format(self.key_format), find_format(self.value_format)
        scores = SCORE_BYTES if self.selects else 0
        return keys.vector_bytes(head_dim, dtype) + values.vector_bytes(value_dim, dtype) + scores

    def to_list(self) -> list[Any]:
        """Returns the JSON form: its numbers, those of what it selects if it does, and its formats if one is not native."""
        numbers: list[Any] = [self.sink, self.alpha, self.beta_q]
        if self.selects:
            numbers += [self.select_alpha, self.select_beta_q]
        return numbers if self.is_native else [*numbers, self.key_format, self.value_format]

    @staticmethod
    def from_list(data: Sequence[Any]) -> Rule:
        """Reads what `to_list` returned.

        Raises:
            ValueError: something else.
        """
        formats = tuple(name for name in data if isinstance(name, str))
        numbers = data[: len(data) - len(formats)]
        known = all(map(is_format, formats)) and len(formats) in (0, 2)
        if len(numbers) not in (3, 5) or not known or any(isinstance(number, str) for number in numbers):
            raise ValueError(
                f"{data!r} is no rule: three numbers or five, and two formats of {', '.join(all_formats())} or none"
            )
        sink, alpha, beta_q, *select = map(int, numbers)
        keys, values = formats or (NATIVE, NATIVE)
        return Rule(sink, alpha, beta_q, keys, values, *select)

    def __str__(self) -> str:
        span = "full" if self.sees_all else f"{self.sink}|{_growing(self.alpha, self.beta_q)}"
        if self.selects:
            span += f" gate {_growing(self.select_alpha, self.select_beta_q)}"
        return span if self.is_native else f"{span} {self.key_format}/{self.value_format}"


def _growing(alpha: int, beta_q: int) -> str:
    return f"{alpha}+{beta_q / BETA_ONE:.3g}n" if beta_q else str(alpha)


Rule.FULL = Rule(sink=SINKS[0], alpha=0, beta_q=BETA_ONE)

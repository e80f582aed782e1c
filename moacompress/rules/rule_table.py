"""Rules as columns of integers: what cost, influence, cache, attention and the compiled kernels all take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.rules.formats import find_code, find_format
from moacompress.rules.rule import Rule
from moacompress.rules.windows import (
    Span,
    block_runs,
    selected,
    slots,
    tokens_left,
    visible_intervals,
    whole_blocks,
)

COLUMNS = (*Span._fields, "key_format", "value_format", "select_alpha", "select_beta_q")
"""What the columns of a table hold: the numbers of a `Span`, the codes of the two formats, and how many tokens a gate keeps."""
_FORMATS = slice(len(Span._fields), len(Span._fields) + 2)
_SELECT = slice(_FORMATS.stop, None)


@dataclass(frozen=True, eq=False)
class RuleTable:
    """The rules of a layer's KV heads, or candidates for one.

    Attributes:
        columns: int64 `[len(COLUMNS), rules]`, contiguous. A numpy array; a copy for a device has a tensor in its place, and
            says what is visible and nothing of blocks and bytes.
    """

    columns: Any

    @staticmethod
    def of(rules: Sequence[Rule], min_window: int, native_window: int | None = None) -> RuleTable:
        """Returns the table of rules, in their order, for a layer with this sliding window of its own, tokens, or None."""
        rows = [
            (
                *rule.span(min_window, native_window),
                *(find_format(name).code for name in (rule.key_format, rule.value_format)),
                rule.select_alpha,
                rule.select_beta_q,
            )
            for rule in rules
        ]
        return RuleTable(np.ascontiguousarray(np.array(rows, np.int64).reshape(-1, len(COLUMNS)).T))

    def in_layer(self, native_window: int | None) -> RuleTable:
        """Returns the same rules for a layer with another sliding window of its own, in tokens, or None."""
        columns = self.columns * 1  # a copy, of whatever kind of array it is
        columns[COLUMNS.index("native_window")] = native_window or 0
        return RuleTable(columns)

    def native(self) -> RuleTable:
        """Returns the same rules with all keys and values kept as the model computes them."""
        columns = self.columns * 1  # a copy, of whatever kind of array it is
        columns[_FORMATS] = 0
        return RuleTable(columns)

    def __len__(self) -> int:
        return int(self.columns.shape[1])

    @property
    def span(self) -> Span:
        """What decides which keys are visible, each int64 `[rules]`."""
        return Span(*self.columns[: len(Span._fields)])

    @property
    def is_native(self) -> bool:
        """Whether all keys and values are kept as the model computes them."""
        return self.formats is None

    @property
    def formats(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Codes of the formats of the keys and of the values, `[rules]` each; None where all are native."""
        keys, values = map(tuple, self.format_codes.tolist())
        return (keys, values) if any(keys) or any(values) else None

    @property
    def format_codes(self) -> Any:
        """Codes of the formats of the keys and of the values, int64 `[2, rules]`."""
        return self.columns[_FORMATS]

    @property
    def select(self) -> tuple[Any, Any]:
        """`select_alpha` and `select_beta_q`, int64 `[rules]` each."""
        alpha, beta_q = self.columns[_SELECT]
        return alpha, beta_q

    @property
    def selecting(self) -> Any:
        """Which rules keep tokens by their score, bool `[rules]`."""
        return self.columns[_SELECT].any(0)

    @property
    def selects(self) -> bool:
        """Whether some rule keeps tokens by their score."""
        return bool(self.columns[_SELECT].any())

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules, without the two windows that are not theirs."""
        rows = zip(*self.columns.tolist(), strict=True)
        return tuple(
            Rule(sink, alpha, beta_q, find_code(key).name, find_code(value).name, *select)
            for sink, alpha, beta_q, _, _, key, value, *select in rows
        )

    def visible_intervals(self, n: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Returns what queries at positions `n - 1`, `[...]`, see under every rule: bounds that broadcast to `[..., rules]`."""
        return visible_intervals(n[..., None], self.span)

    def block_runs(self, n: Ints) -> Ints:
        """Returns the blocks of sinks and window that every rule touches at `n` tokens, int64 `[...]`.

        They are `[RUNS, 2, ..., rules]`: begin and end of each run.
        """
        shape = (*n.shape, len(self))
        runs = block_runs(n[..., None], self.span)
        return np.stack([np.stack([np.broadcast_to(bound, shape) for bound in run]) for run in runs])

    def slots(self, n: Ints) -> Ints:
        """Returns the tokens that the cache holds memory for at `n` tokens, int64 `[..., rules]`."""
        return np.asarray(slots(n[..., None], self.span) + whole_blocks(self.selected(n)), np.int64)

    def tokens_left(self, n: Any) -> Any:
        """Returns how many tokens are evicted from the windows at `n` tokens, sinks not counted, int64 `[..., rules]`."""
        return tokens_left(n[..., None], self.span)

    def selected(self, n: Any) -> Any:
        """Returns how many tokens gates keep at `n` tokens, int64 `[..., rules]`."""
        return selected(self.tokens_left(n), *self.select)

    def token_bytes(self, head_dim: int, value_dim: int, dtype: str) -> Ints:
        """Returns the bytes of one token under every rule, int64 `[rules]`; see `Rule.token_bytes`."""
        return np.array([rule.token_bytes(head_dim, value_dim, dtype) for rule in self.rules], np.int64)

    def groups(self) -> list[tuple[Span, tuple[int, ...]]]:
        """Returns the numbers of the rules by span and formats, with that span: they are worked on together.

        All rules that see everything are one group. What gates keep is worked on apart.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(zip(*self.columns[: _FORMATS.stop].tolist(), strict=True)):
            if Rule(*row[:3]).sees_all:
                row = (*Rule.FULL.to_list(), *row[3:])
            found.setdefault(row, []).append(number)
        return [(Span(*row[: len(Span._fields)]), tuple(numbers)) for row, numbers in found.items()]

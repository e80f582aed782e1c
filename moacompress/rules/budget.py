"""Budgets: how many KV bytes a plan may take, and at which lengths.

Grammar: `25%` or `0.25` (share of the dense model's KV bytes, at every profiled length), `25%@8k` (at that length
only), `512MiB@32k` (absolute), `memory=6GiB@8k` (weights and the KV bytes of one row together). k is 1024. Several budgets
must all hold.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moacompress.core.errors import BudgetError, InfeasibleBudgetError
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import MAX_ALPHA

FORMS = "'25%', '0.25', '25%@8k', '512MiB@32k' or 'memory=6GiB@8k'"
MEMORY = "memory="
"""Before a budget that weights count for too."""
_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30}
_MOST_BYTES = 2**62
_SHORT_UNITS = {"k": "KiB", "kb": "KiB", "m": "MiB", "mb": "MiB", "g": "GiB", "gb": "GiB"}
"""What people write for them, though a thousand is no 1024."""
_AMOUNT = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>(?!e[-+]?\d)\S*)", re.IGNORECASE)


def parse_length(text: str) -> int:
    """Reads a token count: `4096` or `4k` (k is 1024).

    Raises:
        BudgetError: not a positive whole number of tokens.
    """
    match = re.fullmatch(r"(\d{1,8})(k?)", text.strip(), re.IGNORECASE)
    length = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if not 0 < length <= MAX_ALPHA:
        raise BudgetError(
            f"length {text!r} is not a number of tokens from 1 to {MAX_ALPHA:,}, such as '4096' or '4k' (k is 1024)"
        )
    return length


def parse_lengths(text: str) -> tuple[int, ...]:
    """Reads a list of lengths such as `1k,2k`, without repeats, shortest first."""
    return tuple(sorted({parse_length(part) for part in text.split(",")}))


def parse_bytes(text: str) -> int:
    """Reads a size of memory: `128M`, `128MiB` or `1.5GiB` (all in powers of 1024), or a number of bytes.

    Raises:
        BudgetError: something else, or nothing at all.
    """
    match = _AMOUNT.fullmatch(text.strip())
    unit = match["unit"].lower() if match else ""
    unit = _SHORT_UNITS.get(unit, unit).lower()
    size = int(float(match["number"]) * _UNITS.get(unit, 1)) if match and unit in ("", "b", *_UNITS) else 0
    if not 0 < size < _MOST_BYTES:
        raise BudgetError(f"size {text!r} is not understood; write bytes such as '128MiB', '128M' or '1GiB'")
    return size


def format_length(length: int) -> str:
    """Returns `4k` for 4096, `1000` for 1000."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def bytes_at(kv_bytes: int, length: int) -> str:
    """Returns `1,024 KV bytes at 8k tokens` for 1024 bytes at 8192 tokens."""
    return f"{kv_bytes:,} KV bytes at {format_length(length)} tokens"


@dataclass(frozen=True)
class Budget:
    """One budget: a share of dense, or bytes, at one length or at all; or bytes of weights and cache.

    Attributes:
        text: as the user gave it.
        share: fraction of the dense model's KV bytes; None where bytes are given.
        bytes: absolute number of bytes, or None.
        length: the only length where it must hold, or None for every profiled length.
        with_weights: whether the bytes are those of weights and cache together.
    """

    text: str
    share: float | None
    bytes: int | None
    length: int | None
    with_weights: bool = False

    @staticmethod
    def parse(text: str) -> Budget:
        """Reads one budget.

        Raises:
            BudgetError: what is wrong with it: empty, a sign, an unknown unit, a bare number above 1, a share outside
                (0, 100%], bytes without a length, or something after `@` that is no length.
        """
        given = str(text).strip()
        if "," in given:
            raise BudgetError(f"budget {given!r} names several plans; give one budget such as '25%' for each search")
        if not given:
            raise BudgetError(f"the budget is empty; write {FORMS}")
        if given.lower().startswith(MEMORY):
            return _parse_memory(given)
        amount, at, place = (part.strip() for part in given.partition("@"))
        if amount[:1] in ("-", "+"):
            raise BudgetError(f"budget {given!r} has a sign; write a share or bytes without one, {FORMS}")
        match = _AMOUNT.fullmatch(amount)
        if not match:
            raise BudgetError(f"budget {given!r} is not understood; write {FORMS}")
        number, unit = float(match["number"]), match["unit"].lower()
        if unit not in ("", "%", *_UNITS):
            raise BudgetError(f"budget {given!r} {_about_unit(match['number'], match['unit'], at + place)}")
        if at and not place:
            raise BudgetError(f"budget {given!r} names no length after '@'; write one such as '{amount}@8k'")
        length = parse_length(place) if at else None
        if unit in _UNITS:
            if length is None:
                raise BudgetError(f"budget {given!r} needs the length it holds at, such as '{given}@32k'")
            if number * _UNITS[unit] < 1:
                raise BudgetError(f"budget {given!r} is no bytes at all")
            if number * _UNITS[unit] >= _MOST_BYTES:
                raise BudgetError(f"budget {given!r} is more bytes than any memory has; write {FORMS}")
            return Budget(given, None, int(number * _UNITS[unit]), length)
        if not unit and number > 1:
            raise BudgetError(f"budget {given!r} is a bare number above 1; did you mean '{amount}%{at}{place}'?")
        share = number / 100 if unit == "%" else number
        if share <= 0:
            raise BudgetError(f"budget {given!r} is nothing at all, outside (0%, 100%]; write {FORMS}")
        if share > 1:
            raise BudgetError(f"budget {given!r} is more than the dense model takes, outside (0%, 100%]; write {FORMS}")
        return Budget(given, share, None, length)

    def limits(self, shape: ModelShape, lengths: Iterable[int], weight_bytes: int | None = None) -> dict[int, int]:
        """Returns the most KV bytes at each length that it restricts; one without a length holds at all of `lengths`.

        A budget of memory restricts nothing where the bytes of the weights are not known (None).
        """
        if self.with_weights:
            return {} if weight_bytes is None else {self.length or 0: max(0, (self.bytes or 0) - weight_bytes)}
        if self.length is not None:
            lengths = [self.length]
        if self.bytes is not None:
            return dict.fromkeys(lengths, self.bytes)
        assert self.share is not None
        share = Fraction(self.share).limit_denominator(10**9)  # as it was written: floats lose a byte of 29%
        return {length: int(share * shape.dense_kv_bytes(length)) for length in lengths}


def _parse_memory(given: str) -> Budget:
    """Reads `memory=6GiB@8k`.

    Raises:
        BudgetError: what is wrong with it.
    """
    amount = given[len(MEMORY) :].strip()
    try:
        found = Budget.parse(amount)
    except BudgetError as error:
        raise BudgetError(f"budget {given!r} is not understood: {error}") from error
    if found.bytes is None:
        raise BudgetError(
            f"budget {given!r} is of bytes at a length, weights and cache together, such as 'memory=6GiB@8k'"
        )
    return Budget(given, None, found.bytes, found.length, with_weights=True)


def any_memory(asked: Iterable[str]) -> bool:
    """Returns whether weights count for one of the budgets, which may still be wrong."""
    return any(str(text).strip().lower().startswith(MEMORY) for text in asked)


def memory_budgets(budgets: Iterable[Budget]) -> list[Budget]:
    """Returns the budgets that weights count for too."""
    return [budget for budget in budgets if budget.with_weights]


def _about_unit(number: str, unit: str, place: str) -> str:
    """Returns what is wrong with the unit of a budget, and what was perhaps meant; `place` follows it, with its `@`."""
    if unit.startswith("%"):
        return f"has {unit[1:]!r} after its '%'; did you mean '{number}%@{unit[1:].strip('@')}'?"
    known = _SHORT_UNITS.get(unit.lower())
    hint = f"; did you mean '{number}{known}{place or '@32k'}'?" if known else f"; write {FORMS}"
    return f"has the unit {unit!r}, which is not one of %, KiB, MiB and GiB{hint}"


def split_budgets(asked: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the budgets of every plan that is asked for: `["50%,25%", "512MiB@32k"]` asks for two plans.

    Commas ask for several plans, each with the other budgets too.

    Raises:
        BudgetError: one does not parse, or the same plan is asked for twice.
    """
    found = list(itertools.product(*([part.strip() for part in str(text).split(",")] for text in asked)))
    parsed = [[Budget.parse(text) for text in budgets] for budgets in found]
    if len(
        {tuple((one.share, one.bytes, one.length, one.with_weights) for one in budgets) for budgets in parsed}
    ) < len(found):
        raise BudgetError(
            f"the budgets {' and '.join(map(str, asked))} ask for the same plan twice; name every budget once"
        )
    return found


def label(budgets: Sequence[str]) -> str:
    """Returns budgets as part of a file's name: `25%@8k` is `25-8k`."""
    return "_".join(re.sub(r"[^0-9A-Za-z.]+", "-", text).strip("-") for text in budgets)


def byte_limits(
    budgets: Sequence[Budget], shape: ModelShape, lengths: Iterable[int], weight_bytes: int | None = None
) -> dict[int, int]:
    """Returns the most KV bytes at each length, when all budgets must hold; lengths ascending."""
    if not budgets:
        raise BudgetError(f"no budget given; write --budget with {FORMS}")
    limits: dict[int, int] = {}
    lengths = list(lengths)
    for budget in budgets:
        for length, limit in budget.limits(shape, lengths, weight_bytes).items():
            limits[length] = min(limit, limits.get(length, limit))
    return dict(sorted(limits.items()))


def reference_length(budgets: Sequence[Budget], lengths: Iterable[int]) -> int:
    """Returns the longest profiled length, unless a budget names one."""
    named = [budget.length for budget in budgets if budget.length is not None]
    return max(named) if named else max(lengths)


def check_feasible(limits: Mapping[int, int], smallest: Mapping[int, int], shape: ModelShape) -> None:
    """Refuses limits that are below the bytes of the smallest plan there is.

    Raises:
        InfeasibleBudgetError: names the length, both numbers and the smallest budget that works.
    """
    for length, limit in limits.items():
        if smallest[length] > limit:
            dense = shape.dense_kv_bytes(length)
            need = -(-1000 * smallest[length] // dense) / 10
            raise InfeasibleBudgetError(
                f"no plan fits {bytes_at(limit, length)} ({limit / dense:.1%} of dense): "
                f"the smallest takes {smallest[length]:,} bytes; ask for at least {need:.1f}% there"
            )

"""The time of a decode step under a plan, fitted to what a cost table measured at one length and number of rows.

A step takes what its weights take and, of every KV head, a time for being there and one for every token that it keeps. Keys and
values are read one after the other, so the time of a pair of formats is that of its keys plus that of its values:

    step = floor + sum over KV heads of [base(keys) + base(values) + (slope(keys) + slope(values)) * slots
                                         + where a gate selects: base(gate) + slope(gate) * selected slots]

All of these are at least 0, so keeping more never takes less. They are fitted by non-negative least squares to relative errors
(Lawson and Hanson, 1974), in which plans that are far off count less (Huber, 1964): where in memory a cache happens to lie can
make all steps of one plan slower. The floor is the step of KV heads that keep nothing in the formats of the least base: what
weights take, and everything else that is not attention to the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import ArtefactError
from moacompress.core.files import fingerprint
from moacompress.rules.budget import format_length
from moacompress.rules.cost_table import HeadGroup, Point, TimedCell
from moacompress.rules.formats import FORMATS
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

GATE = "gate"
NS_PER_MS = 1e6
HUBER = 2.0
"""Times the median error beyond which a plan counts less."""
ROBUST_TURNS = 20
"""Times that plans are weighed again."""


class Line(NamedTuple):
    """A time that grows with what is kept.

    Attributes:
        base: nanoseconds of a KV head.
        slope: nanoseconds of each token that memory is held for in a row; all rows of the cell together.
    """

    base: float
    slope: float

    def __call__(self, slots: Floats | Ints) -> Floats:
        """Returns the nanoseconds of a KV head."""
        return np.asarray(self.base + self.slope * slots, np.float64)


@dataclass(frozen=True)
class StepTime:
    """The fitted time of a step at one length and number of rows.

    Attributes:
        length: tokens in the cache of every row.
        rows: of the batch.
        keys: times of keys by format, above the floor.
        values: of values, likewise.
        gate: what a gate that selects adds, over what it selects.
        floor_ms: a step that keeps nothing.
        full_span_ms: the measured step at full span, which budgets are a share of.
        fit_error: largest relative error over what was fitted.
        median_error: median of these.
        check_error: largest relative error over plans that were measured and not fitted; None where there is none.
        fingerprint: of what was timed.
    """

    length: int
    rows: int
    keys: Mapping[str, Line]
    values: Mapping[str, Line]
    gate: Line | None
    floor_ms: float
    full_span_ms: float
    fit_error: float
    median_error: float
    check_error: float | None
    fingerprint: str

    @staticmethod
    def fit(cell: TimedCell) -> StepTime:
        """Fits what was timed."""
        fitted = [point for point in cell.points if point.use != "check"]
        rows = np.array([_features(point.groups) for point in fitted])
        ms = np.array([point.ms for point in fitted])
        parameters = _robust_nnls(rows / ms[:, None])
        heads = sum(group.heads for group in fitted[0].groups)
        lines = {
            name: Line(*(NS_PER_MS * parameters[2 * number : 2 * number + 2]))
            for number, name in enumerate(_NAMES)
            if rows[:, 2 * number].any()
        }
        floor = 0.0
        sides: list[dict[str, Line]] = []
        for side in ("keys", "values"):
            of_side = {name: line for (place, name), line in lines.items() if place == side}
            least = min(line.base for line in of_side.values())
            floor += least * heads
            sides.append({name: Line(line.base - least, line.slope) for name, line in of_side.items()})

        def error(point: Point) -> float:
            return abs(float(_features(point.groups) @ parameters) / point.ms - 1)

        checks = [error(point) for point in cell.points if point.use == "check"]
        return StepTime(
            length=cell.length,
            rows=cell.rows,
            keys=sides[0],
            values=sides[1],
            gate=lines.get((GATE, GATE)),
            floor_ms=floor / NS_PER_MS,
            full_span_ms=cell.full_span.ms,
            fit_error=max(map(error, fitted)),
            median_error=float(np.median([error(point) for point in fitted])),
            check_error=max(checks, default=None),
            fingerprint=fingerprint(cell.model_dump(mode="json")),
        )

    def head_ns(self, rules: Sequence[Rule], min_window: int, native_window: int | None) -> Ints:
        """Returns what a KV head adds to the floor under every rule, whole nanoseconds, int64 `[rules]`.

        Args:
            rules: as a plan has them: rules of a layer with a sliding window of its own select nothing.
            min_window: smallest window, tokens.
            native_window: the layer's own sliding window, or None.

        Raises:
            ArtefactError: a format, or gates, that the table has not measured.
        """
        n = np.array(self.length, np.int64)
        slots = RuleTable.of(rules, min_window, native_window).slots(n)
        bare = RuleTable.of([rule.without_choice() for rule in rules], min_window, native_window).slots(n)
        selects = np.array([rule.selects for rule in rules])
        total = np.zeros(len(rules))
        for lines, names in (
            (self.keys, [rule.key_format for rule in rules]),
            (self.values, [rule.value_format for rule in rules]),
        ):
            for name in dict.fromkeys(names):
                if name not in lines:
                    raise ArtefactError(
                        f"the cost table has not measured the format {name}; measure it again, or leave the format out"
                    )
                total += np.where(np.array(names) == name, lines[name](slots), 0.0)
        if selects.any():
            if self.gate is None:
                raise ArtefactError("the cost table has not measured gates; measure it again")
            total += np.where(selects, self.gate(slots - bare), 0.0)
        return np.asarray(np.ceil(total), np.int64)

    def above_floor_ns(self, plan: Plan) -> int:
        """Returns what all KV heads of a plan add to the floor, whole nanoseconds.

        Raises:
            ArtefactError: as `head_ns`.
        """
        rows = zip(plan.rules, plan.model.native_windows, strict=True)
        return sum(int(self.head_ns(row, plan.min_window, native).sum()) for row, native in rows)

    def step_ms(self, plan: Plan) -> float:
        """Returns the predicted time of a step under a plan, milliseconds.

        Raises:
            ArtefactError: as `head_ns`.
        """
        return self.floor_ms + self.above_floor_ns(plan) / NS_PER_MS

    def pair_rows(self) -> list[tuple[str, str, float]]:
        """Returns of every pair of formats its names and the microseconds of a thousand tokens that a KV head keeps."""
        return [
            (keys, values, self.keys[keys].slope + self.values[values].slope)
            for keys in self.keys
            for values in self.values
        ]


def step_lines(step_ms: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Returns what a step under a plan is predicted to take, a sentence for each place of the cost table; none without one.

    Args:
        step_ms: as a plan's notes have it: of each place, such as `8192x8` for 8 rows of 8,192 tokens, milliseconds
            `predicted`, at `full_span`, of weights alone (`floor`) and the most by the budget (`limit`, or None), and the
            fit's `error`.
    """
    lines = []
    for place, row in step_ms.items():
        length, rows = place.split("x")
        asked = "" if row["limit"] is None else f", at most {row['limit']:.4g} by the budget"
        off = "" if row["error"] is None else f"; plans that were not fitted are off by up to {row['error']:.1%}"
        lines.append(
            f"A step of {rows} rows at {format_length(int(length))} tokens: {row['predicted']:.4g} ms predicted{asked}; full "
            f"span {row['full_span']:.4g}, weights alone {row['floor']:.4g}{off}."
        )
    return lines


_NAMES = [*(("keys", name) for name in FORMATS), *(("values", name) for name in FORMATS), (GATE, GATE)]
"""What has a time: a base and a slope each, in this order."""


def _robust_nnls(rows: Floats) -> Floats:
    """Returns the parameters, at least 0, at which the products of all rows with them are as near 1 as can be.

    Rows that are further off than `HUBER` times the median count less, as in Huber's loss.

    Args:
        rows: `[points, parameters]`.
    """
    from scipy.optimize import nnls

    scale = np.maximum(rows.max(axis=0), 1e-300)
    scaled, weights = rows / scale, np.ones(len(rows))
    found: Floats = np.zeros(rows.shape[1])
    for _ in range(ROBUST_TURNS):
        root = np.sqrt(weights)
        found = nnls(scaled * root[:, None], root, maxiter=100 * rows.shape[1])[0]
        off = np.abs(scaled @ found - 1)
        near = max(HUBER * float(np.median(off)), 1e-9)
        weights = np.minimum(1.0, near / np.maximum(off, 1e-300))
    return np.asarray(found / scale, np.float64)


def _features(groups: Sequence[HeadGroup]) -> Floats:
    """Returns what each parameter is multiplied with, `[2 * len(_NAMES)]`: KV heads and tokens of every name."""
    found = dict.fromkeys(_NAMES, np.zeros(2))
    for group in groups:
        counts = np.array([group.heads, group.slots], np.float64)
        for name in (("keys", group.key_format), ("values", group.value_format)):
            found[name] = found[name] + counts
        if group.gated:
            found[GATE, GATE] = found[GATE, GATE] + np.array([group.heads, group.selected], np.float64)
    return np.concatenate([found[name] for name in _NAMES])

"""The few numbers that a study tunes: they bend the surrogate, and the solver turns the bent surrogate into a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moacompress.core.arrays import Floats
from moacompress.search.predict.surrogate import Surrogate

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DEPTH_KNOTS = 5
DEPTH_RANGE = 0.5
LENGTH_RANGE = 0.5
EXPONENT_RANGE = 0.25
COHERENCE_RANGE = 0.8
PRECISION_RANGE = (-2.5, 1.0)
"""Far below 0 too: spans may lose many times what is predicted of them, where formats do not."""
START_COHERENCE, START_PRECISION = 0.3, -1.0
"""Tried right after the surrogate's own plan."""


@dataclass(frozen=True)
class SearchParameters:
    """The search space of one model and its profiled lengths; all search parameters at 0 are the surrogate itself.

    All but `coherence` and `sharing` are logarithms.

    `depth_K`: multipliers of the cost, from the first layer to the last, interpolated between the knots.
    `length_N`: weight of the profiled length N, relative to the longest.
    `exponent`: exponent on the cost; above 0 it favours the costliest KV heads.
    `precision`: multiplier of what formats of keys and values cost, beside what spans cost; only where formats are on offer.
    `coherence`: share of the quadratic form, which knows what KV heads do together; see `quadratic`.
    `sharing`: layers that copy the attention of an earlier one, rounded; only where the search chooses how many do.

    Attributes:
        layers: layers of the model.
        lengths: profiled lengths, ascending.
        coherent: whether there is a quadratic form.
        formats: whether formats are on offer.
        shared: most layers that may share; 0 where that is not to be chosen.
    """

    layers: int
    lengths: tuple[int, ...]
    coherent: bool = False
    formats: bool = False
    shared: int = 0

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Each search parameter's smallest and largest value."""
        return {
            **{f"depth_{knot}": (-DEPTH_RANGE, DEPTH_RANGE) for knot in range(min(DEPTH_KNOTS, self.layers))},
            **{f"length_{length}": (-LENGTH_RANGE, LENGTH_RANGE) for length in self.lengths[:-1]},
            "exponent": (-EXPONENT_RANGE, EXPONENT_RANGE),
            **({"precision": PRECISION_RANGE} if self.formats else {}),
            **({"coherence": (0.0, COHERENCE_RANGE)} if self.coherent else {}),
            **({"sharing": (0.0, float(self.shared))} if self.shared else {}),
        }

    @property
    def neutral(self) -> dict[str, float]:
        """The values that leave the surrogate as it is."""
        return dict.fromkeys(self.ranges, 0.0)

    @property
    def starts(self) -> list[dict[str, float]]:
        """What is tried right after the neutral values."""
        found = [{**self.neutral, "precision": START_PRECISION}] if self.formats else []
        found += [{**self.neutral, "coherence": START_COHERENCE}] if self.coherent else []
        return [*found, {**self.neutral, "sharing": 1.0}] if self.shared else found

    def within(self, values: Mapping[str, float]) -> dict[str, float]:
        """Returns values that won in another search, none of them out of its range here; what is missing is neutral."""
        return {name: min(max(values.get(name, 0.0), low), high) for name, (low, high) in self.ranges.items()}

    def bend(self, surrogate: Surrogate, values: Mapping[str, float]) -> Floats:
        """Returns the costs of every rule under the search parameters, [layers, kv_heads, rules]; only their ratios count."""
        weights = np.exp([values.get(f"length_{length}", 0.0) for length in self.lengths])
        precision = float(np.exp(values.get("precision", 0.0)))
        costs: Floats = surrogate.costs(weights, precision) ** np.exp(values["exponent"])
        return costs * self._multipliers(values)[:, None, None]

    def _multipliers(self, values: Mapping[str, float]) -> Floats:
        knots: Sequence[float] = [values[name] for name in self.ranges if name.startswith("depth_")]
        at = np.linspace(0, len(knots) - 1, self.layers)
        return np.exp(np.interp(at, np.arange(len(knots)), knots))


def distributions(ranges: Mapping[str, tuple[float, float]]) -> dict[str, BaseDistribution]:
    """Returns search parameters, each with its smallest and largest value, in Optuna's terms."""
    from optuna.distributions import FloatDistribution

    return {name: FloatDistribution(low, high) for name, (low, high) in ranges.items()}

"""The statistics of profiled samples, and the estimators that predict KL from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from moacompress.core.arrays import Floats32

Doubles: TypeAlias = npt.NDArray[np.float64]

ESTIMATORS = ("robust", "fisher", "sample", "moa", "mass", "gold-fisher", "gold-sample")
"""Ways to predict KL; those after the first three need a profile with `profile.baselines`."""
OF_FORMATS = ESTIMATORS[:3]
"""Those that know what formats of keys and values cost."""
SIDES = ("key", "value")
"""What has a format, as names of arrays begin."""
DRAWN = ("total", *(f"{side}_total" for side in SIDES))
"""Arrays with an axis for the draw in front."""
OF_RULES = ("squares", "total", "first", "moa", "mass", "gold_squares", "gold_total")
"""Arrays with an axis for the rules, the last."""
POWER = 0.75
"""Exponent of the power mean over samples that makes `robust` of `fisher`.

KL is heavy-tailed over samples: a few of them decide a mean, and others decide that of the next ones. Below 1 they count
less. With 0.75 plans of one half of SmolLM2's samples cost least by the judgement of the other half's plain means."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the backward passes of a sample say (or of many: then every array has an axis for the sample in front).

    Attributes:
        arrays: by name, float32, `[layers, kv_heads, rules]` each:
            `squares`: `sum_i d_i^2` over the sample's rows, mean over the draws of the cotangent;
            `total`: `sum_i d_i` of each draw, so with an axis for the draw in front;
            `first`: around a plan, `sum_i d_i` from the gradient of KL(dense || plan), signed;
            `harm`: around a plan, KL(dense || plan) itself, nats per answer token, `[1]`;
            `key_squares`, `key_total`, `key_first`, `value_squares`, `value_total`, `value_first`: of formats instead of
                rules, `1 + formats` on the last axis, the native one first; see `precision.PrecisionSums`;
            `moa`, `mass`, `gold_squares`, `gold_total`: from the gold label; see `collectors.BaselineSums`;
            `distance`, `sink_mass`, `entropy`: of other shapes, see `heads.HeadSums`;
            `copy_squares`, `copy_totals`, `copy_cosine`: of other shapes, see `sharing.CopySums`.
    """

    arrays: Mapping[str, Floats32]

    @staticmethod
    def stack(samples: Sequence[Statistics]) -> Statistics:
        """Returns the statistics of many samples."""
        return Statistics({name: np.stack([one.arrays[name] for one in samples]) for name in samples[0].arrays})

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return all(bool(np.isfinite(array).all()) for array in self.arrays.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array."""
        return {name: array.shape for name, array in self.arrays.items()}

    def not_finite(self) -> str:
        """Returns of one sample the first array with a number that is not finite, and the layer; empty if there is none."""
        for name, array in self.arrays.items():
            bad = np.argwhere(~np.isfinite(array))
            if len(bad):
                return f"{name} of layer {bad[0][1 if name in DRAWN else 0]}"
        return ""

    def take(self, samples: npt.NDArray[np.int64]) -> Statistics:
        """Returns the statistics of some of many samples."""
        return Statistics({name: array[samples] for name, array in self.arrays.items()})

    def digest(self) -> str:
        """Returns a hash of all numbers."""
        digest = hashlib.sha256()
        for name in sorted(self.arrays):
            digest.update(name.encode())
            digest.update(self.arrays[name].tobytes())
        return digest.hexdigest()


def available(statistics: Statistics) -> tuple[str, ...]:
    """Returns the estimators that the statistics of samples allow."""
    return tuple(name for name in ESTIMATORS if _NEEDS[name] in statistics.arrays)


def power_mean(values: Doubles, power: float) -> Doubles:
    """Returns the power mean of non-negative numbers over the first axis."""
    mean: Doubles = (values**power).mean(0) ** (1 / power)
    return mean


def estimate(statistics: Statistics, estimator: str, samples: npt.NDArray[np.int64], side: str = "") -> Doubles:
    """Returns predicted KL in nats per answer token, a mean over some samples: `[layers, kv_heads, rules]`.

    Half the mean square predicts KL; MoA's sum is of absolute first-order changes of the loss; mass is a share.

    Args:
        statistics: of samples, their axis in front.
        estimator: one that is `available`; of formats one of `OF_FORMATS`.
        samples: indices of at least one.
        side: one of `SIDES`: predict what its formats cost, `[layers, kv_heads, 1 + formats]`; by default what rules do.
    """
    name = f"{side}_{_NEEDS[estimator]}" if side else _NEEDS[estimator]
    values = statistics.arrays[name][samples].astype(np.float64)
    return power_mean(_OF_SAMPLE[estimator](values), POWER if estimator == "robust" else 1.0)


def _same(values: Doubles) -> Doubles:
    return values


def _half(values: Doubles) -> Doubles:
    return values / 2


def _half_square(values: Doubles) -> Doubles:
    return values**2 / 2


_NEEDS = {
    "robust": "squares",
    "fisher": "squares",
    "sample": "total",
    "moa": "moa",
    "mass": "mass",
    "gold-fisher": "gold_squares",
    "gold-sample": "gold_total",
}
_OF_SAMPLE: dict[str, Callable[[Doubles], Doubles]] = {
    "robust": _half,
    "fisher": _half,
    "sample": lambda values: _half_square(values).mean(1),  # over the draws
    "moa": _same,
    "mass": _same,
    "gold-fisher": _half,
    "gold-sample": _half_square,
}

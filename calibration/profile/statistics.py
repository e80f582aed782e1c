"""The statistics of profiled samples, and the estimators that predict KL from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from moacompress.core.arrays import Floats32
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import SINKS

Doubles: TypeAlias = npt.NDArray[np.float64]

ROBUST = "robust"
"""The estimator that a search goes by, which also knows what formats and copies cost."""
ESTIMATORS = (ROBUST, "moa", "mass")
"""Ways to predict KL; those of others need a profile with `profile.baselines`."""
SIDES = ("key", "value")
"""What has a format, as names of arrays begin."""
DRAWN = ("total", *(f"{side}_total" for side in SIDES))
"""Arrays with an axis for the draw in front."""
OF_RULES = ("squares", "total", "moa", "mass")
"""Arrays with an axis for the rules, the last."""
DISTANCE_BINS = 18
"""Bins of the distance histograms: 0, 1, 2-3, 4-7, ... tokens; the last begins at 65,536."""
POWER = 0.75
"""Exponent of the power mean over samples.

KL is heavy-tailed over samples: a few of them decide a mean, and others decide that of the next ones. Below 1 they count
less. With 0.75 plans of one half of SmolLM2's samples cost least by the judgement of the other half's plain means."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the backward passes of a sample say (or of many: then every array has an axis for the sample in front).

    Attributes:
        arrays: by name, float32, `[layers, kv_heads, rules]` each:
            `squares`: `sum_i d_i^2` over the sample's rows, mean over the draws of the cotangent;
            `total`: `sum_i d_i` of each draw, so with an axis for the draw in front;
            `key_squares`, `key_total`, `value_squares`, `value_total`: of formats instead of rules, `1 + formats` on the last
                axis, the native one first; see `precision.PrecisionSums`;
            `moa`, `mass`: from the gold label; see `collectors.BaselineSums`;
            `distance`, `sink_mass`, `entropy`: of other shapes, see `heads.HeadSums`;
            `copy_squares`, `copy_cosine`: of other shapes, see `sharing.CopySums`.
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
    return tuple(name for name in ESTIMATORS if _array(name) in statistics.arrays)


def estimate(statistics: Statistics, estimator: str, samples: npt.NDArray[np.int64], side: str = "") -> Doubles:
    """Returns predicted KL in nats per answer token, a mean over some samples: `[layers, kv_heads, rules]`.

    With one of `SIDES` it is what that side's formats cost, `[layers, kv_heads, 1 + formats]`, which only `ROBUST` knows.
    MoA's sum is of absolute first-order changes of the loss; mass is a share.
    """
    name = _array(estimator)
    values = statistics.arrays[f"{side}_{name}" if side else name][samples]
    return kl_of_squares(values) if estimator == ROBUST else values.astype(np.float64).mean(0)


def kl_of_squares(squares: Floats32) -> Doubles:
    """Returns the KL that mean squares of samples predict, half of them, as a power mean over the first axis."""
    kl: Doubles = ((squares.astype(np.float64) / 2) ** POWER).mean(0) ** (1 / POWER)
    return kl


def _array(estimator: str) -> str:
    return "squares" if estimator == ROBUST else estimator


def array_shapes(chosen: ProfileRecipe, shape: ModelShape, rules: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array of a sample's statistics, for so many rules."""
    size = (shape.layers, shape.kv_heads, rules)
    names = ["squares"]
    names += ["moa", "mass"] if chosen.baselines else []
    heads = {"distance": (*size[:2], DISTANCE_BINS), "sink_mass": (*size[:2], len(SINKS)), "entropy": size[:2]}
    pairs = size[0], chosen.anchors, size[1], size[1]
    formats = (*size[:2], 1 + len(chosen.formats))
    return {
        "total": (chosen.draws, *size),
        **dict.fromkeys(names, size),
        **{f"{side}_squares": formats for side in (SIDES if chosen.formats else ())},
        **{f"{side}_total": (chosen.draws, *formats) for side in (SIDES if chosen.formats else ())},
        **(heads if chosen.heads else {}),
        **dict.fromkeys(("copy_squares", "copy_cosine") if chosen.anchors else (), pairs),
    }

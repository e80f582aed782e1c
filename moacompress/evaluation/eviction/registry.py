"""The known ways to evict tokens by name: ours, and those of installed packages."""

from __future__ import annotations

import functools

from moacompress.core.plugins import BASELINES as OUTSIDE
from moacompress.core.plugins import named_plugins
from moacompress.evaluation.eviction.baseline import Baseline, PromptBaseline, StreamBaseline
from moacompress.evaluation.eviction.key_scores import ExpectedAttention, KeyDiff
from moacompress.evaluation.eviction.kvzip import KVzip
from moacompress.evaluation.eviction.streams import H2O, StreamingLLM
from moacompress.evaluation.eviction.window_scores import AdaKV, PyramidKV, SnapKV
from moacompress.search.baselines.families import BASELINES as PLANS

_OURS: tuple[type[Baseline], ...] = (
    StreamingLLM,
    H2O,
    SnapKV,
    PyramidKV,
    AdaKV,
    ExpectedAttention,
    KeyDiff,
    KVzip,
)
EVICTIONS: dict[str, type[Baseline]] = {kind.name: kind for kind in _OURS}
"""Those of this package; see `known_evictions`."""


@functools.cache
def known_evictions() -> dict[str, type[Baseline]]:
    """Returns all ways to evict by their names: ours, and those of installed packages.

    These are classes, in the entry points of `moacompress.baselines`. What is none, or has a name that is taken, is left out
    with a warning.
    """
    outside = named_plugins(
        OUTSIDE,
        "class of a baseline",
        lambda given: isinstance(given, type) and issubclass(given, PromptBaseline | StreamBaseline),
        lambda name: name in (*EVICTIONS, *PLANS, "dense", "plan") or ":" in name,
    )
    return {**EVICTIONS, **outside}

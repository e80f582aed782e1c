"""The known ways to evict tokens by name: ours, and those of installed packages."""

from __future__ import annotations

import functools
import logging

from moacompress.core.plugins import BASELINES as OUTSIDE
from moacompress.core.plugins import plugins
from moacompress.evaluation.eviction.baseline import Baseline, PromptBaseline, StreamBaseline
from moacompress.evaluation.eviction.key_scores import ExpectedAttention, KeyDiff
from moacompress.evaluation.eviction.kvzip import KVzip
from moacompress.evaluation.eviction.streams import H2O, StreamingLLM
from moacompress.evaluation.eviction.window_scores import AdaKV, PyramidKV, SnapKV
from moacompress.search.baselines.families import BASELINES as PLANS

logger = logging.getLogger(__name__)

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
    found = dict(EVICTIONS)
    for name, kind in plugins(OUTSIDE):
        what = f"{name}, an entry point of {OUTSIDE},"
        if not (isinstance(kind, type) and issubclass(kind, PromptBaseline | StreamBaseline)):
            logger.warning("%s is no class of a baseline and is left out: %r", what, kind)
        elif kind.name in (*found, *PLANS, "dense", "plan") or ":" in kind.name:
            logger.warning("%s has the name of another baseline, %s, and is left out", what, kind.name)
        else:
            found[kind.name] = kind
    return found

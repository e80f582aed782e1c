"""The known ways to evict tokens by name: ours, and those of installed packages.

`snapkv:window=16:int4:seen` is a method, settings of its own that differ from its defaults, the format of what it keeps, and
whether it has seen the question.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import takewhile
from typing import Any

from moacompress.core.errors import UsageError, did_you_mean
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


def read_baseline(name: str) -> tuple[Baseline, list[str]] | None:
    """Returns a way to evict as its name says it, and the parts behind its settings; None where no method is named.

    Args:
        name: such as `snapkv`, `h2o:recent=0.25` or `snapkv:window=16:kernel=7:seen`.

    Raises:
        UsageError: a setting that the method does not have, or a value that it cannot have.
    """
    method, *parts = name.split(":")
    kind = known_evictions().get(method)
    if kind is None:
        return None
    settings = list(takewhile(lambda part: "=" in part, parts))
    try:
        return kind(**_settings(kind, settings)), parts[len(settings) :]
    except UsageError as error:
        raise UsageError(f"cannot evaluate against {name!r}: {error}") from error


def baseline_name(baseline: Baseline) -> str:
    """Returns the name by which `read_baseline` makes an equal one."""
    if not is_dataclass(baseline):
        return baseline.name
    values = [(one, getattr(baseline, one.name)) for one in fields(baseline)]
    changed = [f"{one.name}={_said(value)}" for one, value in values if value != one.default]
    return ":".join((baseline.name, *changed))


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settings(kind: type[Baseline], parts: Sequence[str]) -> dict[str, Any]:
    """Returns the settings of `name=value` each, as numbers of the kind that the default is."""
    known: dict[str, Any] = {}
    if is_dataclass(kind):
        known = {one.name: one.default for one in fields(kind) if type(one.default) in _KINDS}
    found: dict[str, Any] = {}
    for part in parts:
        setting, _, value = part.partition("=")
        if setting not in known:
            listed = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{kind.name} has no setting {setting!r}; {did_you_mean(setting, known, listed)}")
        default = known[setting]
        try:
            found[setting] = _BOOLEANS[value.lower()] if isinstance(default, bool) else type(default)(value)
        except (KeyError, ValueError) as error:
            raise UsageError(f"{setting} is {value!r}, and must be {_KINDS[type(default)]}") from error
    return found


_BOOLEANS = {"true": True, "false": False}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}

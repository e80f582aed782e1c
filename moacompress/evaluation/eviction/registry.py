"""The known ways to evict tokens by name: ours, and those of installed packages.

`snapkv:window=16:int4:seen` is a method, settings of its own that differ from its defaults, the format of what it keeps, and
whether it has seen the question.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
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
from moacompress.rules.formats import CODED, NATIVE, is_format
from moacompress.search.baselines.families import BASELINES as PLANS

UNSEEN, SEEN = "unseen", "seen"
"""What a method that evicts after a prompt may know of the question."""
_OURS: tuple[type[Baseline], ...] = (
    *(StreamingLLM, H2O),
    *(SnapKV, PyramidKV, AdaKV, ExpectedAttention, KeyDiff, KVzip),
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


def eviction_names() -> tuple[str, ...]:
    """Returns the names without settings: of methods, and of these with what they know of the question or a format."""
    known = known_evictions()
    once = [name for name, kind in known.items() if issubclass(kind, PromptBaseline)]
    return (*known, *(f"{name}:{behind}" for name in once for behind in (UNSEEN, SEEN, *CODED)))


def is_eviction(name: str) -> bool:
    """Returns whether a name is that of a way to evict, with settings or without.

    Raises:
        UsageError: a setting or a format that the method does not have, or a value that it cannot have.
    """
    return read_eviction(name) is not None


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names with a method that evicts after a prompt in both its settings, without repeats."""
    found: dict[str, None] = {}
    for name in names:
        read = read_eviction(name)
        if read is None:
            found[name] = None
        else:
            baseline, format, question = read
            asked = _questions(type(baseline)) if question is None else (question,)
            found |= dict.fromkeys(eviction_name(baseline, format, each) for each in asked)
    return tuple(found)


def read_eviction(name: str) -> tuple[Baseline, str, str | None] | None:
    """Returns a way to evict, the format of what it keeps, and what it knows of the question; None of other names.

    What it knows is None where the name leaves that open.

    Raises:
        UsageError: a setting or a format that the method does not have, or a value that it cannot have.
    """
    method, *parts = name.split(":")
    kind = known_evictions().get(method)
    if kind is None:
        return None
    settings = list(takewhile(lambda part: "=" in part, parts))
    behind = parts[len(settings) :]
    try:
        baseline = kind(**_settings(kind, settings))
    except UsageError as error:
        raise UsageError(f"cannot evaluate against {name!r}: {error}") from error
    format = behind.pop(0) if behind and is_format(behind[0]) else NATIVE
    question = behind.pop(0) if behind else None
    if behind or question not in (None, *_questions(kind)):
        return None
    if format != NATIVE and isinstance(baseline, StreamBaseline):
        raise UsageError(
            f"cannot evaluate against {name!r}: {baseline.name} evicts as it reads, and only what is kept of a prompt that was "
            f"read is rounded; leave {format} out, or choose a method that evicts after a prompt"
        )
    return baseline, format, question


def eviction_name(baseline: Baseline, format: str, question: str | None) -> str:
    """Returns the shortest name that `read_eviction` reads so, such as `snapkv:window=16:int4:seen`."""
    settings: list[str] = []
    if is_dataclass(baseline):
        for one in fields(baseline):
            value = getattr(baseline, one.name)
            if value != one.default:
                settings.append(f"{one.name}={str(value).lower() if isinstance(value, bool) else value}")
    return ":".join(filter(None, (baseline.name, *settings, format if format != NATIVE else None, question)))


def _questions(kind: type[Baseline]) -> tuple[str | None, ...]:
    """Returns what a method may know of the question as it evicts; None where that is not asked."""
    return (None,) if issubclass(kind, StreamBaseline) else (UNSEEN, SEEN)


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

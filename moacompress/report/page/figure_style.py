"""What all pictures of a page have in common: who has which colour and mark, and what a picture is.

Colours are Okabe and Ito's, which colour-blind people can tell apart, lighter ones on a dark page; every side has a mark of its
own too. A trace names its side in `meta.role`, and the page gives it the colour of its theme.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Trace = dict[str, Any]

ROLES: dict[str, tuple[str, str, str]] = {
    "plan": ("#0072B2", "#56B4E9", "circle"),
    "dense": ("#5A5A5A", "#C8C8C8", "square"),
    "uniform": ("#D55E00", "#FF9A4D", "triangle-up"),
    "other-1": ("#009E73", "#3FD1A4", "diamond"),
    "other-2": ("#AA4499", "#E6A6CB", "x"),
    "other-3": ("#B8860B", "#F0C75E", "cross"),
    "other-4": ("#332288", "#A79BF0", "star"),
    "other-5": ("#661100", "#E08A77", "pentagon"),
    "faint": ("#8A8A8A", "#8A8A8A", "circle"),
}
"""Of every role its colour on a light and on a dark page, and its mark."""
OTHERS = tuple(name for name in ROLES if name.startswith("other-"))
_TAG = re.compile(r"<(?!/?(?:b|br|extra)>)")
"""The start of a tag that no picture has of its own."""


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: unique on the page.
        title: said above it.
        traces: as plotly takes them.
        layout: likewise, without colours.
        note: a sentence below it.
        columns: of the table of the same numbers.
        rows: of that table.
    """

    name: str
    title: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any]
    note: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    @property
    def file_stem(self) -> str:
        """Its name as that of a file: a name may hold what a file says, and a file's may lead nowhere else."""
        return re.sub(r"[^A-Za-z0-9_-]", "_", self.name)

    def figure(self) -> dict[str, Any]:
        """Returns the figure as JSON values, checked by plotly, which would obey tags: those of the data are shown as text.

        Raises:
            ImportError: plotly is not installed.
        """
        from plotly.graph_objects import Figure

        found = Figure({"data": list(self.traces), "layout": dict(self.layout)}).to_plotly_json()
        del found["layout"]["template"]
        return {"data": without_tags(found["data"]), "layout": without_tags(found["layout"])}


def without_tags(value: Any) -> Any:
    """Returns JSON values in whose texts plotly finds no link and no style: a task may have any name in a file."""
    if isinstance(value, Mapping):
        return {key: without_tags(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_tags(item) for item in value]
    return _TAG.sub("&lt;", value) if isinstance(value, str) else value


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """Returns the role of each of several sides: plan, dense and uniform have their own, the others take turns."""
    found: dict[str, str] = {}
    for name in names:
        kind = name.split(":")[0].removesuffix("-elastic")
        if name in found:
            continue
        free = len([role for role in found.values() if role in OTHERS])
        taken = kind in found.values()
        found[name] = kind if kind in ("plan", "dense", "uniform") and not taken else OTHERS[free % len(OTHERS)]
    return found


def dots(role: str, name: str, x: Sequence[Any], y: Sequence[Any], **more: Any) -> Trace:
    """Returns a trace of marks in a role's colour."""
    colour, _, mark = ROLES[role]
    marker = {"color": colour, "symbol": mark, "size": 8} | more.pop("marker", {})
    trace: Trace = {"type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": list(y)}
    return trace | {"marker": marker, "meta": {"role": role}, **more}


def lines(role: str, name: str, x: Sequence[Any], y: Sequence[Any], **more: Any) -> Trace:
    """Returns a trace of marks that a line joins."""
    line = {"color": ROLES[role][0], "width": 2} | more.pop("line", {})
    return dots(role, name, x, y, line=line, **{"mode": "lines+markers", **more})


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Returns an axis."""
    return {"title": {"text": title}, "automargin": True, **more}


def intervals(values: Sequence[float], ends: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Returns error bars.

    Args:
        values: what was measured.
        ends: low and high of each.
    """
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
        "arrayminus": [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
        "thickness": 1.2,
        "width": 3,
    }

"""A picture of the page, and what all pictures have in common: the colours and marks of sides, axes, bars and lines.

Colours are Okabe and Ito's, which colour-blind people can tell apart, lighter ones on a dark page; every side has a mark of its
own too. A trace names its side in `meta.role`, and the page gives it the colour of its theme.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moacompress.core.errors import UsageError, one_line
from moacompress.core.tables import Table

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
PNG_LAYOUT = {
    "template": "plotly_white",
    "width": 900,
    "margin": {"l": 10, "r": 10, "t": 60, "b": 10},
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
}
PNG_SCALE = 2
PNG_NEEDS = (
    'PNG files need kaleido and a Chrome or Chromium ({}); pip install "moacompress[report]", and install a browser with '
    "`plotly_get_chrome` or your system's packages"
)
PNG_ATTEMPTS = 2
"""On a busy machine kaleido now and then calls its page before the scripts of it have run."""
_TAG = re.compile(r"<(?!/?(?:b|br|extra)>)")
"""The start of a tag that no picture has of its own."""


class Picture(Table):
    """A table of the page that is drawn too, with a name of its own; traces and layout are plotly's, without colours."""

    def __init__(
        self,
        name: str,
        title: str,
        traces: Sequence[Trace],
        layout: Mapping[str, Any],
        note: str = "",
        columns: Sequence[str] = (),
        rows: Iterable[Sequence[str]] = (),
    ) -> None:
        super().__init__(title, columns, rows, note)
        self.name, self.traces, self.layout = name, traces, layout

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
        return {"data": _without_tags(found["data"]), "layout": _without_tags(found["layout"])}

    def png(self) -> bytes:
        """Returns the picture on white as PNG, as kaleido draws it with a Chrome that is installed.

        Raises:
            UsageError: kaleido is not installed, or it finds no browser.
        """
        from plotly.graph_objects import Figure

        drawn: Any = Figure(self.figure())
        drawn.update_layout(**PNG_LAYOUT, title={"text": _without_tags(self.title)})
        for attempt in range(PNG_ATTEMPTS):
            try:
                image: bytes = drawn.to_image("png", scale=PNG_SCALE)
                break
            except (ImportError, ValueError, RuntimeError) as error:
                if attempt == PNG_ATTEMPTS - 1:
                    raise UsageError(PNG_NEEDS.format(one_line(error))) from error
        return image


def _without_tags(value: Any) -> Any:
    """Returns JSON values in whose texts plotly finds no link and no style: a task may have any name in a file."""
    if isinstance(value, Mapping):
        return {key: _without_tags(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tags(item) for item in value]
    return _TAG.sub("&lt;", value) if isinstance(value, str) else value


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """Returns the role of each of several sides: plan, dense and uniform have their own, the others take turns."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        kind = name.split(":")[0].removesuffix("-elastic")
        free = len([role for role in found.values() if role in OTHERS])
        taken = kind in found.values()
        found[name] = kind if kind in ("plan", "dense", "uniform") and not taken else OTHERS[free % len(OTHERS)]
    return found


def dots(role: str, name: str, x: Sequence[Any], y: Sequence[Any], **more: Any) -> Trace:
    """Returns a trace of marks in a role's colour."""
    colour, _, mark = ROLES[role]
    trace: Trace = {"type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": list(y)}
    return trace | {"marker": {"color": colour, "symbol": mark, "size": 8}, "meta": {"role": role}, **more}


def lines(role: str, name: str, x: Sequence[Any], y: Sequence[Any], **more: Any) -> Trace:
    """Returns a trace of marks that a line joins."""
    line = {"color": ROLES[role][0], "width": 2} | more.pop("line", {})
    return dots(role, name, x, y, line=line, **{"mode": "lines+markers", **more})


def bars(colour: str, name: str, x: Sequence[Any], y: Sequence[str], **more: Any) -> Trace:
    """Returns a trace of horizontal bars, `x` long, at the categories `y`."""
    return {"type": "bar", "orientation": "h", "name": name, "x": x, "y": y, "marker": {"color": colour}, **more}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Returns an axis."""
    return {"title": {"text": title}, "automargin": True, **more}


def bar_layout(title: str, names: Sequence[str], height: int, mode: str, **more: Any) -> dict[str, Any]:
    """Returns the layout of horizontal bars from 0, the first of the categories `names` on top."""
    categories = axis("", autorange="reversed", type="category", categoryorder="array", categoryarray=names)
    return {"barmode": mode, "xaxis": axis(title, rangemode="tozero", **more), "yaxis": categories, "height": height}


def intervals(values: Sequence[float], ends: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Returns error bars of values, each with the low and high end of its interval."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
        "arrayminus": [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
        "thickness": 1.2,
        "width": 3,
    }

"""What an audit found, for people: a table of the estimators, and a scatter plot of predicted against measured KL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from moacompress.core.artefact_names import page_file
from moacompress.core.files import write_text
from moacompress.core.statistics import estimate_text
from moacompress.core.tables import readable_number, section
from moacompress.report.search_tables import MOA_NOTE
from moacompress.rules.rule import Rule

logger = logging.getLogger(__name__)

Data = Mapping[str, Any]
RATIO_COLUMNS = ("", "Spearman", "measured / predicted [10% 90%]", "n")


def audit_tables(audit: Data) -> list[RenderableType]:
    """Returns the tables of an audit: the estimators on ablations and on plans, differences to MoA, split halves.

    Args:
        audit: the `data` of a `search.audit.Audit`.
    """
    chosen = audit["estimator"]
    title = f"{len(audit['points'])} ablations of one KV head on {audit['samples']} held-out samples, 95% intervals"
    rows: list[tuple[str, ...]] = [
        (_name(name, chosen), _number(row, "spearman", "ci95"), _number(row, "slope", "slope_ci95"), str(row["n"]))
        for name, row in audit["audit"].items()
    ]
    shown: list[RenderableType] = [section(title, ("", "Spearman", "slope", "n"), rows)]
    if audit["audit_plans"]:
        title = (
            f"{len(audit['plans'])} plans at {audit['budget']}; regret: KL of the one predicted best, above the best"
        )
        rows = [
            (
                _name(name, chosen),
                _number(row, "spearman", "ci95"),
                _number(row, "slope", "slope_ci95"),
                readable_number(row["regret"], ".1%"),
                str(row["n"]),
            )
            for name, row in audit["audit_plans"].items()
        ]
        shown.append(section(title, ("", "Spearman", "slope", "regret", "n"), rows))
    if "audit_precision" in audit:
        shown.append(_formats_section(audit["audit_precision"]))
    if "audit_sharing" in audit:
        shown.append(_sharing_section(audit["audit_sharing"], audit.get("audit_repair")))
    names = dict.fromkeys(("fisher", chosen)) if "fisher_minus_moa" in audit else {}
    for name in names:
        row = audit["fisher_minus_moa" if name == "fisher" else "chosen_minus_moa"]
        shown.append(f"Spearman of {name} minus that of moa: {_number(row, 'value', 'ci95')}")
    if names:
        shown.append(MOA_NOTE)
    if audit["split_half"]:
        title = f"KL of the plan of half the samples, times that of the other half's own, at {audit['budget']}"
        rows = [(str(row["samples"]), f"{row['ratio']:.2f}", f"{row['max']:.2f}") for row in audit["split_half"]]
        shown.append(section(title, ("samples", "mean ratio", "largest"), rows))
    return [*shown, "* the estimator that the search goes by"]


def _formats_section(found: Data) -> RenderableType:
    """Returns the table of single KV heads in other formats, all of them and by kind."""
    rows = [_ratio_row(name, row) for name, row in [("all", found), *found["kinds"].items()]]
    title = f"{found['n']} KV heads with keys or values in another format, as {found['estimator']} predicts it"
    return section(title, RATIO_COLUMNS, rows)


def _sharing_section(found: Data, repaired: Data | None) -> RenderableType:
    """Returns the table of single layers that copy, and of some of them once repaired."""
    title = f"{found['n']} layers that copy an earlier one's attention, as {found['estimator']} predicts it"
    rows = [_ratio_row("as they are", found), *([_ratio_row("repaired", repaired)] if repaired else [])]
    return section(title, RATIO_COLUMNS, rows)


def _ratio_row(name: str, row: Data) -> tuple[str, ...]:
    return name, _number(row, "spearman", "ci95"), _number(row, "ratio", "ratio_range"), str(row["n"])


def _name(name: str, chosen: str) -> str:
    return f"{name}*" if name == chosen else name


def _number(row: Data, value: str, interval: str) -> str:
    """Returns `0.95 [0.87, 0.98]`, `-` where it could not be computed."""
    return "-" if row[value] is None else estimate_text(row[value], row[interval])


def scatter_html(audit: Data) -> str:
    """Returns a page of its own: measured against predicted KL on logarithmic axes, a trace for each estimator.

    One panel for the ablations, one for the plans, one for single formats and two for copies (these not calibrated), each
    with the line where both are equal.

    Args:
        audit: the `data` of a `search.audit.Audit`.

    Raises:
        ImportError: plotly is not installed.
    """
    from plotly import colors
    from plotly.subplots import make_subplots

    panels: list[tuple[str, Sequence[Data], Callable[[Data], str]]] = [
        (f"{len(audit['points'])} ablations of one KV head", audit["points"], _point_note)
    ]
    if audit["plans"]:
        panels.append((f"{len(audit['plans'])} plans at {audit['budget']}", audit["plans"], _plan_note))
    for of, held, title, note in _PREDICTED:
        if of in audit:
            name = audit[of]["estimator"]
            found = [{**point, "calibrated": {name: point["predicted"]}} for point in audit[held]]
            panels.append((title.format(len(found)), found, note))
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=[title for title, _, _ in panels])
    palette = colors.qualitative.Plotly
    for column, (_, points, note) in enumerate(panels, start=1):
        for index, name in enumerate(audit["audit"]):
            if not all(name in point["calibrated"] for point in points):
                continue
            figure.add_scatter(
                x=[point["calibrated"][name] or None for point in points],
                y=[point["measured"] or None for point in points],
                text=[note(point) for point in points],
                mode="markers",
                marker={"color": palette[index % len(palette)], "opacity": 0.7},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                visible=True if name in (audit["estimator"], "moa") else "legendonly",
                row=1,
                col=column,
            )
        kls = [point["measured"] for point in points if point["measured"]]
        if kls:
            ends = [min(kls), max(kls)]
            line = {"color": "gray", "dash": "dot"}
            figure.add_scatter(
                x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", showlegend=False, row=1, col=column
            )
    figure.update_xaxes(type="log", title="predicted, calibrated (nats per answer token)", exponentformat="power")
    figure.update_yaxes(type="log", title="measured (nats per answer token)", exponentformat="power")
    figure.update_layout(title=f"Predicted and measured KL: {audit['model']}", template="plotly_white")
    page: str = figure.to_html(include_plotlyjs=True, full_html=True, div_id="audit")
    return page


def write_scatter(path: Path, audit: Data) -> None:
    """Writes `scatter_html` beside an audit's file where it is not there yet; without plotly one line says how to get it."""
    page = page_file(path)
    if page.exists():  # a new audit has removed the page of the one before
        return
    try:
        write_text(page, scatter_html(audit))
    except ImportError:
        logger.warning(
            'no plot was made: it needs plotly; pip install "moacompress[report]" and run the same command again'
        )


def _point_note(point: Data) -> str:
    return f"layer {point['layer']} KV head {point['kv_head']}, {Rule(**point['rule'])}"


def _format_note(point: Data) -> str:
    return f"layer {point['layer']} KV head {point['kv_head']}, {point['side']}s in {point['format']}"


def _copy_note(point: Data) -> str:
    return f"layer {point['layer']} of layer {point['anchor']}"


def _plan_note(plan: Data) -> str:
    return f"plan {plan['key']}, noise {plan['noise']:.2f}"


_PREDICTED: tuple[tuple[str, str, str, Callable[[Data], str]], ...] = (
    ("audit_precision", "precision_points", "{} KV heads in another format", _format_note),
    ("audit_sharing", "sharing_points", "{} layers that copy", _copy_note),
    ("audit_repair", "repair_points", "{} of them, repaired", _copy_note),
)
"""Panels of what one estimator predicts without calibration: part of an audit, its points, title and note of a point."""

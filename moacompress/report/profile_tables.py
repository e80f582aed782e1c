"""What a profile, its gates and its audit came to: tables, and a scatter plot of predicted against measured KL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from moacompress.core.artefact_names import page_file
from moacompress.core.files import write_text
from moacompress.core.tables import Columns, Table, error_text, estimate_text, facts, readable_number
from moacompress.report.search_tables import MOA_NOTE
from moacompress.rules.budget import format_length
from moacompress.rules.rule import Rule

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile

logger = logging.getLogger(__name__)

Data = Mapping[str, Any]
SCORES = ("gate", "recency", "oracle")
"""By what tokens are selected: gates, how recent they are, and the influence itself."""
RANK: Columns = {"": lambda row: row["name"], "Spearman": lambda row: estimate_text(row["spearman"], row["ci95"])}
COUNT: Columns = {"n": lambda row: str(row["n"])}
REGRET: Columns = {"regret": lambda row: readable_number(row["regret"], ".1%")}
RATIO: Columns = {"measured / predicted [10% 90%]": lambda row: estimate_text(row["ratio"], row["ratio_range"])}
HALVES: Columns = {
    "samples": lambda row: str(row["samples"]),
    "mean ratio": lambda row: f"{row['ratio']:.2f}",
    "largest": lambda row: f"{row['max']:.2f}",
}


def profile_table(profile: Profile) -> Table:
    """Returns what a profile is of."""
    shape = profile.shape
    rows = {
        "model": f"{profile.source}: {shape.model_type}, {shape.layers} layers x {shape.kv_heads} KV heads, {shape.dtype}",
        "lengths": ", ".join(map(format_length, profile.lengths)),
        "rules": f"{len(profile.rules)} on each KV head",
        "formats": ", ".join(("native", *profile.profiled_formats)),
    }
    return facts("Profile", rows)


def gate_table(report: Data) -> Table:
    """Returns how much influence is left out where tokens are selected by gates, by recency and by the influence itself."""

    def left(name: str) -> Callable[[Data], str]:
        return lambda row: error_text(row[name][0], row[name][1], ".2f")

    def left_of_all(name: str) -> Callable[[Data], str]:
        return lambda row: readable_number(row[f"{name}_of_all"], ".2f")

    columns: Columns = {
        "tokens chosen": lambda row: f"{row['share']:.0%}",
        **{name: left(name) for name in SCORES},
        **{f"all: {name}": left_of_all(name) for name in SCORES},
    }
    what = f"Importance by {report['scorer']}" if "scorer" in report else "Influence"
    title = (
        f"{what} of tokens {report['lag']} and more behind that is left out, mean over KV heads and {report['judged']} "
        "samples that gates were not fitted to ± standard error over samples; and of all KV heads together"
    )
    return Table.of(title, columns, report["left"])


def audit_tables(audit: Data) -> list[RenderableType]:
    """Returns the tables of an audit's data: estimators on ablations and on plans, differences to MoA, split halves."""
    chosen = audit["estimator"]

    def estimators(rows: Data) -> list[Data]:
        return [{**row, "name": f"{name}*" if name == chosen else name} for name, row in rows.items()]

    title = f"{len(audit['points'])} ablations of one KV head on {audit['samples']} held-out samples, 95% intervals"
    shown: list[RenderableType] = [Table.of(title, RANK | RATIO | COUNT, estimators(audit["audit"]))]
    if audit["audit_plans"]:
        title = (
            f"{len(audit['plans'])} plans at {audit['budget']}; regret: KL of the one predicted best, above the best"
        )
        shown.append(Table.of(title, RANK | RATIO | REGRET | COUNT, estimators(audit["audit_plans"])))
    if "audit_precision" in audit:
        found = audit["audit_precision"]
        title = f"{found['n']} KV heads with keys or values in another format, as {found['estimator']} predicts it"
        rows = [{**row, "name": name} for name, row in [("all", found), *found["kinds"].items()]]
        shown.append(Table.of(title, RANK | RATIO | COUNT, rows))
    if "audit_sharing" in audit:
        found = audit["audit_sharing"]
        title = f"{found['n']} layers that copy an earlier one's attention, as {found['estimator']} predicts it"
        parts = {"as they are": found, "repaired": audit.get("audit_repair")}
        rows = [{**row, "name": name} for name, row in parts.items() if row]
        shown.append(Table.of(title, RANK | RATIO | COUNT, rows))
    if "chosen_minus_moa" in audit:
        row = audit["chosen_minus_moa"]
        shown.append(f"Spearman of {chosen} minus that of moa: {estimate_text(row['value'], row['ci95'])}")
        shown.append(MOA_NOTE)
    if audit["split_half"]:
        title = f"KL of the plan of half the samples, times that of the other half's own, at {audit['budget']}"
        shown.append(Table.of(title, HALVES, audit["split_half"]))
    return [*shown, "* the estimator that the search goes by"]


PANELS: tuple[tuple[str, str, str, Callable[[Data], str]], ...] = (
    ("audit", "points", "{} ablations of one KV head", lambda at: f"{_head(at)}, {Rule(**at['rule'])}"),
    ("audit_plans", "plans", "{} plans at {budget}", lambda plan: f"plan {plan['key']}, noise {plan['noise']:.2f}"),
    (
        "audit_precision",
        "precision_points",
        "{} KV heads in another format",
        lambda at: f"{_head(at)}, {at['side']}s in {at['format']}",
    ),
    (
        "audit_sharing",
        "sharing_points",
        "{} layers that copy",
        lambda at: "layer {layer} of layer {anchor}".format(**at),
    ),
    (
        "audit_repair",
        "repair_points",
        "{} of them, repaired",
        lambda at: "layer {layer} of layer {anchor}".format(**at),
    ),
)
"""Parts of an audit that are plotted: the part, its points, a title, and what is said of a point."""


def _head(at: Data) -> str:
    return f"layer {at['layer']} KV head {at['kv_head']}"


def scatter_html(audit: Data) -> str:
    """Returns a page of its own: measured against predicted KL on logarithmic axes, a trace for each estimator.

    One panel for the ablations, one for the plans, one for single formats and two for copies, each with the line where both
    are equal.

    Raises:
        ImportError: plotly is not installed.
    """
    from plotly import colors
    from plotly.subplots import make_subplots

    panels = [panel for panel in PANELS if audit.get(panel[1])]
    titles = [title.format(len(audit[held]), budget=audit.get("budget")) for _, held, title, _ in panels]
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=titles)
    palette = colors.qualitative.Plotly
    for column, (part, held, _, note) in enumerate(panels, start=1):
        points, place = audit[held], {"row": 1, "col": column}
        one = audit[part].get("estimator")  # of formats and copies only one estimator says anything
        predicted = [{one: point["predicted"]} if one else point["predicted"] for point in points]
        for index, name in enumerate(audit["audit"]):
            if not all(name in values for values in predicted):
                continue
            figure.add_scatter(
                x=[values[name] or None for values in predicted],
                y=[point["measured"] or None for point in points],
                text=[note(point) for point in points],
                mode="markers",
                marker={"color": palette[index % len(palette)], "opacity": 0.7},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                visible=True if name in (audit["estimator"], "moa") else "legendonly",
                **place,
            )
        if kls := [point["measured"] for point in points if point["measured"]]:
            ends, line = [min(kls), max(kls)], {"color": "gray", "dash": "dot"}
            figure.add_scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", showlegend=False, **place)
    figure.update_xaxes(type="log", title="predicted (nats per answer token)", exponentformat="power")
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

"""How a plan was found: what its baselines lose, whether KL was predicted well, what trials and steps gave."""

from __future__ import annotations

import math
from typing import Any

from moacompress.core.artefact_names import AUDIT_FILE
from moacompress.core.tables import readable_number
from moacompress.report.page.figure_style import OTHERS, ROLES, Picture, Trace, axis, dots, lines
from moacompress.report.page.findings import EXPLANATIONS, FRONTS, Finding, Findings, reading_file
from moacompress.report.search_tables import MOA_NOTE, NAMES, trial_remark
from moacompress.rules.untrusted import reading_notes
from moacompress.search.measure.kl_difference import CAUTION

KL = "KL to dense, nats per token"


def baselines_picture(found: Findings) -> Picture | None:
    """Returns the measured KL of the plan and of what it was measured beside, at the same bytes; None where there is none.

    Raises:
        ArtefactError: the search's notes are of another form.
        PlanError: the plan's are.
    """
    noted = (found.explanation or {}).get("harm")
    with reading_file(EXPLANATIONS) if noted else reading_notes("measured KL"):
        quality = found.plan.quality
        return _baselines(dict(noted or quality.get("measured_harm") or {}), quality.get("samples"))


def _baselines(kl: dict[str, float | None], samples: int | None) -> Picture | None:
    found = sorted(
        ((value, name) for name, value in kl.items() if value is not None and name != "trial0"), reverse=True
    )
    if len(found) < 2:
        return None
    values, names = [value for value, _ in found], [NAMES.get(name, name) for _, name in found]
    roles = [name if name in ROLES else "faint" for _, name in found]
    trace: Trace = {
        "type": "scatter",
        "mode": "markers",
        "x": values,
        "y": names,
        "marker": {
            "color": [ROLES[role][0] for role in roles],
            "symbol": [ROLES[role][2] for role in roles],
            "size": 12,
        },
        "meta": {"roles": roles},
        "hovertemplate": "%{y}: %{x:.4g} nats<extra></extra>",
    }
    layout = {
        "xaxis": axis(KL, rangemode="tozero"),
        "yaxis": axis("", type="category"),
        "height": 130 + 26 * len(found),
        "showlegend": False,
    }
    note = "Each baseline at its best sink, window and formats" + (
        f", on {samples} validation samples." if samples else "."
    )
    note += f" {MOA_NOTE}" if NAMES["moa"] in names else ""
    rows = [(name, readable_number(value)) for value, name in zip(values, names, strict=True)]
    return Picture("baselines", "KL at the same bytes", [trace], layout, note, ("plan", "nats per token"), rows)


def predicted_pictures(found: Findings) -> list[Picture]:
    """Returns predicted against measured KL: of an audit's ablations, formats and plans, or of the search's own trials.

    Raises:
        ArtefactError: the audit, or the search's notes, are of another form.
    """
    pictures = [] if found.audit is None else [_audit(found.audit)]
    trials = None if found.explanation is None else _trials_predicted(found.explanation)
    return [*pictures, *([] if trials is None else [trials])]


@reading_file(AUDIT_FILE)
def _audit(audit: Finding) -> Picture:
    name = audit["estimator"]
    groups = [
        ("one KV head's span", [(point["calibrated"].get(name), point["measured"]) for point in audit["points"]]),
        (
            "one KV head's format",
            [(point["predicted"], point["measured"]) for point in audit.get("precision_points", ())],
        ),
        ("whole plans", [(point["calibrated"].get(name), point["measured"]) for point in audit["plans"]]),
    ]
    note = f"{audit['samples']} held-out samples, estimator {name}. On the line, predicted and measured KL are equal."
    return _scatter("audit", "Predicted and measured KL: the audit", groups, note)


@reading_file(EXPLANATIONS)
def _trials_predicted(explanation: Finding) -> Picture | None:
    predicted = explanation.get("predicted", {})
    pairs = predicted.get("pairs") or ()
    if len(pairs) < 2:
        return None
    rank = predicted["spearman"]
    note = f"The {len(pairs)} plans of the search" + ("." if rank is None else f"; rank correlation {rank:.2f}.")
    return _scatter("trials-predicted", "Predicted and measured KL: the trials", [("a trial's plan", pairs)], note)


def _scatter(name: str, title: str, groups: Any, note: str) -> Picture:
    traces, ends, rows = [], [], []
    for role, (kind, points) in zip(("plan", *OTHERS), groups, strict=False):
        pairs = [(x, y) for x, y in points if x is not None and y is not None and x > 0 and y > 0]
        if not pairs:
            continue
        x, y = zip(*pairs, strict=True)
        ends += [*x, *y]
        traces.append(dots(role, kind, x, y, opacity=0.75, hovertemplate="predicted %{x:.3g}, measured %{y:.3g}"))
        rows += [(kind, readable_number(a), readable_number(b)) for a, b in pairs]
    if ends:
        line = [min(ends), max(ends)]
        traces.append(
            lines("faint", "equal", line, line, mode="lines", line={"dash": "dot", "width": 1}, hoverinfo="skip")
        )
    layout = {
        "xaxis": axis("predicted, nats per token", type="log", exponentformat="none", dtick=1),
        "yaxis": axis("measured, nats per token", type="log", exponentformat="none", dtick=1),
        "height": 380,
    }
    return Picture(name, title, traces, layout, note, ("of", "predicted", "measured"), rows)


@reading_file(EXPLANATIONS)
def history_picture(explanation: Finding) -> Picture | None:
    """Returns the trials of a search in their order, with the best so far; None where the search did not write them down.

    Raises:
        ArtefactError: its notes are of another form.
    """
    trials = [row for row in explanation.get("trials", ()) if row["harm"] is not None]
    if len(trials) < 2:
        return None
    best, low = [], math.inf
    for row in trials:
        low = min(low, row["harm"]) if not row["pruned"] else low
        best.append(low)
    numbers = [row["trial"] for row in trials]
    ended = [row for row in trials if not row["pruned"]]
    pruned = [row for row in trials if row["pruned"]]
    traces = [
        dots("plan", "measured on all samples", [row["trial"] for row in ended], [row["harm"] for row in ended]),
        dots("uniform", "pruned", [row["trial"] for row in pruned], [row["harm"] for row in pruned]),
        lines("faint", "best so far", numbers, best, mode="lines", line={"shape": "hv"}),
    ]
    layout = {
        "xaxis": axis("trial", tick0=0, dtick=max(1, len(trials) // 8)),
        "yaxis": axis(KL, rangemode="tozero"),
        "height": 320,
    }
    rows = [(str(row["trial"]), readable_number(row["harm"]), trial_remark(row)) for row in trials]
    note = (
        "Pruned trials saw fewer samples. A trial replaces trial 0 only if its gain in mean KL, paired by sample, exceeds "
        f"{CAUTION:g} standard errors."
    )
    return Picture(
        "history",
        "Trials of the search",
        [t for t in traces if t["x"]],
        layout,
        note,
        ("trial", "nats per token", ""),
        rows,
    )


@reading_file(FRONTS)
def front_picture(front: Finding) -> Picture | None:
    """Returns the KL of plans of several budgets against their bytes; None where there is only one.

    Raises:
        ArtefactError: the front is of another form.
    """
    points = [(max(point["kv_share"].values()) * 100, point["harm"]["plan"]) for point in front["points"]]
    points = [(share, kl) for share, kl in points if kl is not None]
    if len(points) < 2:
        return None
    x, y = zip(*points, strict=True)
    layout = {
        "xaxis": axis("% of the dense KV bytes"),
        "yaxis": axis(KL, rangemode="tozero"),
        "height": 320,
        "showlegend": False,
    }
    rows = [(f"{share:.1f}%", readable_number(kl)) for share, kl in points]
    return Picture(
        "front", "KL against bytes", [lines("plan", "plans", x, y)], layout, "", ("bytes", "nats per token"), rows
    )

"""How plans and results look in a notebook: the tables of the command line, as HTML."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile
    from moacompress.rules.plan import Plan
    from moacompress.search.result.search_result import SearchResult

WIDTH = 110
FORM = "<pre style=\"font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace; line-height: 1.25\">{code}</pre>"


def register() -> None:
    """Has IPython show plans, profiles and results of searches as tables, where one is running."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None:
        return
    shown = shell.display_formatter.formatters["text/html"]
    shown.for_type_by_name("moacompress.rules.plan", "Plan", plan_html)
    shown.for_type_by_name("moacompress.search.result.search_result", "SearchResult", search_html)
    shown.for_type_by_name("moacompress.calibration.profile.store", "Profile", profile_html)


def plan_html(plan: Plan) -> str:
    """Returns what a plan keeps and what it takes."""
    from moacompress.report.inspection import formats_map, gates_map, inspect_plan, kept_map, kv_table, overview

    data = inspect_plan(plan)
    n = data["reference_length"]
    maps = (kept_map(plan, n), gates_map(plan, n), formats_map(plan))
    return as_html(overview(plan, data), kv_table(data), *(each for each in maps if each is not None))


def search_html(found: SearchResult) -> str:
    """Returns what a search found, beside the baselines, and the plan."""
    from moacompress.report.search_tables import explanation_tables
    from moacompress.report.summary_tables import kl_table

    return as_html(kl_table(found.harm, found.kv_bytes), *explanation_tables(found.explanation)) + plan_html(found.plan)


def profile_html(profile: Profile) -> str:
    """Returns what was profiled."""
    from moacompress.core.tables import facts
    from moacompress.rules.budget import format_length

    shape = profile.shape
    rows = {
        "model": f"{profile.source}: {shape.model_type}, {shape.layers} layers x {shape.kv_heads} KV heads, {shape.dtype}",
        "lengths": ", ".join(map(format_length, profile.lengths)),
        "rules": f"{len(profile.rules)} on each KV head",
        "formats": ", ".join(("native", *profile.profiled_formats)),
    }
    return as_html(facts("Profile", rows))


def as_html(*parts: Any) -> str:
    """Returns what rich can show as HTML with its styles in it."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=WIDTH, highlight=False, force_jupyter=False)
    for part in parts:
        console.print(part)
    return console.export_html(inline_styles=True, code_format=FORM)

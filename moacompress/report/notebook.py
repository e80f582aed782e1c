"""How plans and results look in a notebook: the tables of the command line, as HTML."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moacompress.core.shown import show_with

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 110
FORM = "<pre style=\"font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace; line-height: 1.25\">{code}</pre>"
SHOWN = (
    "Audit", "BenchReport", "EvaluationReport", "HealResult", "Inspection", "Plan", "Profile", "SearchResult", "Summary",
)  # fmt: skip
"""Names of the classes whose values are shown."""


def register() -> None:
    """Has everything that is `Shown` look as `as_html` and `as_text` say."""
    show_with(html=lambda value: as_html(*parts(value)), text=lambda value: as_text(*parts(value)))


def parts(value: Any) -> Iterable[RenderableType]:
    """Returns what is shown of a value, by the name of its class or of one that it is a kind of."""
    match next(kind.__name__ for kind in type(value).__mro__ if kind.__name__ in SHOWN):
        case "Audit":
            from moacompress.report.profile_tables import audit_tables

            return audit_tables(value.data)
        case "BenchReport":
            from moacompress.report.bench_tables import bench_tables

            return bench_tables(value)
        case "EvaluationReport":
            from moacompress.report.evaluation_tables import evaluation_tables

            return evaluation_tables(value)
        case "HealResult":
            from moacompress.report.heal_tables import heal_tables

            return heal_tables(value.folder, value.notes)
        case "Inspection":
            from moacompress.report.inspection import inspection_tables

            return inspection_tables(value)
        case "Plan":
            from moacompress.report.inspection import inspect_plan, inspection_tables

            return inspection_tables(inspect_plan(value))
        case "Profile":
            from moacompress.report.profile_tables import profile_table

            return [profile_table(value)]
        case "SearchResult":
            from moacompress.report.inspection import inspect_plan, kv_table, overview, plan_maps
            from moacompress.report.search_tables import explanation_tables, kl_table

            data = inspect_plan(value.plan)
            of_search = kl_table(value.harm, value.kv_bytes), *explanation_tables(value.explanation)
            maps = plan_maps(value.plan, data["reference_length"])
            return [*of_search, overview(value.plan, data), kv_table(data), *maps]
        case _:
            from moacompress.report.summary_tables import summary_tables

            return summary_tables(value)


def as_html(*parts: RenderableType) -> str:
    """Returns what rich can show as HTML with its styles in it, and every text in it as it is written."""
    return _printed(parts).export_html(inline_styles=True, code_format=FORM)


def as_text(*parts: RenderableType) -> str:
    """Returns what rich can show as plain text."""
    return _printed(parts).export_text().rstrip()


def _printed(parts: Iterable[RenderableType]) -> Console:
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=WIDTH, highlight=False, force_jupyter=False)
    for part in parts:
        console.print(part, markup=False)
    return console

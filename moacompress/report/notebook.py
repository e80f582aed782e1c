"""How plans and results look in a notebook: the tables of the command line, as HTML."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from moacompress.core.shown import Shown, show_with

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from moacompress.calibration.profile.store import Profile
    from moacompress.healer.healing import HealResult
    from moacompress.report.inspection import Inspection
    from moacompress.rules.plan import Plan
    from moacompress.search.audit.audit import Audit
    from moacompress.search.result.search_result import SearchResult

WIDTH = 110
FORM = "<pre style=\"font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace; line-height: 1.25\">{code}</pre>"


def register() -> None:
    """Has everything that is `Shown` look as `as_html` and `as_text` say."""
    show_with(html=lambda value: as_html(*parts(value)), text=lambda value: as_text(*parts(value)))


def parts(value: Shown) -> Iterable[RenderableType]:
    """Returns what is shown of a value, by the name of its class or of one that it is a kind of."""
    found = next(VIEWS[kind.__name__] for kind in type(value).__mro__ if kind.__name__ in VIEWS)
    return found(value)


def _plan(plan: Plan) -> Iterable[RenderableType]:
    from moacompress.report.inspection import inspect_plan

    return _inspection(inspect_plan(plan))


def _inspection(found: Inspection) -> Iterable[RenderableType]:
    from moacompress.report.inspection import inspection_tables

    return inspection_tables(found)


def _search(found: SearchResult) -> Iterable[RenderableType]:
    from moacompress.report.inspection import inspect_plan, kv_table, overview, plan_maps
    from moacompress.report.search_tables import explanation_tables
    from moacompress.report.summary_tables import kl_table

    data = inspect_plan(found.plan)
    of_search = (kl_table(found.harm, found.kv_bytes), *explanation_tables(found.explanation))
    maps = plan_maps(found.plan, data["reference_length"])
    return [*of_search, overview(found.plan, data), kv_table(data), *maps]


def _profile(profile: Profile) -> Iterable[RenderableType]:
    from moacompress.core.tables import facts
    from moacompress.rules.budget import format_length

    shape = profile.shape
    rows = {
        "model": f"{profile.source}: {shape.model_type}, {shape.layers} layers x {shape.kv_heads} KV heads, {shape.dtype}",
        "lengths": ", ".join(map(format_length, profile.lengths)),
        "rules": f"{len(profile.rules)} on each KV head",
        "formats": ", ".join(("native", *profile.profiled_formats)),
    }
    return [facts("Profile", rows)]


def _summary(summary: dict[str, Any]) -> Iterable[RenderableType]:
    from moacompress.report.summary_tables import summary_tables

    return summary_tables(summary)


def _evaluation(report: dict[str, Any]) -> Iterable[RenderableType]:
    from moacompress.report.evaluation_tables import evaluation_tables

    return evaluation_tables(report)


def _benchmark(report: dict[str, Any]) -> Iterable[RenderableType]:
    from moacompress.report.bench_tables import bench_tables

    return bench_tables(report)


def _audit(found: Audit) -> Iterable[RenderableType]:
    from moacompress.report.audit_tables import audit_tables

    return audit_tables(found.data)


def _heal(healed: HealResult) -> Iterable[RenderableType]:
    from moacompress.report.heal_tables import heal_tables

    return heal_tables(healed.folder, healed.notes)


VIEWS: dict[str, Callable[[Any], Iterable[RenderableType]]] = {
    "Audit": _audit,
    "BenchReport": _benchmark,
    "EvaluationReport": _evaluation,
    "HealResult": _heal,
    "Inspection": _inspection,
    "Plan": _plan,
    "Profile": _profile,
    "SearchResult": _search,
    "Summary": _summary,
}
"""What is shown of the values of each class."""


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

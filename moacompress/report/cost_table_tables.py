"""What a cost table came to, for people: floors, full spans, what kept tokens take, and how far the fit is off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from moacompress.core.tables import readable_number, section
from moacompress.rules.budget import format_length
from moacompress.rules.cost_table import CostTable
from moacompress.rules.step_time import StepTime


def fitted_rows(table: CostTable) -> list[dict[str, Any]]:
    """Returns what is fitted to every cell, as JSON values; `us_per_1000_tokens` is of a KV head, by pair of formats."""
    rows = []
    for cell in table.cells:
        fitted = StepTime.fit(cell)
        rows.append(
            {
                "length": cell.length,
                "rows": cell.rows,
                "floor_ms": fitted.floor_ms,
                "full_span_ms": fitted.full_span_ms,
                "smallest_share": fitted.floor_ms / fitted.full_span_ms,
                "us_per_1000_tokens": {f"{keys}/{values}": slope for keys, values, slope in fitted.pair_rows()},
                "gate": None
                if fitted.gate is None
                else {"us_per_head": fitted.gate.base / 1e3, "us_per_1000_tokens": fitted.gate.slope},
                "fit_error": fitted.fit_error,
                "median_error": fitted.median_error,
                "check_error": fitted.check_error,
            }
        )
    return rows


def against_table(report: Mapping[str, Any]) -> list[RenderableType]:
    """Returns what a cost table predicts of a checkpoint beside what was measured.

    Args:
        report: as `moacompress.bench.cost_table.measure_against` returns it.
    """
    return [
        section(
            "A step under the plan, ms, and as a share of full span's, measured in turns with it",
            ("", "predicted", "measured", "error", "full span", "share predicted", "measured", "error", "asked for"),
            [
                (
                    f"{format_length(row['length'])}x{row['rows']}",
                    f"{row['predicted_ms']:.2f}",
                    f"{row['measured_ms']:.2f}",
                    f"{row['error']:+.1%}",
                    f"{row['full_span_ms']:.2f}",
                    f"{row['predicted_share']:.3f}",
                    f"{row['share']:.3f}",
                    f"{row['share_error']:+.1%}",
                    readable_number(row["asked"], ".3g"),
                )
                for row in report["against"]
            ],
        )
    ]


def cost_table_tables(table: CostTable) -> list[RenderableType]:
    """Returns the tables of a cost table."""
    ours, rows = table.configuration, fitted_rows(table)
    threads = f"{ours.threads} thread{'s' if ours.threads != 1 else ''}"
    kernel = ours.kernel + (f" ({ours.isa})" if ours.isa else "")
    places = [str(cell) for cell in table.cells]
    shown: list[RenderableType] = [
        f"{ours.processor}, {threads}\ntorch {ours.torch}, kernel {kernel}, {ours.model.dtype}\n",
        section(
            "A step, ms: of weights alone, at full span, the smallest share that a budget can ask for, and errors of the fit",
            ("", "floor", "full span", "smallest share", "fitted, median", "most", "mixed, most"),
            [
                (
                    place,
                    f"{row['floor_ms']:.2f}",
                    f"{row['full_span_ms']:.2f}",
                    f"{row['smallest_share']:.3f}",
                    f"{row['median_error']:.1%}",
                    f"{row['fit_error']:.1%}",
                    readable_number(row["check_error"], ".1%"),
                )
                for place, row in zip(places, rows, strict=True)
            ],
        ),
        section(
            "Microseconds of a step for 1,000 tokens that a KV head keeps in every row, by formats of keys/values",
            ("", *places),
            [
                (pair, *(f"{row['us_per_1000_tokens'][pair]:.0f}" for row in rows))
                for pair in rows[0]["us_per_1000_tokens"]
            ],
        ),
    ]
    if rows[0]["gate"] is not None:
        found = ", ".join(
            f"{place} {row['gate']['us_per_head']:.1f} and {row['gate']['us_per_1000_tokens']:.0f}"
            for place, row in zip(places, rows, strict=True)
        )
        shown += [f"Gates add, in microseconds for a KV head and for 1,000 tokens that it selects: {found}.", ""]
    return shown

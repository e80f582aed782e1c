"""What serving came to, for people: requests a second, how long each waits, and how many run at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from moacompress.core.tables import readable_bytes, section
from moacompress.report.bench_tables import DTYPES, HEADS, machine_line

COLUMNS = (
    "",
    "seconds",
    "requests/s",
    "tokens/s",
    "first token, s: mean, p50, p99",
    "a token, ms: mean, p99",
    "at once: mean, most",
    "preempted",
)


def serve_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the table of a benchmark of serving, and a sentence on what was served.

    Args:
        report: as `moacompress.bench.serve_benchmark.run_serving` returns it.
    """
    rows = report["serve"]
    first = rows[0]
    title = (
        f"{first['requests']} requests of {first['prompt_tokens']:,} + {first['new_tokens']:,} tokens in all, in "
        f"{readable_bytes(first['kv_memory'])} of KV cache"
    )
    shown: list[RenderableType] = [
        machine_line(report["environment"], rows),
        section(title, COLUMNS, list(map(_line, rows))),
    ]
    for row in rows:
        dense = next((one for one in rows if (one["side"], one["dtype"]) == ("dense", row["dtype"])), None)
        if row["side"] == "plan" and dense is not None:
            faster = row["requests_per_s"] / dense["requests_per_s"]
            more = row["running"]["mean"] / dense["running"]["mean"]
            shown.append(
                f"{DTYPES[row['dtype']]}: the plan serves {faster:.2f} times as many requests a second as dense, {more:.2f} "
                "times as many at once."
            )
    return shown


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    waits, token = row["first_token_s"], row["token_s"]
    return (
        f"{HEADS[row['side']]}, {DTYPES[row['dtype']]}",
        f"{row['seconds']:.1f}",
        f"{row['requests_per_s']:.2f}",
        f"{row['tokens_per_s']:.0f}",
        f"{waits['mean']:.2f}, {waits['p50']:.2f}, {waits['p99']:.2f}",
        "-" if token is None else f"{1e3 * token['mean']:.1f}, {1e3 * token['p99']:.1f}",
        f"{row['running']['mean']:.1f}, {row['running']['most']}",
        str(row["preemptions"]),
    )

"""What is printed of the gates that a profile has trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from moacompress.core.statistics import error_text
from moacompress.core.tables import readable_number, section


def gate_table(report: Mapping[str, Any]) -> RenderableType:
    """Returns how much influence is left out where tokens are selected by gates, by recency and by the influence itself.

    Args:
        report: of `calibration.gates.Gates`.
    """
    names = ("gate", "recency", "oracle")
    rows = [
        (
            f"{row['share']:.0%}",
            *("-" if row[name][0] is None else error_text(row[name][0], row[name][1], ".2f") for name in names),
            *(readable_number(row[f"{name}_of_all"], ".2f") for name in names),
        )
        for row in report["left"]
    ]
    what = f"Importance by {report['scorer']}" if "scorer" in report else "Influence"
    title = (
        f"{what} of tokens {report['lag']} and more behind that is left out, mean over KV heads and {report['judged']} "
        "samples that gates were not fitted to ± standard error over samples; and of all KV heads together"
    )
    return section(title, ("tokens chosen", *names, *(f"all: {name}" for name in names)), rows)

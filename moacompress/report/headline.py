"""What an evaluation says of a plan, in sentences: first what no calibration resembles, then what it was calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moacompress.core.statistics import rounded_text
from moacompress.evaluation.baselines.compared_models import DENSE_SIDES
from moacompress.evaluation.tasks.task import CALIBRATED, KINDS, OWN, UNSEEN
from moacompress.rules.budget import format_length

SAID = {
    OWN: "Your own rows, held out",
    UNSEEN: "Kinds of prompts that no calibration has",
    CALIBRATED: "Kinds that the plan was calibrated on",
}
"""What the kinds of prompts are called."""


def kept_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what a plan keeps of each kind of prompts, the kind that a claim rests on first.

    Args:
        evaluation: as `moacompress.evaluate` returns it.

    Returns:
        Rows of `kind`, `tasks`, `lengths`, `prompts`, and where dense was measured `dense_right`, how many prompts it answers
        in full, `kept` with its `ci95` (None where n is too small), the plan's mean exact match on these, and `exact_match`,
        that of dense and the plan on all prompts: of what dense answers by luck a plan that is as good keeps less than all,
        and it may answer others.
    """
    pooled = {(row["model"], row["task"], row["metric"]): row for row in evaluation["pooled"]["results"]}
    found = []
    for kind in KINDS:
        tasks = [name for name, of in evaluation["kinds"].items() if of == kind]
        if not tasks:
            continue
        lengths = sorted({row["length"] for row in evaluation["results"] if row["task"] in tasks})
        row: dict[str, Any] = {
            "kind": kind,
            "tasks": tasks,
            "lengths": lengths,
            "prompts": pooled["plan", kind, "exact_match"]["prompts"],
        }
        kept = pooled.get(("plan", kind, "retention"))
        if kept is not None:
            row |= {"dense_right": kept["prompts"], "kept": kept["value"], "ci95": kept["ci95"]}
        elif ("dense", kind, "exact_match") in pooled:
            row |= {"dense_right": 0, "kept": None, "ci95": None}
        if "dense_right" in row:
            sides = (side for side in DENSE_SIDES if (side, kind, "exact_match") in pooled)
            row["exact_match"] = {side: pooled[side, kind, "exact_match"]["value"] for side in (*sides, "plan")}
        found.append(row)
    return found


def kept_sentence(row: Mapping[str, Any]) -> str:
    """Returns one row of `kept_rows` as a sentence."""
    of = f"{SAID[row['kind']]} ({', '.join(row['tasks'])}; {', '.join(map(format_length, row['lengths']))} tokens)"
    if "dense_right" not in row:
        return f"{of}: {row['prompts']} prompts; dense was not measured."
    if not row["dense_right"]:
        return f"{of}: dense answers none of {row['prompts']} prompts, so nothing follows from them."
    return (
        f"{of}: dense answers {row['dense_right']} of {row['prompts']} prompts, and the plan "
        f"{rounded_text(row['kept'], '.0%')} of these ({interval_text(row)}); {all_text(row)}."
    )


def all_text(row: Mapping[str, Any]) -> str:
    """Returns the exact match on all prompts of a row of `kept_rows`."""
    sides = (f"{side} {rounded_text(value, '.0%')}" for side, value in row["exact_match"].items())
    return f"exact match on all {row['prompts']}: {', '.join(sides)}"


def interval_text(row: Mapping[str, Any]) -> str:
    """Returns the interval of a row of `kept_rows`, or that there is none."""
    return (
        "n too small for an interval" if row["ci95"] is None else "95% interval {:.0%} to {:.0%}".format(*row["ci95"])
    )


def not_measured_sentence(missing: list[str]) -> str:
    """Returns what an evaluation says nothing about, as a sentence."""
    return f"Not measured: {', '.join(missing)}."


def headline(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns what an evaluation says of a plan, in sentences; none where no task was measured."""
    rows = kept_rows(evaluation)
    return [*map(kept_sentence, rows), not_measured_sentence(evaluation["not_measured"])] if rows else []

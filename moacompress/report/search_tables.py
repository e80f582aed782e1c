"""What a search can tell people: why its plan is as it is, and the front of several plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from moacompress.core.statistics import TESTABLE, p_text
from moacompress.core.tables import readable_number, section
from moacompress.report.inspection import formats_table
from moacompress.rules.budget import format_length
from moacompress.rules.formats import NATIVE

if TYPE_CHECKING:
    from moacompress.search.result.search_result import SearchResult

HEADS = 8
"""KV heads that are shown: those whose bytes are worth most."""
PARAMETERS = 5
ALIKE = 0.01
"""Share of the bytes by which two plans that take the same may differ."""
NAMES = {
    "plan": "this plan",
    "dense": "dense",
    "trial0": "surrogate's first plan",
    "uniform": "uniform window",
    "per_layer": "one rule per layer",
    "duo": "full and streaming heads (DuoAttention-style)",
    "moa": "MoA's estimator, rebuilt",
    "quantized": "everything, in fewer bits",
    "uniform_gates": "one choice by gates for all",
}
"""Of what a plan is measured beside."""
MOA_NOTE = (
    "MoA's estimator is rebuilt here from the paper. Where it is worse than the uniform window, contrary to the paper, the "
    "rebuilding is likely at fault: this says nothing against MoA."
)
STEP_COLUMNS = ("nats per token", "difference to the plan before, 95% interval", "kept")


def explanation_tables(explanation: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of an explanation, as `search.explain` makes it: steps, KV heads, parameters; empty for none."""
    if not explanation:
        return []
    steps = section("Search steps (KL on validation samples)", ("", *STEP_COLUMNS), step_rows(explanation))
    heads = [
        (
            str(row["layer"]),
            str(row["kv_head"]),
            str(row["kept"]),
            str(row["of"]),
            _formats_of(row["rule"]),
            f"+{readable_number(row['saves'])}",
        )
        for row in explanation["heads"]
        if (row["saves"] or 0) > 0
    ]
    columns = ("layer", "KV head", "keeps", "of", "keys/values", "KL at the average share instead, nats")
    shown: list[RenderableType] = [steps, *refused_line(explanation), *baseline_line(explanation.get("best_baseline"))]
    if heads:
        shown.append(section("KV heads whose bytes are worth most", columns, heads[:HEADS]))
    shown.extend(class_lines(explanation))
    formats = explanation["formats"]
    if any(pair["key_format"] != pair["value_format"] or pair["key_format"] != NATIVE for pair in formats["pairs"]):
        shown.append(formats_table(formats["pairs"], formats["bits"]))
    if "sharing" in explanation:
        shown.extend(_sharing(explanation["sharing"]))
    parameters = list(explanation["knobs"].items())[:PARAMETERS]
    if parameters:
        shown.append(
            "Search parameters that mattered: " + ", ".join(f"{name} {share:.0%}" for name, share in parameters) + "."
        )
    predicted = explanation["predicted"]
    if predicted["spearman"] is not None:
        shown.append(
            f"Predicted and measured KL of {len(predicted['pairs'])} plans: rank correlation {predicted['spearman']:.2f}."
        )
    kinds = {kind: kl for kind, kl in explanation["kinds"].items() if kl is not None}
    if len(kinds) > 1:
        shown.append(
            "Predicted KL by kind of sample, nats: " + ", ".join(f"{k} {v:.2g}" for k, v in kinds.items()) + "."
        )
    return shown


def class_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns what an explanation or a summary says of a plan's classes of KV heads; nothing where they had no limit."""
    classes = found.get("classes")
    if classes is None:
        return []
    lines = [f"Classes of KV heads, each of one rule: {classes['plan']}, at most {classes['most']} were allowed."]
    if "limited" in classes:
        limited, unlimited = classes["limited"], classes["unlimited"]
        lines.append(
            f"Without the limit the plan of trial {classes['trial']} has {unlimited['classes']} classes. The limit costs "
            f"{_more(limited['predicted_harm'], unlimited['predicted_harm'])} nats as predicted, "
            f"{_more(limited['harm'], unlimited['harm'])} as measured: {difference_text(classes['difference'])}."
        )
    return lines


def _more(kl: float | None, other: float | None) -> str:
    return f"{readable_number(kl)} instead of {readable_number(other)}"


def step_rows(explanation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the rows of a table of what each step of a search gave: its name, and `STEP_COLUMNS`."""
    return [
        (
            stage["name"],
            readable_number(stage["harm"]),
            "-" if stage["difference"] is None else difference_text(stage["difference"]),
            _kept(stage),
        )
        for stage in explanation["stages"]
    ]


def difference_text(found: Mapping[str, Any]) -> str:
    """Returns a paired difference of mean KL in nats, such as `-0.0007 [-0.0016, +0.0003], p .25, 6 samples`.

    A p-value that allows for a choice among several plans says so: `p .25 as the lowest of 30 plans`.
    """
    of = f" as the lowest of {found['candidates']} plans" if found["candidates"] > 1 and found["value"] < 0 else ""
    return f"{found['value']:+.2g}{_interval(found)}, {p_text(found['p'])}{of}, {_samples(found)}"


def _interval(found: Mapping[str, Any]) -> str:
    ends = found["ci95"]
    return "" if ends is None else f" [{ends[0]:+.2g}, {ends[1]:+.2g}]"


def _samples(found: Mapping[str, Any]) -> str:
    return "1 sample" if found["samples"] == 1 else f"{found['samples']} samples"


def _kept(stage: Mapping[str, Any]) -> str:
    """Returns whether a step's plan was kept, with the reason where its KL alone would say otherwise.

    What is kept is decided by standard errors of the difference (see `kl_difference`), not by its p-value.
    """
    if stage["difference"] is None:
        return _yes(stage["kept"])
    lower = stage["difference"]["value"] < 0
    if stage["kept"]:
        return _yes(True) if lower else "yes: higher by less than its error"
    return "no: gain too small for its error" if lower else "no: not lower"


def trial_remark(trial: Mapping[str, Any]) -> str:
    """Returns what became of a trial: `pruned`, `kept`, or how much lower than trial 0 it is where that is not enough."""
    if trial["pruned"]:
        return "pruned"
    if trial["kept"]:
        return "kept"
    return (
        f"gain too small for its error: {difference_text(trial['difference'])}"
        if trial["difference"]["value"] < 0
        else ""
    )


def refused_line(explanation: Mapping[str, Any]) -> list[str]:
    """Returns why the plan of lowest measured KL was not taken, in one line; nothing where it was."""
    found = explanation.get("refused")
    if found is None:
        return []
    difference, name = found["difference"], found["name"]
    return [
        f"{name[:1].upper()}{name[1:]} measured {readable_number(found['harm'])} nats ({difference_text(difference)} against "
        "the chosen plan), but did not beat the plan that it was compared with by enough standard errors; the chosen plan is "
        "kept because the lowest of many noisy measurements is usually too low."
    ]


def baseline_line(found: Mapping[str, Any] | None) -> list[str]:
    """Returns in one line whether a search's plan is better than the best baseline; nothing where none was measured.

    Args:
        found: `best_baseline` of the plan's notes on quality.
    """
    if found is None:
        return []
    name, ours, theirs = NAMES[found["family"]], readable_number(found["found_harm"]), readable_number(found["harm"])
    difference = found["difference"]
    beside, takes = difference_text(difference), 1 / found["bytes_share"]
    at = (
        "the same bytes"
        if abs(takes - 1) <= ALIKE
        else f"{abs(takes - 1):.0%} {'fewer' if takes < 1 else 'more'} bytes"
    )
    if found["saved"]:
        if found["verdict"] == "worse":  # which a permutation test says
            return [
                f"The baseline {name} ({theirs} nats) beats the best searched plan ({ours}), so its plan was saved: the "
                f"searched plan's difference is {beside}."
            ]
        return [
            f"The baseline {name} ({theirs} nats) takes {1 - found['bytes_share']:.0%} fewer bytes than the best searched plan "
            f"({ours}) and measured no higher, so its plan was saved: the searched plan's difference is {beside}."
        ]
    if found["verdict"] == "better":
        return [f"Better than the best baseline, {name}, at {at}: {ours} vs {theirs} nats, difference {beside}."]
    if found["verdict"] == "worse":
        return [f"The baseline {name} is better, but has too many classes of KV heads: {theirs} vs {ours} nats."]
    if difference["samples"] < TESTABLE:
        return [f"Too few samples to compare with {name} at {at}: {ours} vs {theirs} nats ({beside})."]
    return [f"Not shown to differ from {name} at {at}: {ours} vs {theirs} nats ({beside})."]


def _sharing(found: Mapping[str, Any]) -> list[RenderableType]:
    """Returns what sharing gave: a row for every number of layers, and a sentence where it gave nothing."""
    rows = [
        (
            str(row["layers"]),
            ", ".join(f"{layer} of {anchor}" for layer, anchor in row["pairs"]) or "none",
            readable_number(row["copies"]),
            readable_number(row["predicted"]),
            readable_number(row["harm"]),
            "-" if row["difference"] is None else difference_text(row["difference"]),
        )
        for row in found["counts"]
    ]
    titles = ("layers", "copies", "copies, predicted", "plan, predicted", "measured", "difference to trial 0")
    shown: list[RenderableType] = [
        section("Layers that copy an earlier one's attention (nats per token)", titles, rows)
    ]
    if found.get("repaired"):
        shares = sorted(row["left"] for row in found["repaired"])
        shown.append(
            f"All of this is after a repair, which leaves {shares[0]:.0%} to {shares[-1]:.0%} of what a copy changes: export "
            "with --repair."
        )
    if not found["shared"]:
        shown.append("Sharing buys nothing at this budget: the best plan has none.")
    return shown


def _formats_of(rule: Any) -> str:
    """Returns the formats of keys and values of a rule, as an explanation has it."""
    return f"{NATIVE}/{NATIVE}" if rule == "full" else f"{rule['key_format']}/{rule['value_format']}"


def front_table(results: Sequence[SearchResult]) -> RenderableType:
    """Returns a table of plans of one model: bytes kept, KL, and that of the best plan that needs no search."""
    rows = []
    for result in results:
        others = [kl for name, kl in result.harm.items() if name not in ("plan", "trial0") and kl is not None]
        rows.append(
            (
                ", ".join(
                    f"{row['plan'] / row['dense']:.1%} at {format_length(int(n))}" for n, row in result.kv_bytes.items()
                ),
                readable_number(result.harm["plan"]),
                readable_number(min(others, default=None)),
                str(result.path or ""),
            )
        )
    return section(
        "Plans, by KV bytes: KL(dense || plan) on validation samples",
        ("KV bytes", "nats per token", "best without search", "plan"),
        rows,
    )


def _yes(kept: bool) -> str:
    return "yes" if kept else "no"

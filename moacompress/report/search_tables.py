"""What a search can tell people: why its plan is as it is, and the front of several plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from moacompress.core.tables import readable_bytes, readable_number, section
from moacompress.report.inspection import formats_table
from moacompress.rules.budget import format_length
from moacompress.rules.formats import NATIVE

if TYPE_CHECKING:
    from moacompress.rules.plan import Plan
    from moacompress.search.result.search_result import SearchResult

HEADS = 8
"""KV heads that are shown: those whose bytes are worth most."""
PARAMETERS = 5
STEP_COLUMNS = ("nats a token", "against the surrogate's own plan", "kept")


def explanation_tables(explanation: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of an explanation, as `search.explain` makes it: steps, KV heads, parameters; empty for none."""
    if not explanation:
        return []
    steps = section("What each step gave (validation samples)", ("", *STEP_COLUMNS), step_rows(explanation))
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
    shown: list[RenderableType] = [steps]
    if heads:
        shown.append(section("KV heads whose bytes are worth most", columns, heads[:HEADS]))
    shown.extend(class_lines(explanation))
    formats = explanation.get("formats")  # what an older search left has none
    if formats and any(
        pair["key_format"] != pair["value_format"] or pair["key_format"] != NATIVE for pair in formats["pairs"]
    ):
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
    kinds = {kind: kl for kind, kl in explanation.get("kinds", {}).items() if kl is not None}
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
            f"Without the limit the plan of trial {classes['trial']} has {unlimited['classes']}. The limit costs "
            f"{_more(limited['predicted_harm'], unlimited['predicted_harm'])} nats as predicted, "
            f"{_more(limited['harm'], unlimited['harm'])} as measured ({100 * _change(classes['log_ratio']):+.0f}%, paired)."
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
            f"{100 * _change(stage['log_ratio']):+.0f}%",
            _kept(stage),
        )
        for stage in explanation["stages"]
    ]


def _kept(stage: Mapping[str, Any]) -> str:
    """Returns whether a step's plan was kept, with the reason where its KL alone would say otherwise."""
    gain = stage.get("gain")  # what an older search left has none
    if gain is None:
        return _yes(stage["kept"])
    if stage["kept"]:
        return _yes(True) if gain < 0 else f"yes: worse by less than noise {_of_noise(stage)}"
    return f"no: gain within noise {_of_noise(stage)}" if gain < 0 else "no: not better than the plan before"


def trial_remark(trial: Mapping[str, Any]) -> str:
    """Returns what became of a trial: `given up`, `kept`, or why not where its KL is less than that of trial 0."""
    if trial["pruned"]:
        return "given up"
    if trial.get("kept"):
        return "kept"
    gain = trial.get("gain")
    return "" if gain is None or gain >= 0 else f"gain within noise {_of_noise(trial)}"


def _of_noise(row: Mapping[str, Any]) -> str:
    """Returns a paired change of KL beside what it had to be beyond."""
    return f"({100 * _change(row['gain']):+.1f}% \u00b1 {100 * _change(row['noise']):.1f}%)"


def _sharing(found: Mapping[str, Any]) -> list[RenderableType]:
    """Returns what sharing gave: a row for every number of layers, and a sentence where it gave nothing."""
    rows = [
        (
            str(row["layers"]),
            ", ".join(f"{layer} of {anchor}" for layer, anchor in row["pairs"]) or "none",
            readable_number(row["copies"]),
            readable_number(row["predicted"]),
            readable_number(row["harm"]),
            "-" if row["log_ratio"] is None else f"{100 * _change(row['log_ratio']):+.0f}%",
        )
        for row in found["counts"]
    ]
    titles = ("layers", "copies", "copies, predicted", "plan, predicted", "measured", "against trial 0")
    shown: list[RenderableType] = [section("Layers that copy an earlier one's attention (nats a token)", titles, rows)]
    if found.get("repaired"):
        shares = sorted(row["left"] for row in found["repaired"])
        shown.append(
            f"All of this is after a repair, which leaves {shares[0]:.0%} to {shares[-1]:.0%} of what a copy changes: export "
            "with --repair."
        )
    left = found.get("assume_healed", 1)
    if left < 1:
        shown.append(
            f"Of the KL of copies {left:g} is counted, predicted and measured: heal the checkpoint to get there."
        )
    if not found["shared"]:
        shown.append("Sharing buys nothing at this budget: the best plan has none.")
    return shown


def _formats_of(rule: Any) -> str:
    """Returns the formats of keys and values of a rule, as an explanation has it."""
    named = {} if rule == "full" else rule  # an older search left rules without formats
    return f"{named.get('key_format', NATIVE)}/{named.get('value_format', NATIVE)}"


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
        ("KV bytes", "nats a token", "best without search", "plan"),
        rows,
    )


def _change(log_ratio: float) -> float:
    from math import expm1

    return expm1(log_ratio)


def _yes(kept: bool) -> str:
    return "yes" if kept else "no"


def weight_tables(plan: Plan) -> list[RenderableType]:
    """Returns the weights that a search chose among, with what was measured of each; none where it chose none.

    Args:
        plan: its notes have them.
    """
    rows = plan.quality.get("weight_choices")
    if not rows:
        return []
    taken = plan.provenance["weights"]["bytes"]
    cells = []
    for row in rows:
        formats = ", ".join(f"{count} {kind}" for kind, count in row["formats"].items()) or "none"
        kv = ", ".join(f"{readable_bytes(size)} at {format_length(int(n))}" for n, size in row["kv_bytes"].items())
        mark = " (taken)" if row["weight_bytes"] == taken else ""
        numbers = readable_number(row["predicted"]), readable_number(row["kl"])
        cells.append((f"{row['name']}{mark}", formats, readable_bytes(row["weight_bytes"]), kv, *numbers))
    title = "Weights, each with the best predicted plan in what they leave"
    names = ("", "layers rounded", "weights", "KV cache", "predicted KL", "measured KL")
    return [section(title, names, cells)]

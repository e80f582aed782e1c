"""What a search can tell people: the KL of its plan and of the baselines, why the plan is as it is, the front of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from moacompress.core.statistics import TESTABLE
from moacompress.core.tables import Columns, Row, Table, estimate_text, p_text, readable_number
from moacompress.report.inspection import formats_table
from moacompress.rules.budget import format_length
from moacompress.rules.formats import NATIVE
from moacompress.rules.plan import Plan

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
RACED_NOTE = "What is worse beyond doubt was measured on fewer samples: its number is their mean."
"""Of baselines, see `baselines.measured`."""
MOA_NOTE = (
    "MoA's estimator is rebuilt here, by the formula of its published code. The paper's claims are of models of 7B at half of "
    "the cache: what it loses here says nothing against them."
)
STEPS: Columns = {
    "step": lambda stage: stage["name"],
    "nats per token": lambda stage: readable_number(stage["harm"]),
    "difference to the plan before, 95% interval": lambda stage: _difference(stage),
    "kept": lambda stage: _kept(stage),
}
HEADS_WORTH_MOST: Columns = {
    "layer": lambda row: str(row["layer"]),
    "KV head": lambda row: str(row["kv_head"]),
    "keeps": lambda row: str(row["kept"]),
    "of": lambda row: str(row["of"]),
    "keys/values": lambda row: (
        f"{NATIVE}/{NATIVE}" if row["rule"] == "full" else "{key_format}/{value_format}".format(**row["rule"])
    ),
    "KL at the average share instead, nats": lambda row: f"+{readable_number(row['saves'])}",
}
SHARED_LAYERS: Columns = {
    "layers": lambda row: str(row["layers"]),
    "copies": lambda row: ", ".join(f"{layer} of {anchor}" for layer, anchor in row["pairs"]) or "none",
    "copies, predicted": lambda row: readable_number(row["copies"]),
    "plan, predicted": lambda row: readable_number(row["predicted"]),
    "measured": lambda row: readable_number(row["harm"]),
    "difference to trial 0": lambda row: _difference(row),
}
FRONT: Columns = {
    "KV bytes": lambda result: kept_shares(result.kv_bytes),
    "nats per token": lambda result: readable_number(result.harm["plan"]),
    "best without search": lambda result: readable_number(min(baseline_kls(result.harm), default=None)),
    "plan": lambda result: str(result.path or ""),
}


def explanation_tables(explanation: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of an explanation, as `search.explain` makes it: steps, KV heads, parameters; empty for none."""
    if not explanation:
        return []
    shown: list[RenderableType] = [
        steps_table(explanation),
        *refused_line(explanation),
        *baseline_line(explanation.get("best_baseline")),
    ]
    heads = [row for row in explanation["heads"] if (row["saves"] or 0) > 0]
    if heads:
        shown.append(Table.of("KV heads whose bytes are worth most", HEADS_WORTH_MOST, heads[:HEADS]))
    shown.extend(class_lines(explanation))
    formats = explanation["formats"]
    if any(pair["key_format"] != pair["value_format"] or pair["key_format"] != NATIVE for pair in formats["pairs"]):
        shown.append(formats_table(formats["pairs"], formats["bits"]))
    if "sharing" in explanation:
        shown.extend(_sharing(explanation["sharing"]))
    parameters = ", ".join(f"{name} {share:.0%}" for name, share in list(explanation["knobs"].items())[:PARAMETERS])
    if parameters:
        shown.append(f"Search parameters that mattered: {parameters}.")
    predicted = explanation["predicted"]
    if predicted["spearman"] is not None:
        shown.append(
            f"Predicted and measured KL of {len(predicted['pairs'])} plans: rank correlation {predicted['spearman']:.2f}."
        )
    kinds = [f"{kind} {kl:.2g}" for kind, kl in explanation["kinds"].items() if kl is not None]
    if len(kinds) > 1:
        shown.append(f"Predicted KL by kind of sample, nats: {', '.join(kinds)}.")
    return shown


def steps_table(explanation: Mapping[str, Any]) -> Table:
    """Returns the table of what each step of a search gave."""
    return Table.of("Search steps (KL on validation samples)", STEPS, explanation["stages"])


def kl_table(kl: Mapping[str, float | None], kv_bytes: Mapping[str, Mapping[str, int]]) -> Table:
    """Returns the measured KL of a plan and of what it was measured beside, in nats by name."""
    rows = [(NAMES.get(name, name), readable_number(value)) for name, value in kl.items()]
    title = f"KL(dense || plan) on validation samples; KV bytes {kept_shares(kv_bytes)}"
    notes = [RACED_NOTE] * bool(baseline_kls(kl)) + [MOA_NOTE] * (kl.get("moa") is not None)
    return Table(title, ("", "nats per token"), rows, " ".join(notes))


def front_table(results: Sequence[SearchResult]) -> Table:
    """Returns a table of plans of one model: bytes kept, KL, and that of the best plan that needs no search."""
    return Table.of("Plans, by KV bytes: KL(dense || plan) on validation samples", FRONT, results)


def kept_shares(kv_bytes: Mapping[str, Mapping[str, int]]) -> str:
    """Returns `25.0% at 1k, 24.8% at 4k` for the bytes of a plan and of dense at lengths."""
    return ", ".join(f"{row['plan'] / row['dense']:.1%} at {format_length(int(n))}" for n, row in kv_bytes.items())


def baseline_kls(kl: Mapping[str, float | None]) -> list[float]:
    """Returns the measured KLs of baselines, without those of plans that the search found."""
    return [value for name, value in kl.items() if name not in ("plan", "trial0") and value is not None]


def loss_lines(plan: Plan) -> list[str]:
    """Returns how a plan holds the loss that was asked for; nothing where none was."""
    limit, bound = plan.budget.get("max_harm"), plan.quality.get("harm_upper95")
    if limit is None or bound is None:
        return []
    return [
        f"Loss of {plan.budget['max_loss']}: KL is below {bound:.3g} nats per token with 95% confidence (one-sided, "
        f"{plan.quality['samples']} samples); {limit:.3g} were allowed."
    ]


def class_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns what an explanation or a summary says of a plan's classes of KV heads; nothing where they had no limit."""
    classes = found.get("classes")
    if classes is None:
        return []
    lines = [f"Classes of KV heads, each of one rule: {classes['plan']}, at most {classes['most']} were allowed."]
    if "limited" in classes:
        limited, unlimited = classes["limited"], classes["unlimited"]

        def beside(name: str) -> str:
            return f"{readable_number(limited[name])} instead of {readable_number(unlimited[name])}"

        lines.append(
            f"Without the limit the plan of trial {classes['trial']} has {unlimited['classes']} classes. The limit costs "
            f"{beside('predicted_harm')} nats as predicted, {beside('harm')} as measured: "
            f"{difference_text(classes['difference'])}."
        )
    return lines


def difference_text(found: Mapping[str, Any]) -> str:
    """Returns a paired difference of mean KL in nats, such as `-0.0007 [-0.0016, +0.0003], p .25, 6 samples`.

    A p-value that allows for a choice among several plans says so: `p .25 as the lowest of 30 plans`.
    """
    of = f" as the lowest of {found['candidates']} plans" if found["candidates"] > 1 and found["value"] < 0 else ""
    samples = "1 sample" if found["samples"] == 1 else f"{found['samples']} samples"
    return f"{estimate_text(found['value'], found['ci95'], '+.2g')}, {p_text(found['p'])}{of}, {samples}"


def _difference(row: Row) -> str:
    return "-" if row["difference"] is None else difference_text(row["difference"])


def _kept(stage: Row) -> str:
    """Returns whether a step's plan was kept, with the reason where its KL alone would say otherwise.

    What is kept is decided by standard errors of the difference (see `kl_difference`), not by its p-value.
    """
    lower = stage["difference"] is None or stage["difference"]["value"] < 0
    if stage["kept"]:
        return "yes" if lower else "yes: higher by less than its error"
    if stage["difference"] is None:
        return "no"
    return "no: gain too small for its error" if lower else "no: not lower"


def trial_remark(trial: Mapping[str, Any]) -> str:
    """Returns what became of a trial: `pruned`, `kept`, or how much lower than trial 0 it is where that is not enough."""
    if trial["pruned"] or trial["kept"]:
        return "pruned" if trial["pruned"] else "kept"
    lower = trial["difference"]["value"] < 0
    return f"gain too small for its error: {difference_text(trial['difference'])}" if lower else ""


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
    """Returns in one line whether a search's plan is better than the best baseline; nothing where none was measured."""
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
    title = "Layers that copy an earlier one's attention (nats per token)"
    shown: list[RenderableType] = [Table.of(title, SHARED_LAYERS, found["counts"])]
    if found.get("repaired"):
        shares = sorted(row["left"] for row in found["repaired"])
        shown.append(
            f"All of this is after a repair, which leaves {shares[0]:.0%} to {shares[-1]:.0%} of what a copy changes: export "
            "with --repair."
        )
    if not found["shared"]:
        shown.append("Sharing buys nothing at this budget: the best plan has none.")
    return shown

"""The model card of a compressed checkpoint: what it is, what was measured, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moacompress.core.files import write_text
from moacompress.core.statistics import TESTABLE
from moacompress.core.tables import Columns, Table, error_text, p_text, readable_number
from moacompress.models.hub import is_hub_name
from moacompress.rules.budget import format_length
from moacompress.rules.cost import chosen_share, format_rows, kept_bits
from moacompress.rules.memory import memory_lines, plan_memory
from moacompress.rules.plan import Plan
from moacompress.rules.untrusted import reading_notes

CARD = "README.md"
MEASURED, FIRST_NUMBERS = "## What it still answers\n\n", "## KV cache\n\n"
"""Headings of a card: of what an evaluation came to, and of the section that it goes before."""
WEIGHTS = {
    None: "the same weights",
    "repaired": "weights that were repaired for it",
    "healed": "weights that were distilled from its own",
}
"""What a card says of a checkpoint's weights, by `Plan.changed_weights`."""


def state_measured(folder: Path, sentences: Sequence[str]) -> None:
    """Puts an evaluation's sentences before all other numbers of a checkpoint's card, in the place of what stood there.

    Raises:
        ArtefactError: the card cannot be written.
    """
    card = folder / CARD
    text = card.read_text("utf-8") if card.is_file() else ""
    before, heading, after = text.partition(FIRST_NUMBERS)
    if heading:  # else somebody wrote a card of their own
        before = before.partition(MEASURED)[0]
        stated = "".join((before, MEASURED, *(f"- {each}\n" for each in sentences), "\n", heading, after))
        if stated != text:
            write_text(card, stated)


@reading_notes("what was measured and done")
def model_card(plan: Plan, stored: Mapping[str, int] | None = None) -> str:
    """Returns the card as Markdown; every number in it is in the plan's notes but the bytes of weights by type (`stored`).

    Raises:
        PlanError: the plan's notes are not what moacompress writes.
    """
    source = str(plan.provenance.get("source", "a dense model"))
    name = re.sub(r"[^\w .+-]", "_", source.rstrip("/").rsplit("/", 1)[-1])  # a plan may say anything
    parts = [
        _front_matter(source),
        f"# {name}, compressed",
        f"`{name}` with a smaller KV cache: {WEIGHTS[plan.changed_weights]}, and for each of its {plan.model.layers} x "
        f"{plan.model.kv_heads} KV heads its own sinks, attention window and formats of keys and values, found by "
        "moacompress.",
        "```python\nfrom transformers import AutoModelForCausalLM  # with moacompress installed\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n```',
        FIRST_NUMBERS + _bytes_table(plan),
    ]
    if stored is not None:
        parts.append("## Weights\n\n" + " ".join([_weights_table(stored), *filter(None, [rounding_text(plan)])]))
    if plan.stated_lengths and not all(rule.is_native for row in plan.rules for rule in row):
        parts.append("## Formats of keys and values\n\n" + _formats_table(plan, max(plan.stated_lengths)))
    if plan.selects:
        parts.append("## Tokens chosen by gates\n\n" + _gates(plan, max(plan.stated_lengths)))
    if plan.shares:
        parts.append("## Shared attention\n\n" + _shared_attention(plan))
    quality = _quality(plan)
    if quality:
        parts.append("## Measured KL\n\n" + quality)
    repair = repair_text(plan)
    if repair:
        parts.append("## Repair\n\n" + repair)
    healed = plan.provenance.get("heal")
    if healed is not None:
        parts.append("## Healed\n\n" + _healed(healed))
    recipe = plan.provenance.get("recipe")
    if recipe is not None:
        text = json.dumps(recipe, indent=1, ensure_ascii=False)
        parts.append(f"## Recipe\n\nEvery choice of the run, defaults included:\n\n```json\n{text}\n```")
    return "\n\n".join(parts) + "\n"


@reading_notes("a repair")
def repair_text(plan: Plan) -> str:
    """Returns what a repair did to the weights of a checkpoint, and what it gained; empty where there was none.

    Raises:
        PlanError: the plan's notes of it are not what moacompress writes.
    """
    notes = plan.provenance.get("repair")
    if not isinstance(notes, dict):
        return ""
    if notes.get("tokens") == 0:
        return "There was nothing to repair: every KV head attends to all that it did, in the numbers that it did."
    fitted = f"{notes.get('tokens'):,} tokens of the profile {notes.get('profile')}"
    if notes.get("penalty") is None:
        tried = notes.get("harm", {}).get("not_enough")
        measured = ""
        if tried is not None:
            measured = f" (a change of {_with_error(tried)} nats, mean and standard error{_p(tried)})"
            if (judged := notes["validation_samples"]) < TESTABLE:
                measured += f"; {judged} validation samples judged it, and a test needs {TESTABLE}"
        return (
            f"A repair with {fitted} changed nothing: it was not shown to lower measured KL{measured}. The weights are the "
            "source's."
        )
    kl = notes["harm"]
    before, after, change = (_with_error(kl[name]) for name in ("before", "after", "change"))
    return (
        "The weights are not the source's: the output projections of attention were refitted to this plan (closed form, ridge "
        f"{notes['penalty']:g}) on {fitted}. On {notes['validation_samples']} validation samples, which had no part in the "
        f"fit or in the choice of the ridge, KL(dense || model) is {after} nats per answer token, and {before} with the "
        f"source's weights: a change of {change} (mean and standard error{_p(kl['change'])})."
    )


def _with_error(value: dict[str, float | None]) -> str:
    mean = value["mean"]
    assert mean is not None
    return error_text(mean, value["error"], ".3g")


def _p(change: dict[str, float]) -> str:
    return f", {p_text(change['p'])}" if "p" in change else ""


def _front_matter(source: str) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- moacompress",
        "- kv-cache",
    ]
    if is_hub_name(source) and "/" in source and not source.endswith(".gguf"):
        lines.insert(1, f"base_model: {source}")
    return "\n".join([*lines, "---"])


def _bytes_table(plan: Plan) -> str:
    columns: Columns = {
        "tokens": format_length,
        "dense, bytes": lambda n: f"{plan.model.dense_kv_bytes(n):,}",
        "this model, bytes": lambda n: f"{plan.kv_bytes(n):,}",
        "share": lambda n: f"{plan.kv_bytes(n) / plan.model.dense_kv_bytes(n):.1%}",
    }
    asked = plan.budget.get("asked")
    notes = [
        f"In whole blocks of 16 tokens, batch 1, {plan.model.dtype}.",
        *([f"Budget asked for: {', '.join(map(str, asked))}."] if asked else []),
        *memory_lines(plan_memory(plan)),
    ]
    return Table.of("KV cache", columns, plan.stated_lengths, "\n\n".join(notes), text_columns=0).markdown()


def rounding_text(plan: Plan) -> str:
    """Returns what the weights that were rounded for a plan lose, beside what the plan loses; empty where none were."""
    notes = plan.quality.get("rounded_weights")
    if not isinstance(notes, dict):
        return ""
    lost = error_text(notes["kl"], notes.get("standard_error"), ".3g")
    head = f", embedding and output layer to {notes['head_weights']}" if notes.get("head_weights") else ""
    return (
        f"Linear layers were rounded to {notes['weights']}{head}: KL(before || rounded) is {lost} nats per "
        f"answer token on {notes['samples']} validation samples, without a plan. What was measured of the plan is against the "
        "rounded model."
    )


def _weights_table(stored: Mapping[str, int]) -> str:
    rows = [(kind, f"{size:,}") for kind, size in stored.items()]
    note = (
        f"{sum(stored.values()):,} bytes in all. Types other than dtypes are blocks of codes and scales as in GGUF files; "
        "they are multiplied as they are, and transformers without moacompress refuses them."
    )
    return Table("Weights", ("type", "bytes"), rows, note).markdown()


def _formats_table(plan: Plan, n: int) -> str:
    rows = [
        (str(row["key_format"]), str(row["value_format"]), str(row["kv_heads"]), f"{row['kv_bytes']:,}")
        for row in format_rows(plan, n)
    ]
    bits = kept_bits(plan, n)
    note = (
        f"At {format_length(n)} tokens, where kept keys take {bits['keys']:.1f} bits per number and kept values "
        f"{bits['values']:.1f}, scales and zero points counted."
    )
    return Table("Formats", ("keys", "values", "KV heads", "bytes"), rows, note, text_columns=2).markdown()


def _gates(plan: Plan, n: int) -> str:
    found = chosen_share(plan, n)
    return (
        f"{found['kv_heads']} KV heads keep, beside sinks and window, the tokens that a gate scores highest: a linear probe of "
        f"what enters the layer, in the weights as `gate`. At {format_length(n)} tokens gates chose {found['share']:.0%} of "
        "the tokens that are kept. Without moacompress these weights are ignored, and so is what they choose."
    )


def _shared_attention(plan: Plan) -> str:
    shares = "; ".join(f"layer {layer}: {share}" for layer, share in enumerate(plan.shares) if share is not None)
    return f"These layers attend as an earlier one does, or to its keys, and have no weights for what they take:\n\n{shares}."


def _quality(plan: Plan) -> str:
    kl: dict[str, Any] = plan.quality.get("measured_harm") or {}
    if not kl:
        return ""
    if kl.get("plan") is None:
        return "Not measured: the search was stopped before. The plan is what its profile predicts to be best."
    rows = [(name.replace("_", " "), f"{value:.4g}") for name, value in kl.items() if value is not None]
    samples = plan.quality.get("samples")
    note = f"Teacher-forced, mean over {samples} validation samples, by which the plan was chosen." if samples else ""
    return Table("KL", ("model", "KL(dense || model), nats per answer token"), rows, note).markdown()


def healed_bytes_text(notes: Mapping[str, Any]) -> str:
    """Returns what weights take before and after a heal, from its notes in a plan; empty where none were in blocks."""
    sizes = notes.get("weight_bytes")
    if not isinstance(sizes, dict):
        return ""
    before, after = (sum(sizes[name].values()) for name in ("before", "after"))
    if before == after:
        return f"The weights take {before:,} bytes, as before."
    return (
        f"The weights take {after:,} bytes, before {before:,}: layers that were trained are stored as numbers, not as blocks "
        "of codes."
    )


def _healed(notes: dict[str, Any]) -> str:
    kl = notes["held_out_kl"]
    rows = [
        (name, f"{kl[place]['mean']:.4g}", readable_number(kl[place]["standard_error"], ".2g"))
        for name, place in (("as exported", "before"), ("healed", "after"), ("difference", "difference"))
    ]
    note = (
        f"Measured on {kl['samples']} held-out samples, by which the state was chosen. What was measured of the plan before is "
        "of the weights as exported."
    )
    table = Table("Healed", ("weights", "KL(dense || model), nats per token", "standard error"), rows, note)
    what = (
        f"Trained: {notes['train']}, objective {notes['objective']}, {notes['tokens']:,} tokens in {notes['steps']} steps; the "
        f"best state, after step {notes['best_step']}, is what is here."
        if notes["improved"]
        else f"{notes['steps']} steps ({notes['train']}, objective {notes['objective']}) did not lower the held-out KL: "
        "these are the weights as they were exported."
    )
    what = " ".join(filter(None, [what, healed_bytes_text(notes)]))
    return f"{what}\n\n{table.markdown()}"

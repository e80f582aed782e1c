"""What a heal did, as rows of name and value, and as one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from moacompress.core.shingles import OVERLAP_LIMIT, SHINGLE_WORDS
from moacompress.core.tables import error_text, estimate_text, facts, p_text, readable_bytes, readable_types
from moacompress.exporter.card import healed_bytes_text
from moacompress.rules.untrusted import reading_notes


@reading_notes("a heal")
def heal_sentence(notes: Mapping[str, Any]) -> str:
    """Returns what was trained and what it gave, by `heal` in a plan's provenance.

    Raises:
        PlanError: they are not what moacompress writes.
    """
    kl = notes["held_out_kl"]
    before, after = (error_text(*_mean(kl, name)) for name in ("before", "after"))
    trained = f"{_trained_part(notes)}, {notes['objective']}, {notes['tokens']:,} tokens in {notes['steps']} steps"
    if not notes["improved"]:
        return f"{trained}: no step lowered the held-out KL of {before} nats on {kl['samples']} samples"
    stored = healed_bytes_text(notes)
    tested = f"{kl['samples']} samples, {_tested(kl)}"
    return f"{trained}: held-out KL from {before} to {after} nats on {tested}{stored and f'. {stored}'}"


def _mean(kl: Mapping[str, Any], name: str) -> tuple[float, float | None]:
    return kl[name]["mean"], kl[name]["standard_error"]


def _tested(kl: Mapping[str, Any]) -> str:
    """Returns the p-value of a difference, and among how many states the samples that it is of chose one."""
    count = kl["evaluations"]
    chosen = f" as the best of {count} states on these samples" if count > 1 else ""
    return f"{p_text(kl['difference']['p'])}{chosen}"


def _trained_part(notes: Mapping[str, Any]) -> str:
    """Returns `lora of o_proj, v_proj`, or `lora` where all linear layers are trained."""
    modules = notes.get("recipe", {}).get("modules")
    return f"{notes['train']} of {', '.join(modules)}" if modules else str(notes["train"])


def heal_tables(folder: Path, notes: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the result of a heal, by `heal` in a plan's provenance, and how to load the healed checkpoint."""
    kl, sizes, overlap = notes["held_out_kl"], notes.get("weight_bytes"), notes.get("overlap")
    rows = {name: f"{error_text(*_mean(kl, name))} nats, {kl['samples']} samples" for name in ("before", "after")}
    apart = kl["difference"]
    rows["difference"] = f"{estimate_text(apart['mean'], apart['ci95'], '.3g')} nats, {_tested(kl)}"
    share = 1 - kl["after"]["mean"] / kl["before"]["mean"] if kl["before"]["mean"] else 0.0
    rows["taken off"] = f"{share:.0%} of the KL" if notes["improved"] else "nothing: the weights are those of the start"
    rows["trained"] = (
        f"{_trained_part(notes)}, {notes['objective']}, best state after step {notes['best_step']} of {notes['steps']}"
    )
    if isinstance(sizes, dict):
        rows["weights"] = "; ".join(
            f"{name} {readable_bytes(sum(sizes[name].values()))} ({readable_types(sizes[name])})"
            for name in ("before", "after")
        )
    rate = notes["tokens"] / notes["seconds"] if notes["seconds"] else 0.0
    rows["tokens"] = f"{notes['tokens']:,} of {notes['training_samples']} samples, {rate:,.0f} a second"
    seen = ", ".join(
        f"{kind} {share:.1%}{'†' if kind == 'text' and share > OVERLAP_LIMIT else ''}"
        for kind, share in (overlap.items() if isinstance(overlap, dict) else ())
        if share is not None
    )
    rows["overlap"] = f"of held-out samples with training, runs of {SHINGLE_WORDS} words: {seen or 'unknown'}"
    table = facts("Held-out KL(dense || model), before and after", rows)
    return [table, f'Load it with AutoModelForCausalLM.from_pretrained("{folder}")']

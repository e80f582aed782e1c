"""The formats of linear layers that a search chose together with a plan, as the plan's notes have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moacompress.core.errors import PlanError
from moacompress.rules.budget import format_length
from moacompress.rules.plan import Plan
from moacompress.rules.untrusted import reading_notes

WEIGHTS_NOTE = "weights"
"""Key of the note in a plan's provenance: `{"formats": {"model.layers.0.mlp.up_proj": "int4"}, "bytes": int}`."""
WEIGHT_FORMATS = ("int8", "int4")
"""What weights can be rounded to, by name; a layer that is not named keeps its numbers."""


def planned_weights(plan: Plan) -> dict[str, str] | None:
    """Returns the layers whose weights are to be rounded for a plan, each with `int8` or `int4`.

    Whether a model has such layers is for whoever rounds them to say.

    Args:
        plan: its notes may come from a file that is not trusted.

    Returns:
        None where the plan was searched for the weights as they are.

    Raises:
        PlanError: the note is not of this form.
    """
    note = plan.provenance.get(WEIGHTS_NOTE)
    if note is None:
        return None
    formats = note.get("formats") if isinstance(note, dict) else None
    if not isinstance(formats, dict) or not all(
        isinstance(name, str) and kind in WEIGHT_FORMATS for name, kind in formats.items()
    ):
        raise PlanError(
            f"provenance.{WEIGHTS_NOTE} of the plan must name layers, each with one of {', '.join(WEIGHT_FORMATS)}"
        )
    return dict(formats)


def own_weights(plan: Plan) -> str | None:
    """Returns how a checkpoint's weights came to be its own: "healed", "repaired", or "rounded" where the search chose some.

    None where they are the dense model's. Gates are no weights of the dense model.

    Raises:
        PlanError: as `planned_weights`.
    """
    return plan.changed_weights or ("rounded" if planned_weights(plan) else None)


def count_formats(formats: Iterable[str]) -> dict[str, int]:
    """Returns how many layers have each format, `int8` first."""
    found = list(formats)
    return {kind: found.count(kind) for kind in WEIGHT_FORMATS if kind in found}


def formats_text(formats: Mapping[str, str]) -> str:
    """Returns how many layers are rounded to what, as words."""
    counts = count_formats(formats.values())
    return ", ".join(f"{count} in {kind}" for kind, count in counts.items()) or "all as they were"


@reading_notes("memory")
def plan_memory(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns what weights and cache take by length, as `memory_lines` takes it; of a healed checkpoint as they are now."""
    healed = plan.provenance.get("heal")
    sizes = healed.get("weight_bytes") if isinstance(healed, dict) else None
    now = {"weights": sum(sizes["after"].values())} if isinstance(sizes, dict) else {}
    return {length: {**row, **now} for length, row in plan.budget.get("memory", {}).items()}


def memory_lines(memory: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns what weights and cache take, a sentence for each length that a budget of memory names.

    Args:
        memory: as a plan's notes have it: bytes by length, `limit`, `weights` and `kv_bytes`.
    """
    return [
        f"Memory at {format_length(int(length))} tokens: weights {row['weights']:,} bytes and KV cache {row['kv_bytes']:,}, "
        f"{row['weights'] + row['kv_bytes']:,} {_of_limit(row)}."
        for length, row in memory.items()
    ]


def _of_limit(row: Mapping[str, int]) -> str:
    if row["weights"] + row["kv_bytes"] > row["limit"]:
        return f"where {row['limit']:,} were asked for: weights that were trained are numbers again"
    return f"of the {row['limit']:,} asked for"


def without_planned_weights(plan: Plan) -> Plan:
    """Returns a plan without this note, for a checkpoint whose weights stay as they are."""
    kept = {name: note for name, note in plan.provenance.items() if name != WEIGHTS_NOTE}
    return plan.with_notes(provenance=kept)

"""What a plan keeps and costs: the fields of `inspect --json`, tables, maps of layers and KV heads, and memory of requests."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from moacompress.core.errors import ArtefactError, UsageError
from moacompress.core.shown import ShownDict
from moacompress.core.tables import Columns, Row, Table, facts, readable_bytes, readable_types
from moacompress.exporter.card import repair_text
from moacompress.models.source import find_model_folder
from moacompress.models.stored_plan import checkpoint_weights, find_running_plan, read_plan
from moacompress.models.weight_bytes import checkpoint_weight_bytes
from moacompress.models.weight_files import StoredTensor, loaded_files, read_header
from moacompress.report.heal_tables import heal_sentence
from moacompress.rules.budget import Budget, format_length, reference_length
from moacompress.rules.cost import attention_flops, chosen_share, format_rows, kept_bits
from moacompress.rules.formats import find_format
from moacompress.rules.memory import memory_lines, plan_memory
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_classes import classes_of
from moacompress.rules.worst_share import WorstShare

SHADES = "▁▂▃▄▅▆▇█"
NATIVE_MARK = "·"
_OF_LAYER = re.compile(r"(.*\.(?:layers|h)\.)(\d+)(\..+)")
"""Names of the weights of decoder layers."""
_OF_GATE = re.compile(r"att(?:ention|n)\.gate\.(?:weight|bias)$")
"""Names of the weights of gates."""
MAP_COLUMNS = 80
"""Most layers in one row of the map."""
CACHES = {"dense": "dense", "int8": "8-bit cache, all tokens", "int4": "4-bit cache, all tokens", "plan": "this plan"}
"""What caches are called whose memory is stated."""
FORMATS: Columns = {
    "keys": lambda pair: pair["key_format"],
    "values": lambda pair: pair["value_format"],
    "KV heads": lambda pair: str(pair["kv_heads"]),
}


class Inspection(ShownDict):
    """The fields of `inspect --json`, and the plan that they are of."""

    plan: Plan

    @staticmethod
    def of(plan: Plan, fields: Mapping[str, Any]) -> Inspection:
        """Returns what was found of a plan."""
        found = Inspection(fields)
        found.plan = plan
        return found


def inspect(target: Plan | str | Path, lengths: Sequence[int] | None = None) -> Inspection:
    """Returns what a plan keeps and costs, as `inspect --json` does; no model is loaded.

    Args:
        target: a plan, its file, a compressed checkpoint, or the folder of a run.
        lengths: where KV bytes are stated, tokens; by default those in the plan.

    Raises:
        UsageError: a length that is none.
        PlanError, ArtefactError: there is no plan, or what is there is damaged.
    """
    if isinstance(target, Plan):
        return inspect_plan(target, lengths)
    file = find_running_plan(Path(target))
    return inspect_plan(read_plan(file), lengths, find_model_folder(file.parent))


def inspect_plan(plan: Plan, lengths: Sequence[int] | None = None, folder: Path | None = None) -> Inspection:
    """Returns the fields of `inspect --json`, of the parameters too where the checkpoint's folder is given.

    Raises:
        ArtefactError: the checkpoint's weights cannot be read.
    """
    chosen = list(lengths or plan.stated_lengths)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in chosen):
        raise UsageError(f"lengths are numbers of tokens above 0, not {chosen}")
    reference = reference_length([Budget.parse(text) for text in plan.budget.get("asked", [])], plan.profiled_lengths)
    parameters = None if folder is None else count_parameters(folder, plan)

    def flops(n: int) -> dict[str, dict[str, int]]:
        dense, ours = attention_flops(Plan.full(plan.model), n), attention_flops(plan, n)
        return {phase: {"dense": dense[phase], "plan": ours[phase]} for phase in dense}

    fields = {
        "density": plan.density(reference),
        "bits": kept_bits(plan, reference),
        "formats": format_rows(plan, reference),
        "gates": chosen_share(plan, reference) if plan.selects else None,
        "centres": _centres(plan),
        "reference_length": reference,
        "kv_bytes": plan.kv_bytes_by_length(chosen),
        "worst_share": WorstShare.of(plan).to_dict(),
        "attention_flops": {str(n): flops(n) for n in chosen},
        "dtype": plan.model.dtype,
        "layers": plan.model.layers,
        "kv_heads": plan.model.kv_heads,
        "classes": len(classes_of(plan)),
        "shared_layers": [
            {"layer": layer, **share.to_dict()} for layer, share in enumerate(plan.shares) if share is not None
        ],
        "parameters": parameters,
        "weights": None if folder is None or parameters is None else checkpoint_weight_bytes(folder),
        "repair": plan.provenance.get("repair"),
        "min_window": plan.min_window,
        "budget": list(plan.budget.get("asked", [])),
        "memory": plan_memory(plan),
        "healed": plan.provenance.get("heal"),
    }
    return Inspection.of(plan, fields)


def count_parameters(folder: Path, plan: Plan) -> dict[str, int] | None:
    """Returns the numbers in a checkpoint's safetensors files, read from their headers; None if there are none.

    `plan` has those that are there; `dense` those without gates, and with what layers that share do without: what their
    anchors have more.

    Raises:
        ArtefactError: a file is cut short or is not safetensors.
    """
    in_blocks = checkpoint_weights(folder) if (folder / "config.json").is_file() else {}
    held = {
        name: _numbers(tensor, in_blocks.get(name.removesuffix(".weight")))
        for file in loaded_files(folder)
        for name, tensor in read_header(file).items()
    }
    if not held:
        return None
    dropped = 0
    for layer, share in enumerate(plan.shares):
        for name, numbers in held.items() if share is not None else ():
            part = _OF_LAYER.fullmatch(name)
            if share is not None and part is not None and int(part[2]) == share.anchor:
                dropped += max(0, numbers - held.get(f"{part[1]}{layer}{part[3]}", 0))
    gates = sum(numbers for name, numbers in held.items() if _OF_GATE.search(name)) if plan.selects else 0
    return {"dense": sum(held.values()) + dropped - gates, "plan": sum(held.values())}


def _numbers(tensor: StoredTensor, kind: str | None) -> int:
    """Returns how many numbers a tensor stands for, whatever they are stored as."""
    if kind is None:
        return tensor.numbers
    from moacompress.kernels.weight_blocks import WEIGHT_TYPES  # imports torch

    if kind not in WEIGHT_TYPES or len(tensor.shape) != 2:
        raise ArtefactError(f"the weights of the checkpoint are in blocks of an unknown type, {kind[:40]!r}")
    return tensor.shape[0] * WEIGHT_TYPES[kind].inputs(tensor.shape[1])


def inspection_tables(found: Inspection) -> list[RenderableType]:
    """Returns what `inspect` shows: facts, bytes, formats where there are several, and maps of the KV heads."""
    shown: list[RenderableType] = [overview(found.plan, found), kv_table(found)]
    if not _is_native(found.plan):
        shown.append(formats_table(found["formats"], found["bits"]))
    return [*shown, *plan_maps(found.plan, found["reference_length"])]


def _is_native(plan: Plan) -> bool:
    return all(rule.is_native for row in plan.rules for rule in row)


def overview(plan: Plan, data: Row) -> Table:
    """Returns the facts of a plan as names and values."""
    at = f"{format_length(data['reference_length'])} tokens"
    full = sum(rule.is_full for row in plan.rules for rule in row)
    shape, centres, gates = plan.model, data["centres"], data["gates"]
    rows = {
        "model": f"{shape.model_type}, {shape.layers} layers x {shape.kv_heads} KV heads, {shape.dtype}",
        "budget": ", ".join(data["budget"]) or "none asked for",
        "memory": " ".join(memory_lines(data["memory"])) if data["memory"] else "",
        "any length": str(WorstShare(**data["worst_share"])),
        "density": f"{data['density']:.1%} of the keys at {at}",
        "bits": f"{data['bits']['keys']:.1f} per number in kept keys, {data['bits']['values']:.1f} in kept values",
        "KV heads": (
            f"{shape.layers * shape.kv_heads}, {full} of them full, {data['classes']} different rules, no window under "
            f"{plan.min_window}"
        ),
    }
    if centres is not None:
        rows["centres"] = (
            f"keys of {centres['kv_heads']} KV heads are kept less their mean, which takes {centres['bytes']:,} bytes once"
        )
    if gates is not None:
        rows["gates"] = (
            f"{gates['kv_heads']} KV heads keep tokens by their score: {gates['share']:.0%} of the kept tokens at {at}"
        )
    rows["sharing"] = "; ".join(
        f"layer {layer}: {share}" for layer, share in enumerate(plan.shares) if share is not None
    )
    if data["parameters"] is not None:
        dense, ours = data["parameters"]["dense"], data["parameters"]["plan"]
        rows["parameters"] = f"{ours:,}" if ours == dense else f"{ours:,} of {dense:,}"
    if data["weights"] is not None:
        rows["weights"] = readable_types(data["weights"])
    rows["repair"] = repair_text(plan)
    if data["healed"] is not None:
        rows["healed"] = heal_sentence(data["healed"])
    return facts("Plan", {name: value for name, value in rows.items() if value})


def kv_table(data: Row) -> Table:
    """Returns the KV bytes at each length, and the share of attention's work that is left."""

    def work(phase: str) -> Callable[[Row], str]:
        return lambda row: f"{row[phase]['plan'] / row[phase]['dense']:.1%}"

    columns: Columns = {
        "tokens": lambda row: format_length(row["length"]),
        "dense": lambda row: readable_bytes(row["dense"]),
        "this plan": lambda row: readable_bytes(row["plan"]),
        "share": lambda row: f"{row['plan'] / row['dense']:.1%}",
        "attention FLOPs, prefill": work("prefill"),
        "decode": work("decode"),
    }
    rows = [{"length": int(n), **sizes, **data["attention_flops"][n]} for n, sizes in data["kv_bytes"].items()]
    return Table.of(f"KV cache, batch 1; shares relative to the {data['dtype']} dense cache", columns, rows)


def formats_table(formats: Sequence[Row], bits: Mapping[str, float]) -> Table:
    """Returns where the bytes of a plan are, by the formats of `cost.format_rows`; `bits` are those of a kept number."""
    total = sum(pair["kv_bytes"] for pair in formats)
    columns = FORMATS | {"share of bytes": lambda pair: f"{pair['kv_bytes'] / total:.0%}"}
    title = f"Bytes by format: {bits['keys']:.1f} bits per number in kept keys, {bits['values']:.1f} in kept values"
    return Table.of(title, columns, formats)


def memory_tables(found: Row) -> list[RenderableType]:
    """Returns a table for every length of `kv_memory`: the KV bytes of each batch, the requests that fit beside the weights."""
    weights = found["weights"]
    room = (
        "" if weights is None else f" ({readable_bytes(found['available'])} free, {readable_bytes(weights)} of weights)"
    )
    tables: list[RenderableType] = []
    for row in found["rows"]:
        columns = ["", *(f"batch {batch}" for batch in row["kv_bytes"]), *(["requests that fit"] if room else [])]
        cells = [
            [
                CACHES.get(name, f"plan at {name}"),
                *(readable_bytes(sizes[name]) for sizes in row["kv_bytes"].values()),
                *([f"{requests:,}"] if room else []),
            ]
            for name, requests in row["requests"].items()
        ]
        title = f"KV cache at {format_length(row['length'])} tokens, {found['dtype']}{room}"
        tables.append(Table(title, columns, cells))
    return tables


def _centres(plan: Plan) -> dict[str, int] | None:
    """Returns how many KV heads have centres and the bytes of these in memory, float32; None where none has."""
    heads = sum(map(bool, chain.from_iterable(plan.used_centres)))
    return {"kv_heads": heads, "bytes": heads * plan.model.head_dim * 4} if heads else None


def plan_maps(plan: Plan, n: int) -> list[Text]:
    """Returns the maps that say something of a plan at `n` tokens: of kept shares, of gates, of formats."""
    maps = (kept_map(plan, n), gates_map(plan, n), formats_map(plan))
    return [each for each in maps if each is not None]


def kept_map(plan: Plan, n: int) -> Text:
    """Returns a map of the share of `n` tokens that each KV head keeps."""

    def shade(layer: int, head: int) -> str:
        native = plan.model.native_windows[layer]
        kept = plan.rules[layer][head].kept(n, plan.min_window, native)
        return _shade_of(kept / Rule.FULL.kept(n, plan.min_window, native))

    title = f"Kept share of each KV head at {format_length(n)} tokens ({SHADES[0]} least, {SHADES[-1]} all):"
    return _map(plan, title, {"": shade})


def gates_map(plan: Plan, n: int) -> Text | None:
    """Returns a map of the share of the kept tokens that gates selected; None where no rule selects."""
    if not plan.selects:
        return None

    def shade(layer: int, head: int) -> str:
        rule, native = plan.rules[layer][head], plan.model.native_windows[layer]
        kept = rule.kept(n, plan.min_window, native)
        return _shade_of((kept - rule.without_choice().kept(n, plan.min_window, native)) / kept)

    title = f"Share of kept tokens that the gate selected, at {format_length(n)} tokens ({SHADES[0]} none, {SHADES[-1]} all):"
    return _map(plan, title, {"": shade})


def formats_map(plan: Plan) -> Text | None:
    """Returns a map of the bits of a code, with a row of keys and one of values for each KV head; None where all are native."""
    if _is_native(plan):
        return None

    def bits(side: str) -> Callable[[int, int], str]:
        return lambda layer, head: str(find_format(getattr(plan.rules[layer][head], side)).bits or NATIVE_MARK)

    title = f"Bits of the keys (K) and values (V) of each KV head ({NATIVE_MARK} not quantized):"
    return _map(plan, title, {"K": bits("key_format"), "V": bits("value_format")})


def _map(plan: Plan, title: str, sides: Mapping[str, Callable[[int, int], str]]) -> Text:
    """Returns a map with a column for each layer, and for each KV head a row of the marks of every side."""
    lines = [title]
    for first in range(0, plan.model.layers, MAP_COLUMNS):
        layers = range(first, min(first + MAP_COLUMNS, plan.model.layers))
        lines.append(f"layers {layers[0]}-{layers[-1]}")
        for head in range(plan.model.kv_heads):
            for side, mark in sides.items():
                lines.append(f"KV head {head:<2}{side:<2}" + "".join(mark(layer, head) for layer in layers))
    return Text("\n".join(lines), no_wrap=True, overflow="crop")


def _shade_of(share: float) -> str:
    return SHADES[min(int(share * (len(SHADES) - 1)), len(SHADES) - 1)]

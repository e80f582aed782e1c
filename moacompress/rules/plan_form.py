"""The JSON form of a plan: its versions, and how what somebody else may have written is read."""

from __future__ import annotations

from typing import Any

from moacompress.core.errors import PlanError
from moacompress.rules.formats import DTYPE_BYTES, NATIVE
from moacompress.rules.gate_weights import DIGITS
from moacompress.rules.model_shape import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, ModelShape
from moacompress.rules.rule import MAX_ALPHA, Rule
from moacompress.rules.share import COPY, Share
from moacompress.rules.untrusted import MAX_DEPTH, a_list, a_text, an_object, room_after, short, whole

FORMAT = "moacompress-plan"
RULE_FIELDS = ("sink", "alpha", "beta_q", "key_format", "value_format")
"""What a layer says of each of its KV heads."""
SELECT_FIELDS = ("select_alpha", "select_beta_q")
"""What a layer says besides where one of them keeps tokens that a gate chooses."""
WITHOUT_GATES = 2
"""Version of the plans that no gate belongs to."""
VERSION = 3
"""Newest version of a plan."""
MAX_NOTES = 1 << 24
"""Most numbers and characters in a plan's notes: a plan in a config.json has no file size of its own to check."""


def plan_fields(data: Any) -> dict[str, Any]:
    """Returns the fields of a plan from its JSON form.

    Raises:
        PlanError: not a plan, of a newer version, or not of the form that it has.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f'not a moacompress plan: "format" is not {FORMAT!r}')
    version = whole(data.get("version"), "version", 1, 10**6)
    if version > VERSION:
        raise PlanError(f"the plan has version {version}, this moacompress reads up to {VERSION}; upgrade moacompress")
    data = _upgraded(data, version)
    an_object(
        data,
        "the plan",
        ("format", "version", "model", "min_window", "layers"),
        ("gates", "budget", "quality", "provenance"),
    )
    fields = tuple(ModelShape.__dataclass_fields__)
    model = an_object(data["model"], "model", fields)
    layers = whole(model["layers"], "model.layers", 1, MAX_LAYERS)
    kv_heads = whole(model["kv_heads"], "model.kv_heads", 1, MAX_HEADS)
    values: dict[str, Any] = {name: model[name] for name in ("layers", "heads", "kv_heads", "head_dim")}
    values |= {name: a_text(model[name], f"model.{name}") for name in ("model_type", "dtype", "weights_fingerprint")}
    values["native_windows"] = tuple(a_list(model["native_windows"], "model.native_windows", layers))
    shape = ModelShape(**values)
    check_shape(shape)
    rules, shares = [], []
    for index, layer in enumerate(a_list(data["layers"], "layers", layers)):
        where = f"layer {index}"
        an_object(layer, where, RULE_FIELDS, (*SELECT_FIELDS, "share"))
        given = {name: layer[name] for name in RULE_FIELDS} | {
            name: layer.get(name, [0] * kv_heads) for name in SELECT_FIELDS
        }
        columns = [a_list(column, f"{name} of {where}", kv_heads) for name, column in given.items()]
        for name, column in zip(RULE_FIELDS, columns, strict=False):
            if name.endswith("_format"):
                for head, value in enumerate(column):
                    a_text(value, f"{name} of {where} KV head {head}")
        shares.append(_share(layer.get("share"), where, kv_heads))
        rules.append(tuple(Rule(*values) for values in zip(*columns, strict=True)))
    notes: dict[str, Any] = {}
    room = MAX_NOTES
    for name in ("budget", "quality", "provenance"):
        notes[name] = data.get(name, {})
        room = room_after(notes[name], room) if isinstance(notes[name], dict) else -1
        if room < 0:
            raise PlanError(
                f"{name} must be an object of finite numbers and texts, at most {MAX_DEPTH} deep, and {MAX_NOTES:,} numbers "
                "and characters with the other notes"
            )
    _check_notes(notes["budget"], notes["provenance"])
    return {
        "model": shape,
        "min_window": data["min_window"],
        "rules": tuple(rules),
        "shares": tuple(shares),
        "gates": _gates(data),
        **notes,
    }


def check_shape(shape: ModelShape) -> None:
    """Refuses a model of a shape that cannot be.

    Raises:
        PlanError: which number is out of bounds.
    """
    whole(shape.layers, "model.layers", 1, MAX_LAYERS)
    whole(shape.heads, "model.heads", 1, MAX_HEADS)
    whole(shape.kv_heads, "model.kv_heads", 1, MAX_HEADS)
    whole(shape.head_dim, "model.head_dim", 1, MAX_HEAD_DIM)
    if shape.heads % shape.kv_heads:
        raise PlanError(f"model.heads is {shape.heads}, no multiple of model.kv_heads {shape.kv_heads}")
    if shape.dtype not in DTYPE_BYTES:
        raise PlanError(f"model.dtype is {shape.dtype!r}, not one of {', '.join(sorted(DTYPE_BYTES))}")
    if len(shape.native_windows) != shape.layers:
        raise PlanError(f"model.native_windows has {len(shape.native_windows)} entries for {shape.layers} layers")
    for layer, native in enumerate(shape.native_windows):
        if native is not None:
            whole(native, f"model.native_windows of layer {layer}", 1, MAX_ALPHA)


def _gates(data: dict[str, Any]) -> str:
    """Returns the fingerprint of a plan's gates, or an empty text."""
    found = a_text(data.get("gates", ""), "gates")
    if found and not (len(found) == DIGITS and set(found) <= set("0123456789abcdef")):
        raise PlanError(f"gates is {short(found)!r}, not a fingerprint of {DIGITS} hexadecimal digits")
    return found


def _share(data: Any, where: str, kv_heads: int) -> Share | None:
    if data is None:
        return None
    where = f"share of {where}"
    an_object(data, where, ("anchor", "kind", "head_map"))
    anchor = whole(data["anchor"], f"anchor of {where}", 0, MAX_LAYERS - 1)
    heads = a_list(data["head_map"], f"head_map of {where}", kv_heads)
    head_map = tuple(whole(head, f"head_map of {where}", 0, MAX_HEADS - 1) for head in heads)
    kind = a_text(data["kind"], f"kind of {where}")
    if kind != COPY:
        raise PlanError(
            f"{where} has the kind {kind!r}, and layers share attention by {COPY!r} alone, queries and keys together: search "
            "again with `moacompress search --share`"
        )
    return Share(anchor, head_map)


def _upgraded(data: dict[str, Any], version: int) -> dict[str, Any]:
    """Returns a plan of an older version in the form of the present one; what is wrong with it is found later."""
    layers, model = data.get("layers"), data.get("model")
    if version > 1 or not isinstance(layers, list):
        return data
    heads = model.get("kv_heads") if isinstance(model, dict) else None
    native = [NATIVE] * heads if isinstance(heads, int) and 0 < heads <= MAX_HEADS else []
    return {**data, "layers": [_formatted(layer, f"layer {index}", native) for index, layer in enumerate(layers)]}


def _formatted(layer: Any, where: str, native: list[str]) -> Any:
    """Returns a layer of version 1, which knew no formats, with native ones."""
    if not isinstance(layer, dict):
        return layer
    for name in ("key_format", "value_format"):
        if name in layer:
            raise PlanError(f"{where} has the unknown key {name!r}; plans of version 1 have no formats")
    given = layer.get("kv_dtype", [])
    for head, dtype in enumerate(given if isinstance(given, list) else [given]):
        if dtype is not None:
            raise PlanError(f"kv_dtype of {where} KV head {head} is {short(dtype)!r}; version 1 has only null")
    rest = {name: value for name, value in layer.items() if name != "kv_dtype"}
    return {**rest, "key_format": native, "value_format": native}


def _check_notes(budget: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Refuses notes of another form than those that are read back; the others are only kept."""
    asked, sizes = budget.get("asked", []), budget.get("bytes", {})
    if not isinstance(asked, list) or not all(isinstance(text, str) and len(text) <= 64 for text in asked):
        raise PlanError(f"budget.asked must be a list of budgets, not {short(asked)!r}")
    if not isinstance(sizes, dict) or not all(str(n).isdecimal() and len(n) <= 9 and int(n) for n in sizes):
        raise PlanError(f"budget.bytes must be an object of lengths, not {short(list(sizes))!r}")
    lengths = provenance.get("lengths", [])
    if not isinstance(lengths, list):
        raise PlanError(f"provenance.lengths must be a list, not {short(lengths)!r}")
    for n in lengths:
        whole(n, "a length in provenance.lengths", 1, MAX_ALPHA)

"""The plan: which keys every KV head keeps and in which formats, for which model, and what was measured.

Reading a plan never runs code from it, never unpickles and never fetches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import gates_file
from moacompress.core.errors import ArtefactError, PlanError
from moacompress.core.files import MAX_JSON_BYTES, fingerprint, finite_json, read_json, write_json
from moacompress.rules.formats import DTYPE_BYTES, FORMATS, NATIVE
from moacompress.rules.gate_weights import DIGITS, GateWeights
from moacompress.rules.model_shape import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, ModelShape
from moacompress.rules.rule import MAX_ALPHA, MIN_WINDOWS, SINKS, Rule
from moacompress.rules.share import LayerShares, Share, check_shares
from moacompress.rules.windows import BETA_ONE

FORMAT = "moacompress-plan"
RULE_FIELDS = ("sink", "alpha", "beta_q", "key_format", "value_format")
"""What a layer says of each of its KV heads."""
SELECT_FIELDS = ("select_alpha", "select_beta_q")
"""What a layer says besides where one of them keeps tokens that a gate chooses."""
WITHOUT_GATES = 2
"""Version of the plans that no gate belongs to."""
VERSION = 3
MAX_DEPTH = 64
"""Deepest nesting of a plan's notes."""
MAX_NOTES = 1 << 24
"""Most numbers and characters in a plan's notes: a plan in a config.json has no file size of its own to check."""
WEIGHTS_VERSION = 2
"""Newest version of the weights fingerprint; see `moacompress.models.fingerprint`."""


def weights_version(fingerprint: str) -> int:
    """Returns the version of a weights fingerprint: the number in front, as in `2-0123456789abcdef`, or 1.

    Raises:
        PlanError: newer than is known.
    """
    version = _version_in(fingerprint)
    if version > WEIGHTS_VERSION:
        raise PlanError(
            f"the weights fingerprint {_short(fingerprint)} has version {_short(version)}, this moacompress knows up to "
            f"{WEIGHTS_VERSION}; upgrade moacompress"
        )
    return version


def may_be_same_weights(one: str, other: str) -> bool:
    """Returns False where two fingerprints are of different weights; those of two versions only the model can compare."""
    return one == other or _version_in(one) != _version_in(other)


def _version_in(fingerprint: str) -> int:
    front, dash, _ = fingerprint.partition("-")
    return int(front) if dash and front.isascii() and front.isdecimal() else 1


@dataclass(frozen=True)
class Plan:
    """One rule for every KV head of every layer, with where it came from and what it was measured to do.

    Attributes:
        model: the model it is for.
        min_window: smallest window of any KV head, tokens.
        rules: `rules[layer][kv_head]`.
        budget: `{"asked": [...], "bytes": {"1024": {"plan": int, "dense": int}}}`, empty for a hand-made plan.
        quality: predicted and measured harm, of the plan and of the baselines.
        provenance: calibration fingerprint, lengths, seeds, versions and the resolved recipe.
        shares: what each layer takes from an earlier one, or None; empty where no layer shares attention.
        gates: fingerprint of the gates that choose tokens; empty where no rule selects.
        gate_weights: these gates, where they are at hand: a plan's file has them beside it.
    """

    model: ModelShape
    min_window: int
    rules: tuple[tuple[Rule, ...], ...]
    budget: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    shares: LayerShares = ()
    gates: str = ""
    gate_weights: GateWeights | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not any(self.shares):
            object.__setattr__(self, "shares", ())
        if not self.selects:
            object.__setattr__(self, "gates", "")
            object.__setattr__(self, "gate_weights", None)
        _check(self)

    @staticmethod
    def uniform(model: ModelShape, rule: Rule, min_window: int = 32) -> Plan:
        """Returns the plan that gives every KV head the same rule."""
        return Plan(model, min_window, ((rule,) * model.kv_heads,) * model.layers)

    @staticmethod
    def full(model: ModelShape) -> Plan:
        """Returns the plan that keeps everything."""
        return Plan.uniform(model, Rule.FULL)

    @property
    def stated_lengths(self) -> list[int]:
        """Lengths in tokens that its bytes are stated for, ascending; 1k and 4k where it does not say."""
        return sorted(int(length) for length in self.budget.get("bytes", {})) or [1024, 4096]

    @property
    def selects(self) -> bool:
        """Whether some KV head keeps tokens that a gate chooses."""
        return any(rule.selects for row in self.rules for rule in row)

    def kept(self, n: int) -> int:
        """Returns the keys visible to query `n - 1`, summed over layers and KV heads."""
        return sum(rule.kept(n, self.min_window, native) for rule, native in self._heads())

    def slots(self, n: int) -> int:
        """Returns the tokens that the cache holds memory for at `n` tokens, summed over layers and KV heads."""
        return sum(rule.slots(n, self.min_window, native) for rule, native in self._heads())

    def kv_bytes(self, n: int, batch: int = 1) -> int:
        """Returns the bytes of the cache at `n` tokens."""
        return batch * sum(size for row in self.head_bytes(n) for size in row)

    def head_bytes(self, n: int) -> list[list[int]]:
        """Returns the bytes of the cache at `n` tokens of every KV head, `[layer][kv_head]`.

        A reuse layer takes what its values take, for as many tokens as its anchor keeps.
        """
        found = []
        for layer, (row, native) in enumerate(zip(self.rules, self.model.native_windows, strict=True)):
            share = self.share(layer)
            sizes = []
            for head, rule in enumerate(row):
                kept = rule if share is None else self.rules[share.anchor][share.head_map[head]]
                size = self.model.token_bytes(rule) if share is None else self.model.value_bytes(rule)
                sizes.append(int(kept.slots(n, self.min_window, native)) * size)
            found.append(sizes)
        return found

    def share(self, layer: int) -> Share | None:
        """Returns what a layer takes from an earlier one, or None."""
        return self.shares[layer] if self.shares else None

    def in_dtype(self, dtype: str) -> Plan:
        """Returns the same rules for the same model in another dtype, for what its cache takes, stated bytes included."""
        other = replace(self, model=replace(self.model, dtype=dtype))
        stated = {
            length: {"plan": other.kv_bytes(int(length)), "dense": other.model.dense_kv_bytes(int(length))}
            for length in self.budget.get("bytes", {})
        }
        return other.with_notes(budget={**self.budget, "bytes": stated}) if stated else other

    def kv_share(self, n: int) -> float:
        """Returns the cache's bytes at `n` tokens as a share of the dense model's."""
        return self.kv_bytes(n) / self.model.dense_kv_bytes(n)

    def density(self, n: int) -> float:
        """Returns kept / dense kept at `n` tokens, averaged over KV heads: a diagnostic, never the budget."""
        shares = [
            rule.kept(n, self.min_window, native) / Rule.FULL.kept(n, self.min_window, native)
            for rule, native in self._heads()
        ]
        return float(sum(shares) / len(shares))

    @property
    def changed_weights(self) -> str | None:
        """What has changed a checkpoint's weights from the dense model's, "healed" or "repaired"; None where nothing has."""
        repaired, healed = self.provenance.get("repair"), self.provenance.get("heal")
        if isinstance(healed, dict) and healed.get("improved"):
            return "healed"
        return "repaired" if isinstance(repaired, dict) and repaired.get("penalty") is not None else None

    def key(self) -> str:
        """Returns a hash of what the plan does (rules, min_window, shape), not of its numbers or history."""
        shape = self.model.to_dict()
        del shape["weights_fingerprint"]
        does: list[Any] = [shape, self.min_window, [[rule.to_list() for rule in row] for row in self.rules]]
        if self.shares:
            does.append([share and share.to_dict() for share in self.shares])
        if self.gates:
            does.append(self.gates)
        return fingerprint(does)

    def with_notes(self, **notes: dict[str, Any]) -> Plan:
        """Returns the same rules with other `budget`, `quality` or `provenance`."""
        return replace(self, **notes)  # type: ignore[arg-type]

    def check_model(self, model: ModelShape, *, weights: Callable[[str], str] | None) -> None:
        """Refuses a model that the plan was not made for.

        Args:
            model: the model at hand.
            weights: returns the fingerprint of its weights in the version of a given one, `SourceModel.weights_like`; None
                where only the shape counts (search and export compare weights, loading does not).

        Raises:
            PlanError: naming the first difference.
        """
        for name in ("model_type", "layers", "heads", "kv_heads", "head_dim", "native_windows"):
            ours, theirs = getattr(self.model, name), getattr(model, name)
            if ours != theirs:
                raise PlanError(
                    f"the plan is for another model: its {name} is {_short(ours)}, the model's is {_short(theirs)}; "
                    "make a plan for this model with `moacompress search`"
                )
        if weights is None:
            return
        found = weights(self.model.weights_fingerprint)
        if found != self.model.weights_fingerprint:
            raise PlanError(
                f"the plan is for other weights: fingerprint {self.model.weights_fingerprint}, the model has {found}; profile "
                "and search this model anew"
            )

    def diff(self, other: Plan) -> list[str]:
        """Returns one line for each difference in what the two plans do; empty when they do the same."""
        lines = []
        for name in ("model_type", "layers", "heads", "kv_heads", "head_dim", "native_windows", "weights_fingerprint"):
            ours, theirs = getattr(self.model, name), getattr(other.model, name)
            if ours != theirs and not (name == "weights_fingerprint" and may_be_same_weights(ours, theirs)):
                lines.append(f"model.{name}: {_short(ours)} -> {_short(theirs)}")
        if self.min_window != other.min_window:
            lines.append(f"min_window: {self.min_window} -> {other.min_window}")
        for layer, (row, other_row) in enumerate(zip(self.rules, other.rules, strict=False)):
            for head, (rule, other_rule) in enumerate(zip(row, other_row, strict=False)):
                if rule != other_rule and not (rule.is_full and other_rule.is_full):
                    lines.append(f"layer {layer} KV head {head}: {rule} -> {other_rule}")
            shares = self.share(layer), other.share(layer) if layer < other.model.layers else None
            if shares[0] != shares[1]:
                lines.append(f"layer {layer}: {' -> '.join(str(share or 'own attention') for share in shares)}")
        if self.gates != other.gates:
            lines.append(f"gates: {self.gates or 'none'} -> {other.gates or 'none'}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; what only newer versions know of is there where the plan has it."""

        def layer(row: tuple[Rule, ...], share: Share | None) -> dict[str, Any]:
            names = RULE_FIELDS + (SELECT_FIELDS if any(rule.selects for rule in row) else ())
            return {
                **{name: [getattr(rule, name) for rule in row] for name in names},
                "share": share and share.to_dict(),
            }

        shares = self.shares or (None,) * self.model.layers
        return {
            "format": FORMAT,
            "version": VERSION if self.selects else WITHOUT_GATES,
            "model": self.model.to_dict(),
            "min_window": self.min_window,
            "layers": [layer(row, share) for row, share in zip(self.rules, shares, strict=True)],
            **({"gates": self.gates} if self.gates else {}),
            "budget": finite_json(self.budget),
            "quality": finite_json(self.quality),
            "provenance": finite_json(self.provenance),
        }

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """Reads the JSON form.

        Raises:
            PlanError: one message naming the first thing that is wrong, with layer and head.
        """
        try:
            return _parse(data)
        except RecursionError as error:
            raise PlanError("the plan is nested too deep") from error

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, atomically, and its gates beside it."""
        if self.gate_weights is not None:
            self.gate_weights.save(gates_file(Path(path)))
        write_json(Path(path), self.to_dict())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a plan file, and its gates where they lie beside it.

        Raises:
            PlanError: unreadable, too large, or not a valid plan, or other gates; the message starts with the path.
        """
        try:
            plan = Plan.from_dict(read_json(Path(path), "plan", MAX_JSON_BYTES))
            beside = gates_file(Path(path))
            if not plan.gates or not beside.is_file():
                return plan
            heads = plan.model.layers, plan.model.kv_heads
            return replace(plan, gate_weights=GateWeights.load(beside, heads, plan.gates))
        except (ArtefactError, PlanError) as error:
            message = str(error)
            raise PlanError(message if str(path) in message else f"plan {path}: {message}") from error

    def _heads(self) -> Iterable[tuple[Rule, int | None]]:
        for row, native in zip(self.rules, self.model.native_windows, strict=True):
            for rule in row:
                yield rule, native


def _short(value: Any) -> str:
    text = json.dumps(finite_json(value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{name} must be a whole number, not {_short(value)!r}")
    if not low <= value <= high:
        raise PlanError(f"{name} is {value}, outside {low}..{high}")
    return value


def _check_shape(shape: ModelShape) -> None:
    _whole(shape.layers, "model.layers", 1, MAX_LAYERS)
    _whole(shape.heads, "model.heads", 1, MAX_HEADS)
    _whole(shape.kv_heads, "model.kv_heads", 1, MAX_HEADS)
    _whole(shape.head_dim, "model.head_dim", 1, MAX_HEAD_DIM)
    if shape.heads % shape.kv_heads:
        raise PlanError(f"model.heads is {shape.heads}, no multiple of model.kv_heads {shape.kv_heads}")
    if shape.dtype not in DTYPE_BYTES:
        raise PlanError(f"model.dtype is {shape.dtype!r}, not one of {', '.join(sorted(DTYPE_BYTES))}")
    if len(shape.native_windows) != shape.layers:
        raise PlanError(f"model.native_windows has {len(shape.native_windows)} entries for {shape.layers} layers")
    for layer, native in enumerate(shape.native_windows):
        if native is not None:
            _whole(native, f"model.native_windows of layer {layer}", 1, MAX_ALPHA)


def _check(plan: Plan) -> None:
    _check_shape(plan.model)
    if type(plan.min_window) is not int or plan.min_window not in MIN_WINDOWS:
        raise PlanError(f"min_window is {_short(plan.min_window)}, not one of {', '.join(map(str, MIN_WINDOWS))}")
    if len(plan.rules) != plan.model.layers:
        raise PlanError(f"the plan has {len(plan.rules)} layers for a model of {plan.model.layers}")
    for layer, row in enumerate(plan.rules):
        if len(row) != plan.model.kv_heads:
            raise PlanError(f"layer {layer} has {len(row)} KV heads for a model of {plan.model.kv_heads}")
        for head, rule in enumerate(row):
            where = f"layer {layer} KV head {head}"
            if type(rule.sink) is not int or rule.sink not in SINKS:
                raise PlanError(f"sink of {where} is {_short(rule.sink)}, not one of {', '.join(map(str, SINKS))}")
            _whole(rule.alpha, f"alpha of {where}", 0, MAX_ALPHA)
            _whole(rule.beta_q, f"beta_q of {where}", 0, BETA_ONE)
            _whole(rule.select_alpha, f"select_alpha of {where}", 0, MAX_ALPHA)
            _whole(rule.select_beta_q, f"select_beta_q of {where}", 0, BETA_ONE)
            if rule.selects and plan.model.native_windows[layer] is not None:
                raise PlanError(
                    f"{where} keeps tokens by their score in a layer with a sliding window of its own "
                    f"({plan.model.native_windows[layer]} tokens), which would hide them"
                )
            for name in ("key_format", "value_format"):
                if not isinstance(getattr(rule, name), str) or getattr(rule, name) not in FORMATS:
                    raise PlanError(
                        f"{name} of {where} is {_short(getattr(rule, name))}, not one of {', '.join(FORMATS)}; upgrade "
                        "moacompress if a newer one wrote the plan"
                    )
    if plan.selects and any(plan.shares):
        raise PlanError(
            "the plan has layers that share attention and KV heads that keep tokens by their score; one of the two"
        )
    check_shares(plan.model, plan.rules, plan.shares)


def _object(data: Any, name: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"{name} must be an object, not {_short(data)!r}")
    unknown = sorted(str(key) for key in data if key not in required and key not in optional)
    if unknown:
        raise PlanError(f"{name} has the unknown key {unknown[0]!r}; known are {', '.join([*required, *optional])}")
    missing = [key for key in required if key not in data]
    if missing:
        raise PlanError(f"{name} lacks the key {missing[0]!r}")
    return data


def _list(value: Any, name: str, size: int) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"{name} must be a list, not {_short(value)!r}")
    if len(value) != size:
        raise PlanError(f"{name} has {len(value)} entries, not {size}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise PlanError(f"{name} must be a text of at most 256 characters, not {_short(value)!r}")
    return value


def _parse(data: Any) -> Plan:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f'not a moacompress plan: "format" is not {FORMAT!r}')
    version = _whole(data.get("version"), "version", 1, 10**6)
    if version > VERSION:
        raise PlanError(f"the plan has version {version}, this moacompress reads up to {VERSION}; upgrade moacompress")
    data = _upgraded(data, version)
    _object(
        data,
        "the plan",
        ("format", "version", "model", "min_window", "layers"),
        ("gates", "budget", "quality", "provenance"),
    )
    fields = tuple(ModelShape.__dataclass_fields__)
    model = _object(data["model"], "model", fields)
    layers = _whole(model["layers"], "model.layers", 1, MAX_LAYERS)
    kv_heads = _whole(model["kv_heads"], "model.kv_heads", 1, MAX_HEADS)
    values: dict[str, Any] = {name: model[name] for name in ("layers", "heads", "kv_heads", "head_dim")}
    values |= {name: _text(model[name], f"model.{name}") for name in ("model_type", "dtype", "weights_fingerprint")}
    values["native_windows"] = tuple(_list(model["native_windows"], "model.native_windows", layers))
    shape = ModelShape(**values)
    _check_shape(shape)
    rules, shares = [], []
    for index, layer in enumerate(_list(data["layers"], "layers", layers)):
        where = f"layer {index}"
        _object(layer, where, RULE_FIELDS, (*SELECT_FIELDS, "share"))
        given = {name: layer[name] for name in RULE_FIELDS} | {
            name: layer.get(name, [0] * kv_heads) for name in SELECT_FIELDS
        }
        columns = [_list(column, f"{name} of {where}", kv_heads) for name, column in given.items()]
        for name, column in zip(RULE_FIELDS, columns, strict=False):
            if name.endswith("_format"):
                for head, value in enumerate(column):
                    _text(value, f"{name} of {where} KV head {head}")
        shares.append(_share(layer.get("share"), where, kv_heads))
        rules.append(tuple(Rule(*values) for values in zip(*columns, strict=True)))
    notes: dict[str, Any] = {}
    room = MAX_NOTES
    for name in ("budget", "quality", "provenance"):
        notes[name] = data.get(name, {})
        room = _room_after(notes[name], room) if isinstance(notes[name], dict) else -1
        if room < 0:
            raise PlanError(
                f"{name} must be an object of finite numbers and texts, at most {MAX_DEPTH} deep, and {MAX_NOTES:,} numbers "
                "and characters with the other notes"
            )
    _check_notes(notes["budget"], notes["provenance"])
    plan = Plan(shape, data["min_window"], tuple(rules), shares=tuple(shares), gates=_gates(data), **notes)
    if plan.selects and not plan.gates:
        raise PlanError("KV heads of the plan keep tokens by their score, and it does not say by which gates")
    return plan


def _gates(data: dict[str, Any]) -> str:
    """Returns the fingerprint of a plan's gates, or an empty text."""
    found = _text(data.get("gates", ""), "gates")
    if found and not (len(found) == DIGITS and set(found) <= set("0123456789abcdef")):
        raise PlanError(f"gates is {_short(found)!r}, not a fingerprint of {DIGITS} hexadecimal digits")
    return found


def _share(data: Any, where: str, kv_heads: int) -> Share | None:
    if data is None:
        return None
    where = f"share of {where}"
    _object(data, where, ("anchor", "kind", "head_map"))
    anchor = _whole(data["anchor"], f"anchor of {where}", 0, MAX_LAYERS - 1)
    heads = _list(data["head_map"], f"head_map of {where}", kv_heads)
    head_map = tuple(_whole(head, f"head_map of {where}", 0, MAX_HEADS - 1) for head in heads)
    return Share(anchor, _text(data["kind"], f"kind of {where}"), head_map)


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
            raise PlanError(f"kv_dtype of {where} KV head {head} is {_short(dtype)!r}; version 1 has only null")
    rest = {name: value for name, value in layer.items() if name != "kv_dtype"}
    return {**rest, "key_format": native, "value_format": native}


def _room_after(value: Any, room: int, depth: int = MAX_DEPTH) -> int:
    """Returns the room that is left after `value`, negative where it is too much, too deep or not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return -1
    if isinstance(value, dict | list):
        if depth == 0:
            return -1
        for item in value.items() if isinstance(value, dict) else value:
            parts = item if isinstance(value, dict) else (item,)
            for part in parts:
                room = _room_after(part, room, depth - 1)
                if room < 0:
                    return -1
    return room - (len(value) if isinstance(value, str) else 1)


def _check_notes(budget: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Refuses notes of another form than those that are read back; the others are only kept."""
    asked, sizes = budget.get("asked", []), budget.get("bytes", {})
    if not isinstance(asked, list) or not all(isinstance(text, str) and len(text) <= 64 for text in asked):
        raise PlanError(f"budget.asked must be a list of budgets, not {_short(asked)!r}")
    if not isinstance(sizes, dict) or not all(str(n).isdecimal() and len(n) <= 9 and int(n) for n in sizes):
        raise PlanError(f"budget.bytes must be an object of lengths, not {_short(list(sizes))!r}")
    lengths = provenance.get("lengths", [])
    if not isinstance(lengths, list):
        raise PlanError(f"provenance.lengths must be a list, not {_short(lengths)!r}")
    for n in lengths:
        _whole(n, "a length in provenance.lengths", 1, MAX_ALPHA)

"""The JSON form of a plan, and how what somebody else may have written is read.

Sizes are said of every layer, and rules name the layer that they are of: models of uneven layers, and plans about some of them,
need no other form. What this moacompress does not know yet is refused by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    TypeAdapter,
    ValidationInfo,
    model_validator,
)

from moacompress.core.errors import PlanError
from moacompress.rules.formats import DTYPE_BYTES, all_formats, is_format
from moacompress.rules.gate_weights import DIGITS
from moacompress.rules.key_centres import from_texts
from moacompress.rules.model_shape import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, ModelShape
from moacompress.rules.rule import MAX_ALPHA, MIN_WINDOWS, SINKS, Rule
from moacompress.rules.share import COPY, Share
from moacompress.rules.untrusted import (
    MAX_DEPTH,
    MAX_TEXT,
    Form,
    Loc,
    as_many,
    checked,
    one_of,
    remaining_budget,
    short,
)
from moacompress.rules.windows import BETA_ONE

FORMAT = "moacompress-plan"
RULE_FIELDS = ("sink", "alpha", "beta_q", "key_format", "value_format")
"""What a layer says of each of its KV heads."""
SELECT_FIELDS = ("select_alpha", "select_beta_q")
"""What a layer says besides where one of them keeps tokens that a gate chooses."""
SIZES = ("heads", "kv_heads", "head_dim")
"""What a model says of every layer, and this moacompress wants to be alike in all."""
VERSION = 1
"""Newest version of a plan."""
MAX_CENTRE = 4 * MAX_HEAD_DIM
"""Most characters of a centre."""
MAX_NOTES = 1 << 24
"""Most numbers and characters in a plan's notes: a plan in a config.json has no file size of its own to check."""

T = TypeVar("T")
Column = Annotated[list[T], FailFast()]
"""A value of each KV head of a layer."""
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Sink = Annotated[Any, one_of(SINKS)]
Alpha = Annotated[int, Field(ge=0, le=MAX_ALPHA)]
Beta = Annotated[int, Field(ge=0, le=BETA_ONE)]
Length = Annotated[int, Field(ge=1, le=MAX_ALPHA)]


def _is_format(name: str) -> str:
    if not is_format(name):
        raise ValueError(
            f"is {short(name)}, not one of {', '.join(all_formats())}; install the package that adds it, or upgrade "
            "moacompress if a newer one wrote the plan"
        )
    return name


Format = Annotated[Text, AfterValidator(_is_format)]


def _whole_groups(heads: list[int], info: ValidationInfo) -> list[int]:
    for layer, (queries, kv_heads) in enumerate(zip(heads, info.data.get("kv_heads", ()), strict=False)):
        if queries % kv_heads:
            raise ValueError(f"of layer {layer} is {queries}, no multiple of model.kv_heads {kv_heads}")
    return heads


def _is_copy(kind: str) -> str:
    if kind != COPY:
        raise ValueError(
            f"is {short(kind)!r}, and layers share attention by {COPY!r} alone, queries and keys together; search again with "
            "`moacompress search --share`"
        )
    return kind


def _is_fingerprint(found: str) -> str:
    if found and not (len(found) == DIGITS and set(found) <= set("0123456789abcdef")):
        raise ValueError(f"is {short(found)!r}, not a fingerprint of {DIGITS} hexadecimal digits")
    return found


def _are_by_length(sizes: dict[Any, Any]) -> dict[Any, Any]:
    if not all(str(n).isdecimal() and len(str(n)) <= 9 and 1 <= int(n) <= MAX_ALPHA for n in sizes):
        raise ValueError(f"must be an object of lengths, not {short(list(sizes))!r}")
    return sizes


_OF_LAYERS = as_many(lambda known: known["layers"])
HeadCount = Annotated[int, Field(ge=1, le=MAX_HEADS)]


class ModelForm(Form):
    """The JSON form of a `ModelShape`: what it says of layers is a list, one entry for each."""

    model_type: Text
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    kv_heads: Annotated[list[HeadCount], FailFast(), _OF_LAYERS]
    heads: Annotated[list[HeadCount], FailFast(), _OF_LAYERS, AfterValidator(_whole_groups)]
    head_dim: Annotated[list[Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)]], FailFast(), _OF_LAYERS]
    native_windows: Annotated[list[Length | None], FailFast(), _OF_LAYERS]
    kv_owners: Annotated[list[None], FailFast(), _OF_LAYERS]
    dtype: Annotated[Text, one_of(sorted(DTYPE_BYTES))]
    weights_fingerprint: Text

    @model_validator(mode="after")
    def _alike(self) -> ModelForm:
        for name in SIZES:
            sizes = getattr(self, name)
            other = next((layer for layer, size in enumerate(sizes) if size != sizes[0]), None)
            if other is not None:
                raise ValueError(
                    f"has {name} {sizes[0]} in layer 0 and {sizes[other]} in layer {other}; this moacompress runs plans of "
                    "models whose layers are alike"
                )
        return self

    def shape(self) -> ModelShape:
        """Returns the model's shape."""
        sizes = {name: getattr(self, name)[0] for name in SIZES}
        return ModelShape(
            model_type=self.model_type,
            layers=self.layers,
            dtype=self.dtype,
            native_windows=tuple(self.native_windows),
            weights_fingerprint=self.weights_fingerprint,
            **sizes,
        )


class ShareForm(Form):
    """The JSON form of a `Share`."""

    anchor: Annotated[int, Field(ge=0, le=MAX_LAYERS - 1)]
    kind: Annotated[Text, AfterValidator(_is_copy)]
    head_map: Column[Annotated[int, Field(ge=0, le=MAX_HEADS - 1)]]


class LayerForm(Form):
    """The rules of a layer, a column of each of their numbers; and what it shares."""

    layer: Annotated[int, Field(ge=0, le=MAX_LAYERS - 1)]
    sink: Column[Sink]
    alpha: Column[Alpha]
    beta_q: Column[Beta]
    key_format: Column[Format]
    value_format: Column[Format]
    select_alpha: Column[Alpha] = Field(default_factory=list)
    select_beta_q: Column[Beta] = Field(default_factory=list)
    key_centre: Column[Annotated[str, Field(max_length=MAX_CENTRE)] | None] = Field(default_factory=list)
    share: ShareForm | None = None


class RulesForm(Form):
    """What a plan does."""

    model: ModelForm
    min_window: Annotated[Any, one_of(MIN_WINDOWS)]
    layers: Annotated[list[LayerForm], FailFast(), as_many(lambda known: known["model"].layers)]


class MemoryNotes(Form):
    """What weights and the cache take at a length, bytes, and the most that they may together."""

    limit: Annotated[int, Field(ge=0, le=2**62)]
    weights: Annotated[int, Field(ge=0, le=2**62)]
    kv_bytes: Annotated[int, Field(ge=0, le=2**62)]


class BudgetNotes(BaseModel):
    """What of a plan's budget is read back; the rest is only kept."""

    model_config = ConfigDict(strict=True)
    asked: Annotated[list[Annotated[str, Field(max_length=64)]], FailFast()] = []
    bytes: Annotated[dict[Any, Any], AfterValidator(_are_by_length)] = {}
    memory: Annotated[dict[Annotated[str, Field(pattern=r"^[1-9]\d{0,8}$")], MemoryNotes], Field(max_length=64)] = {}


class ProvenanceNotes(BaseModel):
    """What of a plan's provenance is read back; the rest is only kept."""

    model_config = ConfigDict(strict=True)
    lengths: Annotated[list[Length], FailFast()] = []


class PlanForm(RulesForm):
    """A plan."""

    format: str
    version: int
    gates: Annotated[Text, AfterValidator(_is_fingerprint)] = ""
    budget: BudgetNotes = BudgetNotes()
    quality: dict[str, Any] = Field(default_factory=dict)
    provenance: ProvenanceNotes = ProvenanceNotes()


NOTES = ("budget", "quality", "provenance")
_VERSION = TypeAdapter(Annotated[int, Field(strict=True), Field(ge=1, le=10**6)])
_PLAN, _RULES, _MODEL = TypeAdapter(PlanForm), TypeAdapter(RulesForm), TypeAdapter(ModelForm)


def plan_fields(data: Any) -> dict[str, Any]:
    """Returns the fields of a plan from its JSON form.

    Raises:
        PlanError: not a plan, of a newer version, or not of the form that it has.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f'not a moacompress plan: "format" is not {FORMAT!r}')
    version = checked(_VERSION, data.get("version"), lambda path: "version")
    if version > VERSION:
        raise PlanError(f"the plan has version {version}, this moacompress reads up to {VERSION}; upgrade moacompress")
    notes = {name: data.get(name, {}) for name in NOTES}
    room = MAX_NOTES
    for name, note in notes.items():
        room = remaining_budget(note, room)
        if room < 0:
            raise PlanError(
                f"{name} must be an object of finite numbers and texts, at most {MAX_DEPTH} deep, and {MAX_NOTES:,} numbers "
                "and characters with the other notes"
            )
    form = checked(_PLAN, data, _name)
    _check_columns(form)
    model = form.model.shape()
    unselected, none = [0] * model.kv_heads, [None] * model.kv_heads
    columns = (
        [
            *(getattr(layer, name) for name in RULE_FIELDS),
            *(getattr(layer, name) or unselected for name in SELECT_FIELDS),
        ]
        for layer in form.layers
    )
    centres = [layer.key_centre or none for layer in form.layers]
    return {
        "model": model,
        "min_window": form.min_window,
        "rules": tuple(tuple(Rule(*values) for values in zip(*column, strict=True)) for column in columns),
        "shares": tuple(
            layer.share and Share(layer.share.anchor, tuple(layer.share.head_map)) for layer in form.layers
        ),
        "centres": from_texts(centres, model.layers, model.kv_heads, model.head_dim),
        "gates": form.gates,
        **notes,
    }


def read_shape(data: Any) -> ModelShape:
    """Reads the JSON form of a model's shape.

    Raises:
        PlanError: which number is out of bounds.
    """
    return checked(_MODEL, data, lambda path: _name(("model", *path))).shape()


def check_rules(model: ModelShape, min_window: int, rules: Sequence[Sequence[Rule]]) -> None:
    """Refuses `rules[layer][kv_head]` that no plan may have, and a model of a shape that cannot be.

    Raises:
        PlanError: which number is out of bounds, with layer and KV head.
    """
    names = RULE_FIELDS + SELECT_FIELDS
    layers = [
        {"layer": layer, **{name: [getattr(rule, name) for rule in row] for name in names}}
        for layer, row in enumerate(rules)
    ]
    _check_columns(checked(_RULES, {"model": model.to_dict(), "min_window": min_window, "layers": layers}, _name))


def check_candidates(model: ModelShape, min_window: int, rules: Sequence[Rule]) -> None:
    """Refuses candidate rules of which a plan may not have one, and a model of a shape that cannot be.

    Raises:
        PlanError: which number is out of bounds.
    """
    read_shape(model.to_dict())
    one_head = replace(model, layers=1, heads=1, kv_heads=1, native_windows=(None,))
    for rule in rules:
        check_rules(one_head, min_window, ((rule,),))


def _check_columns(form: RulesForm) -> None:
    for index, layer in enumerate(form.layers):
        kv_heads = form.model.kv_heads[index]
        if layer.layer != index:
            raise PlanError(
                f"entry {index} of layers is about layer {layer.layer}; this moacompress runs plans about all layers, in order"
            )
        columns = {name: getattr(layer, name) for name in layer.model_fields_set - {"share", "layer"}}
        if layer.share is not None:
            columns["head_map of share"] = layer.share.head_map
        for name, column in columns.items():
            if len(column) != kv_heads:
                raise PlanError(f"{name} of layer {index} has {len(column)} entries, not {kv_heads}")


def _name(path: Loc) -> str:
    """Returns what a message calls a part of a plan."""
    match path:
        case ():
            return "the plan"
        case ("layers", int(layer), *rest):
            name = f"layer {layer}"
            for part in rest:
                name = f"{name} KV head {part}" if isinstance(part, int) else f"{part} of {name}"
            return name
        case ("provenance", "lengths", int()):
            return "a length in provenance.lengths"
        case ("model", str(name), int(layer)):
            return f"model.{name} of layer {layer}"
        case _:
            return ".".join(map(str, path))

"""Formats of the KV cache as other tools write them, read and written: a format of keys and one of values for every layer.

Sources: what ModelOpt 0.47 exports as `hf_quant_config.json`, with the map of layers of its later versions
(`kv_cache_quantized_layers`), and `quantization_config` of compressed-tensors 0.20, which llm-compressor writes. They keep all
tokens and one format for a layer; what they cannot say, and what is rounded in another way here, is noted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from moacompress.core.errors import PlanError
from moacompress.core.version import own_version
from moacompress.rules.formats import FORMATS, NATIVE, find_format
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.untrusted import short

LayerFormats = tuple[str, str]
"""Formats of a layer's keys and of its values."""
EIGHT, FOUR = "int8", "int4"
MODELOPT_ALGORITHMS: dict[str, LayerFormats] = {
    "FP8": (EIGHT, EIGHT),
    "INT8": (EIGHT, EIGHT),
    "NVFP4": (FOUR, FOUR),
    "NVFP4_AFFINE": (FOUR, FOUR),
    "FP8_K_NVFP4_V": (EIGHT, FOUR),
}
"""ModelOpt's formats of a KV cache, with the nearest here; of those that have the same, the first is written."""
MIXED = "MIXED_PRECISION"
SCHEMA_VERSION = 1
"""Of ModelOpt's map of layers."""
ATTENTION = {"gpt_neox": "gpt_neox.layers.{}.attention"}
"""Names of a family's attention modules, where they are not `model.layers.{}.self_attn`."""
MAX_PATTERNS, MAX_PATTERN, MAX_REPEATS, MAX_CHOICES = 64, 200, 4, 8
"""Most regular expressions of a list of targets, longest one, and most repetitions in it: more can take for ever."""


def plan_of_layers(formats: Sequence[LayerFormats], shape: ModelShape) -> Plan:
    """Returns the plan that keeps all tokens, in a format of keys and one of values for each layer."""
    return Plan(shape, 16, tuple((Rule.FULL.in_formats(*each),) * shape.kv_heads for each in formats))


def layers_of_plan(plan: Plan) -> tuple[list[LayerFormats], list[str]]:
    """Returns the formats of every layer, the most exact of its KV heads, and what of the plan is left out.

    Raises:
        PlanError: layers that share attention.
    """
    if plan.shares:
        raise PlanError(
            "the plan's layers share attention, of which other tools know nothing; use a plan that does not share"
        )
    found = [(_exact(rule.key_format for rule in row), _exact(rule.value_format for rule in row)) for row in plan.rules]
    rules = [(rule, each) for row, each in zip(plan.rules, found, strict=True) for rule in row]
    counts = {
        "windows of {} KV heads are left out: all tokens are kept": sum(not rule.sees_all for rule, _ in rules),
        "what the gates of {} KV heads select is left out": sum(rule.selects for rule, _ in rules),
        "keys of {} KV heads are rounded whole, not less their mean": sum(
            map(bool, chain.from_iterable(plan.used_centres))
        ),
        "{} KV heads are kept more exactly, as others of their layer are": sum(
            (rule.key_format, rule.value_format) != each for rule, each in rules
        ),
    }
    return found, [text.format(count) for text, count in counts.items() if count]


def layers_of_modelopt(config: Any, layers: int) -> tuple[list[LayerFormats], list[str]]:
    """Returns the formats of every layer by ModelOpt's config, and what is not as it is there.

    The config is `hf_quant_config.json`, or a `config.json` with `quantization_config`.

    Raises:
        PlanError: not such a config, or formats or layers that there are not.
    """
    held = _part(config, "quantization", "quantization_config")
    named, algorithm = held.get("kv_cache_quantized_layers"), held.get("kv_cache_quant_algo")
    version = held.get("kv_cache_schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise PlanError(f"its kv_cache_schema_version is {short(version)}; known is {SCHEMA_VERSION}")
    if named is None and algorithm is None and "kv_cache_scheme" in held:  # as its config.json has it
        scheme = held["kv_cache_scheme"]
        if not isinstance(scheme, str):
            return _of_scheme(scheme, layers)
        algorithm = scheme
    if named is None:
        if algorithm is None:
            raise PlanError(
                "it has neither kv_cache_quantized_layers nor kv_cache_quant_algo: its cache is as in dense"
            )
        algorithms = [algorithm] * layers
    else:
        if not isinstance(named, dict):
            raise PlanError(f"its kv_cache_quantized_layers must be an object, not {short(named)}")
        algorithms = [None] * layers
        for name, each in named.items():
            layer = _layer(name, layers)
            if isinstance(each, dict) and "quant_algo" not in each:
                raise PlanError(f"its kv_cache_quantized_layers has no quant_algo for {short(name)}")
            algorithms[layer] = each["quant_algo"] if isinstance(each, dict) else each
    formats = [(NATIVE, NATIVE) if name is None else _known(name) for name in algorithms]
    return formats, _rounded(Counter(name for name in algorithms if name is not None), len(formats))


def modelopt_of_plan(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Returns what `hf_quant_config.json` says of the KV cache, and what it cannot say.

    Raises:
        PlanError: layers that share attention, or a format that ModelOpt does not have.
    """
    formats, notes = layers_of_plan(plan)
    names = {each: name for name, each in reversed(MODELOPT_ALGORITHMS.items())}
    written = [_nearest(each, names) for each in formats]
    named = {
        _attention(plan.model, layer): {"quant_algo": names[each]}
        for layer, each in enumerate(written)
        if each != (NATIVE, NATIVE)
    }
    used = {each["quant_algo"] for each in named.values()}
    quantization = {
        "quant_algo": None,
        "kv_cache_quant_algo": used.pop() if len(used) == 1 else MIXED if used else None,
        "kv_cache_quantized_layers": named,
        "kv_cache_schema_version": SCHEMA_VERSION,
    }
    producer = {"name": "moacompress", "version": own_version()}
    codes = ["codes are floats of 8 and 4 bits there, by scales that ModelOpt calibrates"] if named else []
    return {"producer": producer, "quantization": quantization}, [*notes, *_widened(formats, written), *codes]


def layers_of_compressed_tensors(config: Any, shape: ModelShape) -> tuple[list[LayerFormats], list[str]]:
    """Returns the formats of every layer by compressed-tensors' config, and what is not as it is there.

    The config is a `config.json` with `quantization_config`, or that part of it.

    Raises:
        PlanError: not such a config, or a scheme that cannot be read.
    """
    held = _part(config, "quantization_config", "compression_config")
    layers = shape.layers
    scheme, groups = held.get("kv_cache_scheme"), held.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise PlanError(f"its config_groups must be an object, not {short(groups)}")
    formats, notes = _of_scheme(scheme, layers) if scheme is not None else ([(NATIVE, NATIVE)] * layers, [])
    attention, ignored = 0, _layers_named(held.get("ignore") or [], shape)
    if len(groups) > MAX_PATTERNS:
        raise PlanError(f"it has {len(groups)} config_groups; at most {MAX_PATTERNS} are read")
    for name, group in groups.items():
        chosen = (
            _layers_named(group.get("targets"), shape, classes=True) - ignored if isinstance(group, dict) else set()
        )
        if chosen:
            attention += 1
            each, said = _of_scheme(group.get("input_activations"), layers)
            formats = [each[layer] if layer in chosen else formats[layer] for layer in range(layers)]
            notes += [f"{note} (group {short(name)})" for note in said]
            notes.append(f"group {short(name)} rounds queries too, which stay as they are here")
    if scheme is None and not attention:
        raise PlanError("it has no kv_cache_scheme and no group of attention modules: its cache is as in dense")
    weights = len(groups) - attention
    return formats, [*notes, *([f"how {weights} groups of other layers are quantized is left out"] if weights else [])]


def compressed_tensors_of_plan(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Returns compressed-tensors' `quantization_config`, and what it cannot say.

    A plan of one format for all layers is a `kv_cache_scheme`, as llm-compressor's modifiers take it; of others every format is
    a group of attention modules.

    Raises:
        PlanError: layers that share attention, or a format that compressed-tensors does not have.
    """
    formats, notes = layers_of_plan(plan)
    pairs: dict[LayerFormats, Any] = {(name, name): name for name in (EIGHT, FOUR)}
    written = [_nearest(each, pairs) for each in formats]
    used = [pair for pair in pairs if pair in written]
    config: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": None}
    if len(set(written)) == 1 and used:
        config["kv_cache_scheme"] = _scheme(used[0][0])
    else:
        config["config_groups"] = {
            f"group_{index}": {
                "targets": [_attention(plan.model, layer) for layer, each in enumerate(written) if each == pair],
                "input_activations": _scheme(pair[0]),
            }
            for index, pair in enumerate(used)
        }
    said = []
    if used:
        said.append("keys and values are not rotated there before they are rounded")
        said.append("vLLM runs schemes of 8-bit floats alone")
    if config["config_groups"]:
        said.append("groups of attention modules round queries too")
    return {"quantization_config": config}, [*notes, *_widened(formats, written), *said]


def _exact(names: Iterable[str]) -> str:
    """Returns the most exact of some formats."""
    return max(names, key=lambda name: (name == NATIVE, find_format(name).bits))


def _nearest(wanted: LayerFormats, known: Mapping[LayerFormats, Any]) -> LayerFormats:
    """Returns the least exact of known pairs that rounds neither keys nor values more; native where there is none.

    Raises:
        PlanError: a format of another kind than these.
    """
    for name in wanted:
        if name not in FORMATS:
            raise PlanError(f"the plan has the format {name}, which other tools do not have")
    bits = [16 if name == NATIVE else FORMATS[name].bits for name in wanted]

    def rounds_no_more(pair: LayerFormats) -> bool:
        return all(FORMATS[name].bits >= least for name, least in zip(pair, bits, strict=True))

    return min(
        filter(rounds_no_more, known), key=lambda pair: sum(FORMATS[n].bits for n in pair), default=(NATIVE,) * 2
    )


def _widened(wanted: Sequence[LayerFormats], written: Sequence[LayerFormats]) -> list[str]:
    count = sum(each != other for each, other in zip(wanted, written, strict=True))
    return [f"{count} layers are kept more exactly, as it has no such pair of formats"] if count else []


def _scheme(name: str) -> dict[str, Any]:
    """Returns the arguments of a format: integers with a scale and a zero point for each token of a KV head."""
    return {"num_bits": FORMATS[name].bits, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}


def _of_scheme(scheme: Any, layers: int) -> tuple[list[LayerFormats], list[str]]:
    bits = scheme.get("num_bits", 8) if isinstance(scheme, dict) else None
    kind = scheme.get("type", "int") if isinstance(scheme, dict) else None
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 16 or kind not in ("int", "float"):
        raise PlanError(f"its scheme {short(scheme)} has no num_bits from 1 to 16 of the type int or float")
    name = FOUR if bits <= 4 else EIGHT if bits <= 8 else NATIVE
    written = f"{kind} of {bits} bits, {scheme.get('strategy') or 'tensor'}"
    exactly = name == NATIVE or {key: scheme.get(key) for key in _scheme(EIGHT)} == _scheme(name)
    return [(name, name)] * layers, [] if exactly else _rounded({written: layers}, layers)


def _rounded(names: Mapping[str, int], layers: int) -> list[str]:
    """Returns what is said of formats whose codes are not ours."""
    return [
        f"{name} of {count} of {layers} layers is rounded as here, with a scale and a zero point of each vector; "
        "calibrated scales are left out"
        for name, count in names.items()
    ]


def _known(name: Any) -> LayerFormats:
    if not isinstance(name, str) or name not in MODELOPT_ALGORITHMS:
        known = ", ".join(MODELOPT_ALGORITHMS)
        raise PlanError(f"it has the format {short(name)} of a KV cache; known are {known}")
    return MODELOPT_ALGORITHMS[name]


def _part(config: Any, *keys: str) -> dict[str, Any]:
    """Returns the part of a config under the first of some keys that it has, or the config itself."""
    held = next((config[key] for key in keys if key in config), config) if isinstance(config, dict) else config
    if not isinstance(held, dict):
        raise PlanError(f"it must hold an object, not {short(held)}")
    return held


def _attention(shape: ModelShape, layer: int) -> str:
    return ATTENTION.get(shape.model_type, "model.layers.{}.self_attn").format(layer)


def _layer(name: str, layers: int) -> int:
    found = re.search(r"(?:^|\.)layers\.([0-9]{1,6})(?:\.|$)", name)
    if found is None or int(found[1]) >= layers:
        raise PlanError(f"it names {short(name)}, which is none of the model's {layers} layers")
    return int(found[1])


def _layers_named(targets: Any, shape: ModelShape, *, classes: bool = False) -> set[int]:
    """Returns the layers whose attention is among some targets; a class of modules, where these count, is of every layer."""
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise PlanError(f"its targets must be a list of names, not {short(targets)}")
    every, names = range(shape.layers), set(targets)
    if classes and any(name.endswith("Attention") for name in names):
        return set(every)
    patterns = [_pattern(name) for name in names if name.startswith("re:")]
    if len(patterns) > MAX_PATTERNS:
        raise PlanError(f"it has {len(patterns)} patterns in one list of targets; at most {MAX_PATTERNS} are read")
    modules = {layer: _attention(shape, layer) for layer in every}
    return {
        layer
        for layer, module in modules.items()
        if module in names or any(pattern.match(module) for pattern in patterns)
    }


def _pattern(target: str) -> re.Pattern[str]:
    pattern = target.removeprefix("re:")
    repeats, choices = (len(re.findall(each, pattern)) for each in (r"[*+{]", r"[?|]"))
    repeated_group = re.search(r"\)[*+{]|\(\?[a-zA-Z]*x", pattern)  # the flag x allows for spaces between the two
    if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or choices > MAX_CHOICES or repeated_group:
        raise PlanError(
            f"its target {short(target)} is too long a pattern; at most {MAX_PATTERN} characters, {MAX_REPEATS} "
            f"repetitions, of no group, and {MAX_CHOICES} choices (? and |) are read"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PlanError(f"its target {short(target)} is no regular expression: {error}") from error

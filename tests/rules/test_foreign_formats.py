"""Formats of the cache by other tools' configs: there and back, what is lost is said, and nothing is rounded more."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moacompress.core.errors import PlanError
from moacompress.rules.foreign_formats import (
    MODELOPT_ALGORITHMS,
    compressed_tensors_of_plan,
    layers_of_compressed_tensors,
    layers_of_modelopt,
    layers_of_plan,
    modelopt_of_plan,
    plan_of_layers,
)
from moacompress.rules.formats import CODED, FORMATS, NATIVE
from moacompress.rules.key_centres import as_centres
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

SHAPE = ModelShape("llama", 4, 8, 4, 64, "bfloat16", (None,) * 4, "2-0123456789abcdef")
FULL = (NATIVE, NATIVE)


def bits(name: str) -> int:
    return FORMATS[name].bits or 16


PAIRS = [*itertools.product([NATIVE, *CODED], [NATIVE, *CODED])]


@pytest.mark.parametrize("seed", range(14))
def test_there_and_back_rounds_no_more(seed: int) -> None:
    """Of plans of one pair of formats for all layers, and of any."""
    rng = np.random.default_rng(seed)
    layers = [PAIRS[seed]] * 4 if seed < len(PAIRS) else [PAIRS[number] for number in rng.integers(len(PAIRS), size=4)]
    plan = plan_of_layers(layers, SHAPE)
    config, lost = modelopt_of_plan(plan)
    back, _ = layers_of_modelopt(config, SHAPE.layers)
    assert any("no such pair" in note for note in lost) == (back != layers)
    tensors, lost = compressed_tensors_of_plan(plan)
    if tensors["quantization_config"]["kv_cache_scheme"] or tensors["quantization_config"]["config_groups"]:
        again, _ = layers_of_compressed_tensors(tensors, SHAPE)
    else:
        again = [FULL] * SHAPE.layers
    assert any("no such pair" in note for note in lost) == (again != layers)
    for found in (back, again):
        for (keys, values), (wanted_keys, wanted_values) in zip(found, layers, strict=True):
            assert bits(keys) >= bits(wanted_keys)
            assert bits(values) >= bits(wanted_values)
    assert all(pair in (FULL, ("int8", "int8"), ("int4", "int4"), ("int8", "int4")) for pair in back)


def test_modelopt_keeps_what_it_knows() -> None:
    layers = [FULL, ("int8", "int4"), ("int4", "int4"), ("int8", "int8")]
    config, lost = modelopt_of_plan(plan_of_layers(layers, SHAPE))
    held = config["quantization"]
    assert held["kv_cache_quant_algo"] == "MIXED_PRECISION"
    assert held["kv_cache_quantized_layers"] == {
        "model.layers.1.self_attn": {"quant_algo": "FP8_K_NVFP4_V"},
        "model.layers.2.self_attn": {"quant_algo": "NVFP4"},
        "model.layers.3.self_attn": {"quant_algo": "FP8"},
    }
    assert lost == ["codes are floats of 8 and 4 bits there, by scales that ModelOpt calibrates"]
    assert layers_of_modelopt(config, 4)[0] == layers
    one, _ = modelopt_of_plan(plan_of_layers([FULL, *[("int8", "int8")] * 3], SHAPE))
    assert one["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert layers_of_modelopt(one, 4)[0] == [FULL, *[("int8", "int8")] * 3]


@pytest.mark.parametrize("name", MODELOPT_ALGORITHMS)
def test_modelopt_without_a_map_is_of_all_layers(name: str) -> None:
    wanted = [MODELOPT_ALGORITHMS[name]] * 4
    for config in (
        {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": name}},
        {"quantization_config": {"quant_method": "modelopt", "kv_cache_scheme": name}},
    ):
        formats, notes = layers_of_modelopt(config, 4)
        assert formats == wanted
        assert notes == [
            f"{name} of 4 of 4 layers is rounded as here, with a scale and a zero point of each vector; "
            "calibrated scales are left out"
        ]
    converted = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}, "quant_method": "modelopt"}
    assert layers_of_modelopt({"quantization_config": converted}, 4)[0] == [("int8", "int8")] * 4


def test_a_scheme_of_all_layers() -> None:
    config, lost = compressed_tensors_of_plan(plan_of_layers([("int8", "int8")] * 4, SHAPE))
    held = config["quantization_config"]
    assert held["config_groups"] == {}
    assert held["kv_cache_scheme"]["num_bits"] == 8
    assert len(lost) == 2
    assert layers_of_compressed_tensors(config, SHAPE) == ([("int8", "int8")] * 4, [])
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    formats, notes = layers_of_compressed_tensors({"kv_cache_scheme": fp8}, SHAPE)
    assert formats == [("int8", "int8")] * 4
    assert notes[0].startswith("float of 8 bits, tensor of 4 of 4 layers is rounded as here")
    assert layers_of_compressed_tensors({"kv_cache_scheme": {"num_bits": 3}}, SHAPE)[0] == [("int4", "int4")] * 4
    for more in (9, 16):
        kept = {**fp8, "num_bits": more}
        assert layers_of_compressed_tensors({"kv_cache_scheme": kept}, SHAPE) == ([FULL] * 4, [])


def test_groups_of_attention_modules() -> None:
    arguments = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    linear = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    for targets, chosen in (
        (["model.layers.1.self_attn"], {1}),
        ([r"re:.*layers\.(0|3)\.self_attn$"], {0, 3}),
        (["re:.*self_attn$"], {0, 1, 2, 3}),
        ([r"re:model\.layers\.[02]\.(self_attn|attn)(\.fused)?$"], {0, 2}),
        (["LlamaAttention"], {0, 1, 2, 3}),
    ):
        groups = {"group_0": linear, "group_1": {"targets": targets, "input_activations": arguments}}
        config = {"quantization_config": {"config_groups": groups, "ignore": ["lm_head", "model.layers.3.self_attn"]}}
        formats, notes = layers_of_compressed_tensors(config, SHAPE)
        assert formats == [("int4", "int4") if layer in chosen - {3} else FULL for layer in range(4)]
        assert notes == [
            "group group_1 rounds queries too, which stay as they are here",
            "how 1 groups of other layers are quantized is left out",
        ]


def test_what_a_layer_cannot_say_is_listed() -> None:
    row = (
        Rule(4, 128, 0, "int8", "int4"),
        Rule(4, 64, 0, select_alpha=16),
        *[Rule.FULL.in_formats("int4", "int4")] * 2,
    )
    plan = Plan(SHAPE, 32, (row,) * 4, gates="0123456789abcdef")
    formats, lost = layers_of_plan(plan)
    assert formats == [FULL] * 4
    assert lost == [
        "windows of 8 KV heads are left out: all tokens are kept",
        "what the gates of 4 KV heads select is left out",
        "12 KV heads are kept more exactly, as others of their layer are",
    ]
    centres = as_centres(np.ones((4, 4, 64)))
    _, lost = layers_of_plan(Plan(SHAPE, 32, (row,) * 4, centres=centres, gates="0123456789abcdef"))
    assert "keys of 12 KV heads are rounded whole, not less their mean" in lost


def test_other_families_have_other_names() -> None:
    shape = ModelShape("gpt_neox", 4, 8, 8, 64, "bfloat16", (None,) * 4, "2-0123456789abcdef")
    config, _ = modelopt_of_plan(plan_of_layers([("int8", "int8"), FULL, FULL, FULL], shape))
    assert list(config["quantization"]["kv_cache_quantized_layers"]) == ["gpt_neox.layers.0.attention"]


LAYER = "model.layers.0.self_attn"
WRONG: list[tuple[Any, str]] = [
    ([], "must hold an object"),
    ({}, "neither kv_cache_quantized_layers nor"),
    ({"kv_cache_quant_algo": "FP3"}, "has the format FP3 of a KV cache; known are FP8, INT8"),
    ({"kv_cache_quantized_layers": []}, "kv_cache_quantized_layers must be an object"),
    (
        {"kv_cache_quantized_layers": {"model.layers.4.self_attn": {"quant_algo": "FP8"}}},
        "none of the model's 4 layers",
    ),
    ({"kv_cache_quantized_layers": {LAYER: {"algo": "FP8"}}}, f"no quant_algo for {LAYER}"),
    ({"kv_cache_quantized_layers": {}, "kv_cache_schema_version": 2}, "kv_cache_schema_version is 2; known is 1"),
]
WRONG_SCHEMES: list[tuple[Any, str]] = [
    ({}, "no kv_cache_scheme and no group"),
    ({"kv_cache_scheme": 8}, "no num_bits"),
    ({"kv_cache_scheme": {"num_bits": 8, "type": "complex"}}, "no num_bits"),
    ({"config_groups": 5}, "config_groups must be an object"),
    ({"config_groups": {"a": {"targets": "Linear"}}}, "targets must be a list of names"),
    ({"config_groups": {"a": {"targets": ["re:(.*)*$"]}}}, "too long a pattern"),
    ({"config_groups": {"a": {"targets": ["re:(?x:(?:.*) *)!"]}}}, "too long a pattern"),
    ({"config_groups": {"a": {"targets": ["re:" + ".*" * 9]}}}, "too long a pattern"),
    ({"config_groups": {"a": {"targets": ["re:" + ".?" * 34 + "Z"]}}}, "too long a pattern"),
    ({"config_groups": {"a": {"targets": ["re:" + "(.|.|.)" * 20 + "Z"]}}}, "too long a pattern"),
    ({"config_groups": {"a": {"targets": ["re:("]}}}, "no regular expression"),
    ({"config_groups": {"a": {"targets": [f"re:{i}" for i in range(65)]}}}, "65 patterns"),
    ({"config_groups": {str(i): {} for i in range(65)}}, "65 config_groups"),
]


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        *((layers_of_modelopt, *wrong) for wrong in WRONG),
        *((layers_of_compressed_tensors, *wrong) for wrong in WRONG_SCHEMES),
    ],
)
def test_what_is_no_config_is_refused(read: Callable[..., Any], config: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read(config, 4 if read is layers_of_modelopt else SHAPE)

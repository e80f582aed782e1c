"""What moacompress cannot compress, as far as a model's config tells: no weights, no modules and no code of a repository.

One sentence each, with the layers or the config key that it is about. What only the modules tell is in
`moacompress.models.modules.module_problems`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from moacompress.core.errors import ModelError
from moacompress.rules.model_shape import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS

TORCHAO = "torchao"
"""The `quant_method` of a checkpoint that torchao quantized, and the package that reads it."""
ATTENTION_KINDS = ("full_attention", "sliding_attention")
"""Layer types of transformers whose keys and values moacompress can drop."""
TESTED_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "gpt_neox",
    "olmo2",
    "granite",
    "cohere2",
    "qwen3_moe",
    "ministral3",
    "gpt_oss",
)
"""The `model_type` of every text decoder that the test-suite runs; others of the same attention may work."""
_KIND_KEYS = ("layer_types", "layers_block_type")
_STATE_KINDS = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "rwkv", "state_space")
_OWN_ATTENTION = {
    "diffllama": "attends twice in every layer and subtracts the results",
    "jetmoe": "lets a router pick the query heads of every token",
    "doge": "makes a mask of its own in every layer from the values",
}
"""Families that call the attention interface, but with something that a plan cannot stand in for."""


def config_problems(config: Any) -> list[str]:
    """Returns what in a transformers config cannot be compressed, one sentence each; empty if nothing is known.

    Of a config with several parts the text decoder counts.
    """
    if getattr(config, "is_encoder_decoder", False):
        return [
            f"{_name(config)} is an encoder-decoder (is_encoder_decoder), whose decoder attends across to the encoder's "
            "keys; only decoder-only models can be compressed"
        ]
    text = config.get_text_config(decoder=True)
    found = size_problems(text) or [
        *_layer_kinds(text),
        *_latent(text),
        *_across(text),
        *_shared(text),
        *_uneven(text),
        *_direction(text),
        *_positions(text),
    ]
    return [f"{_name(text)} {problem}" for problem in found]


def stored_problems(config: Any) -> list[str]:
    """Returns what in the form of a checkpoint's weights rules out compressing it: quantized, compressed, or in other files."""
    if getattr(config, "transformers_weights", None) is not None:
        return [
            f"{_name(config)} names the file of its weights (transformers_weights), which could be a pickle, and it can run "
            "code when it is opened; save the model as safetensors under its usual name and leave that out"
        ]
    for part in (config, config.get_text_config(decoder=True)):
        method = quantization_method(part)
        if method == "moacompress":
            return [
                f"{_name(config)} is compressed already (quantization_config); give the dense model it was made from"
            ]
        if method == TORCHAO and importlib.util.find_spec(TORCHAO) is None:
            return [
                f"{_name(config)} has weights quantized by torchao, which is needed to read them: `pip install "
                "'moacompress[torchao]'`; or give the model with float weights"
            ]
        if method not in (None, "gguf", TORCHAO):  # these are dequantized on loading
            return [
                f"{_name(config)} has weights quantized by {method} (quantization_config); give the model with float weights"
            ]
    return []


def is_tested(config: Any) -> bool:
    """Returns whether the test-suite runs models of a config's family, the text decoder of one with several parts."""
    return str(getattr(config.get_text_config(decoder=True), "model_type", "")) in TESTED_FAMILIES


def quantization_method(config: Any) -> str | None:
    """Returns the `quant_method` of a config's `quantization_config`, or None if it has none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def native_windows(config: Any, layers: int) -> list[int | None]:
    """Returns the model's own sliding window of each layer in tokens, None where a layer sees everything.

    Raises:
        ModelError: a layer type that is neither full nor sliding attention.
    """
    size = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        size = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return [int(size) if size else None] * layers
    problems = _layer_kinds(config)
    if problems:
        raise ModelError(f"{_name(config)} {problems[0]}")
    return [int(size) if size and kind == "sliding_attention" else None for kind in types[:layers]]


def _name(config: Any) -> str:
    return str(getattr(config, "model_type", None) or type(config).__name__)


def size_problems(config: Any) -> list[str]:
    """Returns the sizes in a text decoder's config that no plan can have: absurd ones would take memory by themselves."""
    limits = {
        "num_hidden_layers": MAX_LAYERS,
        "num_attention_heads": MAX_HEADS,
        "num_key_value_heads": MAX_HEADS,
        "head_dim": MAX_HEAD_DIM,
    }
    found = []
    for key, most in limits.items():
        if key in _per_layer(config):
            continue
        value = getattr(config, key, None)
        if isinstance(value, int) and not 1 <= value <= most:
            found.append(f"has {key} {value}, outside 1..{most}")
    return found


def _layer_kinds(config: Any) -> list[str]:
    for key in _KIND_KEYS:
        kinds = getattr(config, key, None)
        if isinstance(kinds, Sequence) and not isinstance(kinds, str):
            break
    else:
        return []
    found: dict[str, list[int]] = {}
    for layer, kind in enumerate(kinds):
        if kind not in (*ATTENTION_KINDS, "attention"):
            found.setdefault(str(kind), []).append(layer)
    return [_about_kind(config, kind, f"layers {_ranges(layers)} ({key})") for kind, layers in found.items()]


def _about_kind(config: Any, kind: str, where: str) -> str:
    if kind in _STATE_KINDS:
        return f"has layers of type {kind} that keep a state, not keys and values: {where}; all layers must attend"
    if kind == "hybrid":
        return f"has layers of type hybrid, a state space beside attention: {where}; all layers must only attend"
    if kind == "chunked_attention":
        size = getattr(config, "attention_chunk_size", None)
        return (
            f"has layers of type chunked_attention that see their own chunk of {size} tokens (attention_chunk_size) only: "
            f"{where}; full and sliding attention can be compressed"
        )
    return f"has layers of type {kind}: {where}; full and sliding attention can be compressed"


def _latent(config: Any) -> list[str]:
    rank = getattr(config, "kv_lora_rank", None)
    if not rank:
        return []
    return [f"caches latent vectors (MLA, kv_lora_rank {rank}) in all layers, not keys and values of heads"]


def _across(config: Any) -> list[str]:
    layers = getattr(config, "cross_attention_layers", None)
    if layers:
        return [f"has cross attention in layers {_ranges(layers)} (cross_attention_layers); all must be self-attention"]
    if getattr(config, "add_cross_attention", False):
        return ["has cross attention in all layers (add_cross_attention); only self-attention can be compressed"]
    return []


def _shared(config: Any) -> list[str]:
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:
        layers = int(config.num_hidden_layers)
        return [
            f"has no keys and values in layers {_ranges(range(layers - int(shared), layers))}, which read those of earlier "
            f"layers (num_kv_shared_layers {shared}); every layer must have its own"
        ]
    loops = getattr(config, "n_recurrent_loops", None)
    if isinstance(loops, int) and loops > 1:
        return [f"runs layers {loops} times over in one pass (n_recurrent_loops); every layer must run once"]
    return []


def _uneven(config: Any) -> list[str]:
    """A plan knows one number of heads and one head size for all layers."""
    found = [
        f"has a {key} that differs between layers (per_layer_config); a plan needs the same in all layers"
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
        if key in _per_layer(config)
    ]
    heads = getattr(config, "num_attention_heads_per_layer", None)
    if isinstance(heads, Sequence) and len(set(heads)) > 1:
        found.append("has a number of query heads that differs between layers (num_attention_heads_per_layer)")
    return found


def _per_layer(config: Any) -> frozenset[str]:
    return frozenset(getattr(config, "per_layer_attributes", None) or ())


def _direction(config: Any) -> list[str]:
    if getattr(config, "is_causal", True) is False:
        key = "is_causal"
    elif getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        key = "use_bidirectional_attention"
    else:
        return []
    return [
        f"attends in both directions ({key} {getattr(config, key)}), so no key can be dropped; only causal models work"
    ]


def _positions(config: Any) -> list[str]:
    attention = getattr(config, "attn_config", None)
    inner = attention.get("alibi") if isinstance(attention, Mapping) else getattr(attention, "alibi", None)
    for key, value in (("alibi", getattr(config, "alibi", None)), ("attn_config.alibi", inner)):
        if value:
            return [
                f"adds ALiBi biases to the scores of all layers ({key}), outside of transformers' attention interface, so "
                "moacompress cannot replace its attention"
            ]
    own = _OWN_ATTENTION.get(str(config.model_type))
    return [f"{own}, which a plan cannot stand in for"] if own else []


def _ranges(layers: Sequence[int]) -> str:
    """Returns layer numbers as text, runs joined: `0-3, 5`."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(parts if len(parts) <= 8 else [*parts[:7], f"... ({len(set(layers))} layers)"])

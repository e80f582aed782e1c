"""The modules of a loaded model that attend, and what in them cannot be compressed."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, cast

from moacompress.core.errors import ModelError
from moacompress.models.shape import config_shape
from moacompress.models.support import config_problems, native_windows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the self-attention module of every layer of a model's decoder, in layer order."""
    found: dict[int, torch.nn.Module] = {}
    get_decoder: Any = getattr(model, "get_decoder", None)
    for module in (model if get_decoder is None else get_decoder()).modules():
        layer: Any = getattr(module, "layer_idx", None)
        if layer is not None and "Attention" in type(module).__name__ and hasattr(module, "config"):
            found.setdefault(int(layer), module)
    return [found[index] for index in sorted(found)]


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the decoder layers in order: the modules that hold one attention module each, as a direct child."""
    attention = {id(module): index for index, module in enumerate(attention_modules(model))}
    found = {
        attention[id(child)]: module
        for module in model.modules()
        for child in module.children()
        if id(child) in attention
    }
    return [found[index] for index in sorted(found)]


def given_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Returns the layer's input, `[rows, tokens, hidden]`, of what an attention module is called with."""
    return cast("torch.Tensor", kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def needed_weights(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights that a checkpoint of a model must hold, by name; they may be on "meta"."""
    left_out = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["(?!)"]))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not left_out.search(name)}


def is_pretrained(module: Any) -> bool:
    """Whether a module is a model of transformers', also one whose base class was loaded again since, as by a reload."""
    return any(
        (base.__module__, base.__name__) == ("transformers.modeling_utils", "PreTrainedModel")
        for base in type(module).__mro__
    )


def check_unwrapped(model: Any) -> None:
    """Refuses what is around a model: a plan would run inside and could not be found, or taken off, from there.

    Raises:
        ModelError: it is not transformers' own.
    """
    if is_pretrained(model):
        return
    inside = next((name for name in ("get_base_model", "_orig_mod", "module") if hasattr(model, name)), None)
    if inside is None:
        raise ModelError(f"a {type(model).__name__} is not a causal LM that transformers loaded")
    given = f"{inside}()" if inside == "get_base_model" else inside
    raise ModelError(f"a {type(model).__name__} is around a model; give the one inside (`model.{given}`)")


def check_supported(model: PreTrainedModel) -> None:
    """Refuses a model whose attention moacompress cannot replace.

    Raises:
        ModelError: says what in the model is not supported.
    """
    problems = config_problems(model.config) or module_problems(model)
    if problems:
        raise ModelError(problems[0])


def module_problems(model: PreTrainedModel) -> list[str]:
    """Returns what in the modules of a model cannot be compressed, one sentence each; weights may be on "meta".

    Its config has no `config_problems`.
    """
    config = model.config.get_text_config(decoder=True)
    name = config.model_type
    if not model.can_generate():
        return [f"{name} is not a decoder-only causal language model"]
    if not getattr(model, "_supports_attention_backend", False):
        base = model.base_model
        alibi = any("alibi" in attribute and callable(getattr(base, attribute)) for attribute in dir(base))
        return [
            f"{name} {'adds ALiBi biases to the scores and ' if alibi else ''}does not dispatch its attention through "
            "transformers' attention interface, so moacompress cannot replace it"
        ]
    decoder: Any = model.get_decoder()
    if not hasattr(decoder, "config"):
        return [f"{name} gives a {type(decoder).__name__} as its decoder, so moacompress cannot bring its cache"]
    modules = attention_modules(model)
    if len(modules) != config.num_hidden_layers:
        return [f"{name} has attention in {len(modules)} of {config.num_hidden_layers} layers; all need it"]
    if any(getattr(module, "is_causal", True) is False for module in modules):
        return [f"{name} attends in both directions, so no key can be dropped; only causal models work"]
    return [*_uneven_projections(name, config, modules), *_windows_of_its_own(name, config, decoder)]


def _uneven_projections(name: str, config: Any, modules: list[torch.nn.Module]) -> list[str]:
    """A plan knows one number of KV heads, and one size of keys and values."""
    shape = config_shape(config, dtype="float32")
    for layer, module in enumerate(modules):
        for kind in ("k_proj", "v_proj"):
            width = getattr(getattr(module, kind, None), "out_features", None)
            if width is not None and width != shape.kv_heads * shape.head_dim:
                return [
                    f"{name} has other KV heads in layer {layer}: its {kind} gives {width} numbers a token, not "
                    f"{shape.kv_heads} KV heads of {shape.head_dim}; all layers need the same"
                ]
    return []


def _windows_of_its_own(name: str, config: Any, decoder: Any) -> list[str]:
    """A plan trusts the windows in the config, so the model must apply them through transformers' masks."""
    windows = native_windows(config, config.num_hidden_layers)
    module = sys.modules.get(type(decoder).__module__)
    if all(window is None for window in windows) or hasattr(module, "create_sliding_window_causal_mask"):
        return []
    return [
        f"{name} has a sliding_window of {config.sliding_window} in its config, which it does not apply through "
        "transformers' masks, so what its layers see is not known"
    ]

"""A decode step's attention layer in one compiled call: products, rotary embeddings, the cache's part and attention.

A few attention layers of transformers are known here, letter by letter: queries, keys and values are plain linear layers of
the input, rotated by halves and nothing else. Under a plan their class is a subclass, which makes the call where a forward has
one token of a few rows and no gradients, and otherwise is the layer that it was. A layer that something else has a hand in
(adapters in place of its linear layers, hooks on them) is left to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear

from moacompress.kernels import dispatch
from moacompress.runtime.attention import CONTEXT, LayerCall, LayerContext, attend
from moacompress.runtime.cache import PlanCache
from moacompress.runtime.packing import PackedLinear, is_read_as_it_lies

KNOWN = {
    ("transformers.models.llama.modeling_llama", "LlamaAttention"),
    ("transformers.models.mistral.modeling_mistral", "MistralAttention"),
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2Attention"),
}
PREFIX = "Fused"


class _Fused:
    """What a fused class puts before the layer's own."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the layer's own."""
        module, call, rotary = cast(Any, self), cast(Any, kwargs.get(CONTEXT)), cast(Any, position_embeddings)
        if attention_mask is not None or not _fits(module, hidden_states, rotary, call):
            whole = super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)  # type: ignore[misc]
            return cast("tuple[torch.Tensor, torch.Tensor | None]", whole)
        layers = (module.q_proj, module.k_proj, module.v_proj)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
        arguments = (hidden_states, weights, biases)
        if torch.compiler.is_compiling():
            rest = (*rotary, call.cache.handle, call.context.number, module.scaling)
            out = torch.ops.moacompress.attend_hidden(*arguments, *rest)
        else:
            out = attend_hidden(call.context, call.cache, *arguments, rotary, module.scaling)
        return module.o_proj(out.flatten(2)), None


def attend_hidden(
    context: LayerContext,
    whole: PlanCache,
    hidden: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> torch.Tensor:
    """Takes one token of every row into the cache and attends to it.

    Args:
        context: of the layer.
        whole: the model's cache.
        hidden: `[rows, 1, inputs]`.
        weights: of the queries, keys and values.
        biases: theirs, or none.
        rotary: cosines and sines, `[rows or 1, 1, head_dim]`.
        scaling: factor on the scores.

    Returns:
        `[rows, 1, heads, value_dim]`.
    """
    out = whole.layers[context.layer].step_hidden(hidden, weights, biases, rotary, scaling, 0.0, None)
    if out is not None:
        return out
    rows, head_dim = hidden.shape[0], rotary[0].shape[-1]
    query, key, value = (
        linear(hidden, weight, bias).view(rows, 1, -1, dim).transpose(1, 2)
        for weight, bias, dim in zip(
            weights, biases or (None,) * 3, (head_dim, head_dim, weights[2].shape[0] // context.kv_heads), strict=True
        )
    )
    query, key = rotated(query, *rotary), rotated(key, *rotary)
    whole.update(key, value, context.layer)
    return attend(context, whole, query, key, value, None, scaling, None, None)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns rotated heads, `[rows, heads, tokens, head_dim]`; cosines and sines are `[rows or 1, tokens, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


def _fits(module: Any, hidden: torch.Tensor, rotary: Any, call: Any) -> bool:
    """Whether a forward is one that the compiled call can do."""
    if not isinstance(call, LayerCall) or call.cache is None or rotary is None or module.training:
        return False
    if hidden.shape[1] != 1 or not hidden.shape[0] or dispatch.kernel_for(hidden) != "cpu":
        return False
    head_dim, kv_heads, window = module.head_dim, call.context.kv_heads, call.context.native_window
    layers = (module.q_proj, module.k_proj, module.v_proj)
    if any(not _is_plain(layer, hidden) for layer in layers) or len({layer.bias is None for layer in layers}) > 1:
        return False
    if torch.is_autocast_enabled("cpu") or any(
        table.dtype != hidden.dtype or table.shape[-1] != head_dim for table in rotary
    ):
        return False
    # what does not go together is for the layer itself to refuse
    sliding = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return (
        sliding in (None, window)
        and module.is_causal
        and module.k_proj.weight.shape[0] == kv_heads * head_dim
        and module.v_proj.weight.shape[0] % kv_heads == 0
        and module.q_proj.weight.shape[0] % (kv_heads * head_dim) == 0
    )


def _is_plain(layer: Any, hidden: torch.Tensor) -> bool:
    return (
        type(layer) in (nn.Linear, PackedLinear)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and is_read_as_it_lies(hidden, layer)
    )


def fuse(module: nn.Module) -> bool:
    """Makes an attention layer's class the fused one, if it is one of `KNOWN`; `unfuse` takes it back."""
    own = type(module)
    if (own.__module__, own.__qualname__) not in KNOWN:
        return False
    module.__class__ = _fused(own)
    return True


def unfuse(module: nn.Module) -> None:
    """Gives a layer its own class back; any other is left as it is."""
    if isinstance(module, _Fused):
        module.__class__ = type(module).__bases__[1]


def _fused(own: type[nn.Module]) -> type[nn.Module]:
    known: type[nn.Module] | None = globals().get(f"{PREFIX}{own.__name__}")
    if known is not None:
        return known
    made = type(f"{PREFIX}{own.__name__}", (_Fused, own), {"__module__": __name__})
    globals()[made.__name__] = made  # a pickled layer is looked up here
    return made


def __getattr__(name: str) -> Any:
    """Makes the class of a pickled layer in a process that has fused none yet."""
    import importlib

    for module, own in KNOWN:
        if name == PREFIX + own:
            return _fused(getattr(importlib.import_module(module), own))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

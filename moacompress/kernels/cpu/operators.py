"""What torch must know of the compiled operators: their results' shapes for `torch.compile`, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moacompress.core.errors import UnsupportedError


def _rows(like: torch.Tensor, rows: Any, heads: Any, tokens: Any, dim: Any) -> torch.Tensor:
    """Returns an empty `[rows, heads, tokens, dim]` as the operators lay it out: tokens before heads."""
    return like.new_empty(rows, tokens, heads, dim).transpose(1, 2)


def _fake_decode(
    query: torch.Tensor,
    keys: Any,
    values: Any,
    table: Any,
    lengths: Any,
    rules: Any,
    scaling: Any,
    softcap: Any,
    sink_logits: Any,
    value_dim: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, _ = query.shape
    out = query.new_empty(rows, heads, value_dim or next(part.shape[2] for part in values if part.ndim == 3))
    return out, query.new_empty(rows, heads, dtype=torch.float32)


def _fake_prefill(query: torch.Tensor, key: Any, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, tokens, _ = query.shape
    lse = query.new_empty(rows, heads, tokens, dtype=torch.float32)
    return _rows(query, rows, heads, tokens, value.shape[-1]), lse


def _fake_backward(
    dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _rows(query, *query.shape), _rows(key, *key.shape), _rows(value, *value.shape)


def _fake_linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Of plain weights and of those in blocks."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_step(query: torch.Tensor, key: Any, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, Any]:
    rows, heads, _, _ = query.shape
    return query.new_empty(rows, 1, heads, value.shape[-1]), torch.library.get_ctx().new_dynamic_size()


def _fake_step_layer(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, Any]:
    return x.new_empty(*x.shape), torch.library.get_ctx().new_dynamic_size()


def _fake_profile(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rules: torch.Tensor,
    scaling: float,
    softcap: float,
    sink_logits: torch.Tensor | None,
    baselines: bool,
    lag: int | None = None,
    evicted: torch.Tensor | None = None,
    of_rule: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    sums = query.new_empty(4 if baselines else 2, key.shape[1], rules.shape[1], dtype=torch.float64)
    of_tokens = query.new_empty(key.shape[1], 0 if lag is None else key.shape[2], dtype=torch.float64)
    return *_fake_backward(dout, query, key, value), sums, of_tokens, torch.library.get_ctx().new_dynamic_size()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, keys, _, _, _, valid, rules, *numbers, sink_logits, transient = inputs
    ctx.numbers, ctx.cached, ctx.transient = numbers, len(keys) > 0, len(transient)
    ctx.save_for_backward(query, key, value, valid, rules, sink_logits, *output)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    """Gradients of a prefill without cache; the learned logits' follow from the lanes' sums alone."""
    if ctx.cached:
        raise UnsupportedError("a prefill over a cache has no gradients; train without a cache (use_cache=False)")
    if ctx.transient:
        raise UnsupportedError("a prefill with tokens that gates select has no gradients in compiled kernels")
    query, key, value, valid, rules, sink_logits, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dquery, dkey, dvalue = torch.ops.moacompress_cpu.prefill_backward(
        dout, query, key, value, lse, delta.contiguous(), valid, rules, *ctx.numbers
    )
    dlogits = None
    if sink_logits is not None:
        taken = torch.exp(sink_logits[:, None] - lse) * delta
        dlogits = -torch.where(lse == float("-inf"), 0, taken).sum((0, 2))
    return dquery, dkey, dvalue, [], [], *[None] * 6, dlogits, []


def _twice(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise UnsupportedError(
        "compiled attention has no gradients of gradients (create_graph=True, torch.func.hessian), as torch's own has none; "
        "take them of the dense model with eager attention"
    )


def register() -> None:
    """Registers them; the library is loaded."""
    fakes: dict[str, Callable[..., Any]] = {
        "decode": _fake_decode,
        "prefill": _fake_prefill,
        "prefill_backward": _fake_backward,
        "linear": _fake_linear,
        "linear_blocks": _fake_linear,
        "expand_blocks": lambda blocks, kind, out: None,
        "step": _fake_step,
        "step_layer": _fake_step_layer,
        "profile_backward": _fake_profile,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"moacompress_cpu::{name}", fake)
    torch.library.register_autograd("moacompress_cpu::prefill", _backward, setup_context=_keep)
    torch.library.register_autograd("moacompress_cpu::prefill_backward", _twice)

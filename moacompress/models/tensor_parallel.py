"""Tensor parallelism of transformers (`tp_plan="auto"`): which KV heads of a layer a rank has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moacompress.core.errors import ModelError
from moacompress.models.modules import attention_modules

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
"""Names of the projections that make keys."""
SPLIT = "colwise"
"""Style of such a projection whose outputs stay with their rank; other styles gather them."""


def own_heads(model: Any, layer: int, module: nn.Module, kv_heads: int) -> range | None:
    """Returns the KV heads that this rank attends with in a layer, of `kv_heads` over all ranks; None where they are all here.

    Raises:
        ModelError: they do not divide by the ranks, or it is not known what makes the keys.
    """
    sharded = [name for name, weight in module.named_parameters() if is_sharded(weight)]
    if not sharded:
        return None
    name = next((name for name in PROJECTIONS if hasattr(module, name)), None)
    if name is None:
        raise ModelError(
            f"layer {layer} is split over ranks by {sharded[0]} and has none of {', '.join(PROJECTIONS)}, so it is not known "
            "which KV heads are here; load this model without tp_plan"
        )
    styles = {style for part, style in model.tp_plan.items() if part.rpartition(".")[2] == name}
    key = getattr(module, name).weight
    if not is_sharded(key) or SPLIT not in styles:
        return None
    mesh: Any = key.device_mesh
    ranks = int(mesh.size())
    if kv_heads % ranks:
        raise ModelError(
            f"layer {layer} has {kv_heads} KV heads, which do not divide by {ranks} ranks of tensor parallelism "
            f"({kv_heads / ranks:.2f} each); start as many ranks as divide {kv_heads}"
        )
    first, each = int(mesh.get_local_rank()), kv_heads // ranks
    return range(first * each, (first + 1) * each)


def heads_here(model: PreTrainedModel, kv_heads: int) -> range:
    """Returns the KV heads that a model attends with in this process: all, or those of its rank.

    Raises:
        ModelError: they do not divide by the ranks, or it is not known what makes the keys.
    """
    own = own_heads(model, 0, attention_modules(model)[0], kv_heads)
    return range(kv_heads) if own is None else own


def of_all_ranks(own: torch.Tensor, heads: range, kv_heads: int, dim: int) -> torch.Tensor:
    """Returns a tensor of all KV heads, on every rank, from those that are `heads_here`; `dim` is the axis of KV heads."""
    import torch
    import torch.distributed as dist

    if len(heads) == kv_heads:
        return own
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(kv_heads // len(heads))]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts, dim)


def is_sharded(weight: torch.Tensor) -> bool:
    """Returns whether a rank has a part of a weight alone."""
    placements: Any = getattr(weight, "placements", ())
    return any(placement.is_shard() for placement in placements)

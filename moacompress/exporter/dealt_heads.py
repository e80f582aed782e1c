"""Reorders KV heads so that the ranks of tensor parallelism, which take neighbouring ones, have caches of similar size.

The weights of a KV head move with it: its key and value projections, those of the queries that read it, and its columns of
the output projection. The model computes the same up to the order in which its output projections add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from moacompress.core.errors import ModelError, PlanError, UsageError
from moacompress.models.block_layers import weight_types
from moacompress.models.fingerprint import weights_fingerprint
from moacompress.models.modules import attention_modules
from moacompress.repair.projections import with_weights
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

T = TypeVar("T")
Orders = tuple[tuple[int, ...], ...]
"""Of every layer: which of its KV heads comes first, second, and so on."""
MOVED = ("q_proj", "k_proj", "v_proj", "o_proj")


def dealt(costs: Sequence[Sequence[int]], ranks: int) -> Orders:
    """Returns orders in which ranks, which divide the KV heads of a layer, have much the same of the costs `[layer][kv_head]`.

    Layer by layer, those with the largest spread first, the costliest head left goes to the rank that has least so far and has
    room.
    """
    totals = [0] * ranks
    found: dict[int, tuple[int, ...]] = {}
    for layer in sorted(range(len(costs)), key=lambda layer: min(costs[layer]) - max(costs[layer])):
        row, room = costs[layer], len(costs[layer]) // ranks
        parts: list[list[int]] = [[] for _ in range(ranks)]
        for head in sorted(range(len(row)), key=lambda head: -row[head]):
            rank = min((rank for rank in range(ranks) if len(parts[rank]) < room), key=lambda rank: totals[rank])
            parts[rank].append(head)
            totals[rank] += row[head]
        found[layer] = tuple(head for part in parts for head in sorted(part))
    return tuple(found[layer] for layer in range(len(costs)))


def bytes_of_ranks(plan: Plan, ranks: int, n: int) -> list[int]:
    """Returns the bytes of the cache of each rank at `n` tokens, batch 1."""
    each = plan.model.kv_heads // ranks
    rows = plan.head_bytes(n)
    return [sum(sum(row[rank * each : (rank + 1) * each]) for row in rows) for rank in range(ranks)]


def deal_heads(model: PreTrainedModel, plan: Plan, ranks: int) -> tuple[Plan, dict[str, Tensor]]:
    """Returns a dense model's plan with its KV heads dealt out to ranks, and the weights that move with them, by name.

    Raises:
        UsageError: the KV heads do not divide by them.
        PlanError: layers share attention.
        ModelError: weights in blocks, or attention with parts that it is not known how to move.
    """
    shape = plan.model
    if ranks < 2 or shape.kv_heads % ranks:
        raise UsageError(
            f"the model has {shape.kv_heads} KV heads in a layer, which {ranks} ranks cannot share evenly; give a number of 2 "
            f"or more that divides {shape.kv_heads}"
        )
    if plan.shares:
        raise PlanError(
            "layers of the plan share attention, which ranks of tensor parallelism cannot; export without --ranks"
        )
    if weight_types(model):
        raise ModelError(
            "the model has weights in blocks of codes, and blocks may span KV heads, so these cannot be moved; export with "
            "--weights dense"
        )
    length = plan.stated_lengths[-1]
    orders = dealt(plan.head_bytes(length), ranks)
    weights = _moved(model, plan, orders)
    with with_weights(model, weights):
        fingerprint = weights_fingerprint(model)
    gates = plan.gate_weights
    made = replace(
        plan,
        model=replace(shape, weights_fingerprint=fingerprint),
        rules=_ordered(plan.rules, orders),
        centres=_ordered(plan.centres, orders) if plan.centres else (),
        **({} if gates is None else _gates(gates, orders)),
    )
    note = {
        "ranks": ranks,
        "length": length,
        "bytes_before": bytes_of_ranks(plan, ranks, length),
        "bytes": bytes_of_ranks(made, ranks, length),
        "kv_heads": [list(order) for order in orders],
    }
    return made.with_notes(provenance={**plan.provenance, "dealt_heads": note}), weights


def _ordered(rows: Sequence[Sequence[T]], orders: Orders) -> tuple[tuple[T, ...], ...]:
    return tuple(tuple(row[head] for head in order) for row, order in zip(rows, orders, strict=True))


def _gates(gates: GateWeights, orders: Orders) -> dict[str, Any]:
    import numpy as np

    at = np.array(orders)
    weight = np.take_along_axis(gates.weight, at[:, :, None], axis=1)
    found = GateWeights(weight, np.take_along_axis(gates.bias, at, axis=1))
    return {"gates": found.fingerprint, "gate_weights": found}


def _moved(model: PreTrainedModel, plan: Plan, orders: Orders) -> dict[str, Tensor]:
    """Returns the weights of attention with their KV heads in another order."""
    import torch

    names = {id(module): name for name, module in model.named_modules()}
    size, group = plan.model.head_dim, plan.model.heads // plan.model.kv_heads
    found: dict[str, Tensor] = {}
    for layer, (module, order) in enumerate(zip(attention_modules(model), orders, strict=True)):
        heads = torch.tensor(order)
        numbers = {
            1: (heads[:, None] * size + torch.arange(size)).flatten(),
            group: (heads[:, None] * group * size + torch.arange(group * size)).flatten(),
        }
        for name, weight in module.named_parameters():
            owner, _, part = name.rpartition(".")
            if owner not in MOVED:
                if not owner.endswith("norm") or weight.numel() != size:  # norms of single heads are the same for all
                    raise ModelError(
                        f"layer {layer} has the weight {name} of {weight.numel()} numbers in its attention, and it is not "
                        "known how to move KV heads there; export without --ranks"
                    )
                continue
            at = numbers[1 if owner in ("k_proj", "v_proj") else group].to(weight.device)
            if owner == "o_proj":
                if part == "weight":
                    found[f"{names[id(module)]}.{name}"] = weight.detach().index_select(1, at)
            else:
                found[f"{names[id(module)]}.{name}"] = weight.detach().index_select(0, at)
    return found

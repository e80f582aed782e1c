"""Reuse layers without the projections that they do not need, and how to give them back.

A dropped weight is stored with no rows, so that a program that does not know of sharing fails on the shape. What attention's
own code reads in the place of dropped queries and keys are zeros that take no memory; nothing that is computed from them is
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moacompress.core.arrays import Ints
from moacompress.core.errors import ModelError
from moacompress.models.block_layers import kind_of, multiplied
from moacompress.models.modules import attention_modules
from moacompress.rules.plan import Plan
from moacompress.runtime.linear import quickest_linear

SIDES = "qk"
"""Queries and keys, which a reuse layer takes from its anchor."""


class DroppedProjection(nn.Module):
    """In the place of a linear layer that is not needed: gives zeros, and has weights of no rows.

    Attributes:
        in_features: of the linear layer.
        out_features: of the linear layer.
        kind: of its blocks, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = like.in_features, like.out_features, kind_of(like)
        self.weight = _without_rows(like.weight)
        self.register_parameter("bias", None if like.bias is None else _without_rows(like.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns zeros, `[..., out_features]`, of one number in memory."""
        return x.new_zeros(1).expand(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As of a linear layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PartProjection(nn.Module):
    """In the place of a linear layer that makes queries, keys and values together: makes some of them, and zeros."""

    bias: nn.Parameter | None

    def __init__(self, like: nn.Linear, rows: Ints) -> None:
        super().__init__()
        self.in_features, self.out_features, self._rows = like.in_features, like.out_features, tuple(rows.tolist())
        self.kind = kind_of(like)
        self.weight = _rows_of(like.weight, self._rows)
        self.register_parameter("bias", None if like.bias is None else _rows_of(like.bias, self._rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., out_features]`."""
        if self.kind is None:
            made = quickest_linear(x, self.weight, self.bias)
        else:
            made = multiplied(x, self.weight, self.bias, self.kind)
        out = made.new_zeros(*made.shape[:-1], self.out_features)
        return out.index_copy(-1, torch.tensor(self._rows, device=made.device), made)

    @torch.no_grad()
    def give_rows(self, linear: nn.Module) -> None:
        """Gives the linear layer what has become of its rows; nothing is written where they are the same."""
        rows = list(self._rows)
        for name, mine in self.named_parameters():
            theirs = linear.get_parameter(name)
            if not torch.equal(theirs[rows], mine):
                theirs[rows] = mine

    def extra_repr(self) -> str:
        """As of a linear layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, made={len(self._rows)}"


def _without_rows(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().new_empty((0, *weight.shape[1:])), requires_grad=weight.requires_grad)


def _rows_of(weight: torch.Tensor, rows: Sequence[int]) -> nn.Parameter:
    picked = weight.detach()[list(rows)]
    return nn.Parameter(picked, requires_grad=weight.requires_grad)


@dataclass
class Dropped:
    """A module that was replaced.

    Attributes:
        owner: of the module.
        name: of the module there.
        was: the module.
        instead: what is in its place.
        moves: a module that is moved with the model, as `was` is not.
    """

    owner: nn.Module
    name: str
    was: nn.Module
    instead: nn.Module
    moves: nn.Module

    def __post_init__(self) -> None:
        self._began = _place(self.moves)

    def give_back(self) -> None:
        """Puts the module back, where the model is by now and with what was trained of it."""
        if self._began[0].type != "meta":  # where there are numbers
            device, dtype = _place(self.moves)
            if (device, dtype) != self._began:
                self.was.to(device=device, dtype=None if dtype == self._began[1] else dtype)
            if isinstance(self.instead, PartProjection):
                self.instead.give_rows(self.was)
        setattr(self.owner, self.name, self.was)


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Returns where parameters are, and the dtype of those that are numbers; None where all are bytes."""
    found = [*module.parameters()]
    return found[0].device, next((parameter.dtype for parameter in found if parameter.is_floating_point()), None)


def drop_projections(model: Any, plan: Plan) -> list[Dropped]:
    """Takes from the layers that share attention what they do not need.

    `model`: its weights may be on "meta".

    Returns:
        What was replaced, to be given back.

    Raises:
        ModelError: the attention of a layer is made of other modules than those known.
    """
    replaced: list[Dropped] = []
    for layer, module in enumerate(attention_modules(model)):
        if plan.share(layer) is None:
            continue
        found = _instead(module, plan, layer)
        moves = next(iter(found.values()))  # a projection: norms have nothing in their places
        replaced += [Dropped(module, name, getattr(module, name), instead, moves) for name, instead in found.items()]
    for dropped in replaced:  # all or none
        setattr(dropped.owner, dropped.name, dropped.instead)
    return replaced


def _instead(module: nn.Module, plan: Plan, layer: int) -> dict[str, nn.Module]:
    """Returns what is put in the places of a layer's modules, by their names."""
    fused = next((name for name in ("qkv_proj", "query_key_value") if hasattr(module, name)), None)
    norms: dict[str, nn.Module] = {
        f"{side}_norm": nn.Identity() for side in SIDES if isinstance(getattr(module, f"{side}_norm", None), nn.Module)
    }
    if fused is not None:
        linear = _linear(module, fused, layer)
        return {fused: PartProjection(linear, _made_rows(fused, linear, plan)), **norms}
    return {**{f"{side}_proj": DroppedProjection(_linear(module, f"{side}_proj", layer)) for side in SIDES}, **norms}


def _made_rows(name: str, linear: nn.Linear, plan: Plan) -> Ints:
    """Returns the outputs of a fused projection that are still made."""
    shape = plan.model
    if name == "query_key_value":  # query, key and value of one head after the other
        kinds = np.tile(np.arange(3).repeat(shape.head_dim), shape.heads)
    else:
        kinds = np.arange(3).repeat(np.array([shape.heads, shape.kv_heads, shape.kv_heads]) * shape.head_dim)
    if len(kinds) != linear.out_features:
        raise ModelError(
            f"{name} gives {linear.out_features} numbers a token, not {len(kinds)}; its layers cannot share"
        )
    return np.flatnonzero(~np.isin(kinds, ["qkv".index(side) for side in SIDES]))


def _linear(module: nn.Module, name: str, layer: int) -> nn.Linear:
    found = getattr(module, name, None)
    if not isinstance(found, nn.Linear):
        raise ModelError(
            f"layer {layer} makes its queries and keys by {type(module).__name__}, which has no linear layer {name}; its "
            "attention cannot be shared"
        )
    return found

"""Where the KV heads of an attention layer lie in what vLLM made of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import CacheView
from moacompress.kernels.kv_parts import KVPart
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK
from moacompress.serving.vllm.class_layers import ClassLayer
from moacompress.serving.vllm.classes import KVHead
from moacompress.serving.vllm.selection import SelectedMemory, SelectedPart


@dataclass
class LayerMemory:
    """Where the KV heads of a layer lie.

    Attributes:
        keys: of each KV head its part of all blocks.
        values: of each KV head its part of all blocks.
        of_class: the class of each, int64 `[kv_heads]`.
        first: what is added to block ids of each, so that they count through the KV heads' memory, int32 `[kv_heads]`.
        selected: what gates select; None where no rule does.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_parts: list[KVPart]
    value_parts: list[KVPart]
    of_class: torch.Tensor
    first: torch.Tensor
    selected: SelectedMemory | None

    @staticmethod
    def of(layer: int, classes: Sequence[ClassLayer], rules: RuleTable) -> LayerMemory:
        """Returns views of what vLLM has made for a layer, by its index."""
        windows: dict[int, tuple[int, KVHead, _Views]] = {}
        selected: dict[int, tuple[int, list[_Views], Ints]] = {}
        for index, one in enumerate(classes):
            for number, (head, at) in enumerate(one.heads.places()):
                if head.layer == layer and one.heads.selected:
                    starts = range(0, one.heads.units * one.heads.unit_bytes, one.heads.unit_bytes)
                    views = [_views_of(one.kv_cache, head, start) for start in starts]
                    selected[head.index] = index, views, one.units[number]
                elif head.layer == layer:
                    windows[head.index] = index, head, _views_of(one.kv_cache, head, at)
        found = [windows[index] for index in range(len(rules))]
        keys, values = ([views[side] for *_, views in found] for side in (0, 1))
        key_parts, value_parts = [head.key for _, head, _ in found], [head.value for _, head, _ in found]
        parts = {
            head: SelectedPart(views, numbers, index, windows[head][2][2])
            for head, (index, views, numbers) in sorted(selected.items())
        }
        kv_parts = [*zip(key_parts, value_parts, strict=True)]
        return LayerMemory(
            keys,
            values,
            key_parts,
            value_parts,
            torch.tensor([index for index, *_ in found]),
            torch.arange(len(found), dtype=torch.int32) * len(keys[0]),
            SelectedMemory(RuleTable(rules.columns.numpy()), keys, values, kv_parts, parts) if parts else None,
        )

    def view(self, table: torch.Tensor, value_dim: int) -> CacheView:
        """Returns what attention reads under a table of the windows' blocks, int32 `[rows, kv_heads, width]`."""
        keys, values = (self.keys, self.values) if self.selected is None else (self.selected.keys, self.selected.values)
        return CacheView(keys, values, table.contiguous(), value_dim)


_Views = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _views_of(memory: torch.Tensor, head: KVHead, at: int) -> _Views:
    """Returns keys, values and scores of a KV head, whose part begins at a byte of each block; no scores where it has none."""
    scores = at + head.key.nbytes + head.value.nbytes
    return (
        _part_of(memory, head.key, at),
        _part_of(memory, head.value, at + head.key.nbytes),
        memory.flatten(1)[:, scores : at + head.nbytes].view(torch.int16),
    )


def _part_of(memory: torch.Tensor, kv_part: KVPart, at: int) -> torch.Tensor:
    """Returns the K or V part of all blocks that begins at a byte of each, see `KVPart.new`.

    vLLM lays a class out as bytes, `[blocks, 1, 16, bytes of a token]`.
    """
    part = memory.flatten(1)[:, at : at + kv_part.nbytes]
    return part if kv_part.bits else part.view(kv_part.dtype).unflatten(1, (BLOCK, kv_part.dim))

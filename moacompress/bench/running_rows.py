"""The rows that a model decodes together, under a plan and dense: how a row joins, takes a step and leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from moacompress.bench.serving import RunningRows
from moacompress.models.kept_logits import kept_logits
from moacompress.rules.plan import Plan
from moacompress.runtime import PlanCache
from moacompress.runtime.compat.alternates import cache_argument


class _Rows(ABC):
    """What both have in common: greedy tokens, and positions of their own for every row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache: Any = None
        self.lengths = torch.zeros(0, dtype=torch.int64)

    def add(self, prompt: torch.Tensor) -> int:
        """Reads a prompt, `[1, tokens]`, whose row joins behind the others; returns its first new token."""
        tokens = prompt.shape[1]
        joins = self._beside()
        positions = torch.arange(tokens, device=prompt.device)[None]
        (token,) = self._forward(prompt, positions, joins)
        self.cache = joins if self.cache is None else self._joined(joins)
        self.lengths = torch.cat([self.lengths, torch.tensor([tokens])])
        return token

    def step(self, tokens: Sequence[int]) -> list[int]:
        """Feeds every row its last token; returns the next ones."""
        device = self.model.device
        fed = torch.tensor(tokens, device=device)[:, None]
        found = self._forward(fed, self.lengths[:, None].to(device), self.cache, **self._mask())
        self.lengths += 1
        return found

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all rows but those of these numbers, ascending."""
        kept = torch.tensor(rows, dtype=torch.int64)
        self.lengths = self.lengths[kept]
        if len(kept):
            self._keep(kept)
        else:
            self.cache = None

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: Any, **more: Any) -> list[int]:
        """Returns the likeliest next token of every row."""
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": True, **cache_argument(cache), **more}
        out = kept_logits(self.model, 1, **inputs)
        found: list[int] = out.logits[:, -1].argmax(dim=-1).tolist()
        return found

    def _mask(self) -> dict[str, torch.Tensor]:
        """Returns what a step is told of padding."""
        return {}

    @abstractmethod
    def _beside(self) -> Any:
        """Returns an empty cache for a row that will join."""

    @abstractmethod
    def _joined(self, joins: Any) -> Any:
        """Returns the cache with the row of another one behind its own."""

    @abstractmethod
    def _keep(self, rows: torch.Tensor) -> None:
        """Forgets the other rows of the cache; there is one that is kept."""


class PlanRows(_Rows):
    """Rows of a model under a plan: a row joins without a copy, and steps know of no padding."""

    def __init__(self, model: PreTrainedModel, plan: Plan) -> None:
        super().__init__(model)
        self.plan = plan

    def _beside(self) -> PlanCache:
        return PlanCache(self.plan) if self.cache is None else self.cache.beside()

    def _joined(self, joins: Any) -> Any:
        self.cache.join(joins)
        return self.cache

    def _keep(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows)


class DenseRows(_Rows):
    """Rows of the dense model in transformers' default cache, padded on the left to the longest of them.

    A layer with a window keeps its last tokens, and counts those that it has seen.
    """

    def _beside(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def _joined(self, joins: Any) -> Any:
        for layer, other in zip(self.cache.layers, joins.layers, strict=True):
            longest = max(layer.get_seq_length(), other.get_seq_length())
            layer.keys = _padded_together(layer.keys, other.keys)
            layer.values = _padded_together(layer.values, other.values)
            _count(layer, longest)
        return self.cache

    def _keep(self, rows: torch.Tensor) -> None:
        longest = int(self.lengths.max())
        for layer in self.cache.layers:
            kept = rows.to(layer.keys.device)
            layer.keys, layer.values = (held[kept, :, -longest:] for held in (layer.keys, layer.values))
            _count(layer, longest)

    def _mask(self) -> dict[str, torch.Tensor]:
        longest = int(self.lengths.max())
        if bool((self.lengths == longest).all()):
            return {}
        columns = torch.arange(longest + 1)
        mask = (columns >= (longest - self.lengths)[:, None]).to(torch.int64)
        return {"attention_mask": mask.to(self.model.device)}


def _count(layer: Any, tokens: int) -> None:
    """Lets a layer with a window know how many tokens its longest row has seen; others count their keys."""
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = tokens


def _padded_together(held: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns the rows of two tensors, `[rows, kv_heads, tokens, dim]` each, padded on the left."""
    tokens = max(held.shape[2], other.shape[2])
    return torch.cat([pad(each, (0, 0, tokens - each.shape[2], 0)) for each in (held, other)])


def running_rows(side: str, model: PreTrainedModel, plan: Plan) -> RunningRows:
    """Returns no rows yet, of a side of a benchmark ("plan", "full_span" or "dense") and its model."""
    if side == "dense":
        return DenseRows(model)
    return PlanRows(model, plan if side == "plan" else Plan.full(plan.model))

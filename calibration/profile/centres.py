"""The mean key of every KV head, which its keys in codes lie less: from a forward pass of some calibration prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moacompress.calibration.profile.passes import Recording, recorded
from moacompress.core.progress import SILENT, Progress
from moacompress.models.placement import input_device
from moacompress.models.tensor_parallel import heads_here, of_all_ranks
from moacompress.rules.key_centres import Centres, as_centres
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

if TYPE_CHECKING:
    from moacompress.calibration.data.answers import SampleDraft
    from moacompress.models.source import SourceModel

SAMPLES = 8
"""Prompts that are read: the mean of their some thousand tokens is that of others to a few hundredths of the keys' spread."""
FIRST = 4
"""Tokens of a prompt that are left out: keys of those that all attend to are like no others."""


class KeyMeans:
    """Mean keys of the layers, token by token; a layer whose scores count as they are has none.

    Args:
        layers: how many.
        first: tokens of every text that are left out.
    """

    def __init__(self, layers: int, first: int = FIRST) -> None:
        self._sums: list[Tensor | None] = [None] * layers
        self._first, self._tokens = first, 0

    def begin(self, tokens: int) -> None:
        """Takes note that a prompt of so many tokens is read."""
        self._tokens += max(tokens - self._first, 0)

    def add(self, layer: int, key: Tensor) -> None:
        """Adds a layer's keys after their rotary embedding, `[1, kv_heads, tokens, head_dim]`."""
        found, before = key[0, :, self._first :].sum(1, dtype=torch.float64), self._sums[layer]
        self._sums[layer] = found if before is None else before + found

    def tensor(self, like: Tensor) -> Tensor:
        """Returns the means, float64 `[layers, kv_heads, head_dim]`: 0 where there are none, or they are not finite.

        Args:
            like: `[kv_heads, head_dim]`.
        """
        none = torch.zeros(like.shape, dtype=torch.float64)
        means = torch.stack([none if sums is None else sums.cpu() / max(self._tokens, 1) for sums in self._sums])
        return torch.where(means.isfinite().all(-1, keepdim=True), means, 0)


def mean_keys(
    source: SourceModel, texts: Sequence[Sequence[int]], progress: Progress = SILENT, first: int = FIRST
) -> Centres:
    """Returns the mean keys of a model as centres, over all tokens of some texts but the first.

    Where ranks have KV heads of their own, all return those of all.

    Args:
        source: the dense model.
        texts: token ids.
        progress: told of every text.
        first: tokens of every text that are left out.
    """
    model, shape = source.model, source.shape
    heads, device, means = heads_here(model, shape.kv_heads), input_device(model), KeyMeans(shape.layers, first)
    recording = Recording.of(shape, RuleTable.of([Rule.FULL], 1), means=means)
    progress.start("reading prompts for mean keys", len(texts))
    with torch.no_grad(), recorded(model, recording):
        for ids in texts:
            means.begin(len(ids))
            model.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            progress.step(f"{len(ids)} tokens")
    progress.done()
    found = means.tensor(torch.empty(len(heads), shape.head_dim))
    return as_centres(of_all_ranks(found, heads, shape.kv_heads, dim=1).numpy())


def centre_texts(drafts: Sequence[SampleDraft]) -> list[list[int]]:
    """Returns the prompts that means are taken of: `SAMPLES` of a profile's drafts, from all over them."""
    numbers = np.unique(np.linspace(0, len(drafts) - 1, min(SAMPLES, len(drafts))).round().astype(int))
    return [[int(token) for token in drafts[number].ids] for number in numbers]

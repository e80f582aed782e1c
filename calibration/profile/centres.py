"""The mean key of every KV head, which its keys in codes lie less: from a forward pass of some calibration prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moacompress.calibration.profile.passes import Recording, recorded
from moacompress.core.arrays import spread_over
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
"""Prompts that are read."""
FIRST = 4
"""Tokens of a prompt that are left out: keys of those that all attend to are like no others."""


class KeyMeans:
    """Mean keys of the KV heads that are here, without the `first` tokens of every text.

    A layer that bounds its scores has none.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, first: int = FIRST) -> None:
        self._sums = torch.zeros(layers, kv_heads, head_dim, dtype=torch.float64)
        self._tokens = torch.zeros(layers, 1, 1)
        self._first = first

    def add(self, layer: int, key: Tensor) -> None:
        """Adds a layer's keys after their rotary embedding, `[1, kv_heads, tokens, head_dim]`."""
        keys = key[0, :, self._first :]
        self._sums[layer] += keys.sum(1, dtype=torch.float64).cpu()
        self._tokens[layer] += keys.shape[1]

    def tensor(self) -> Tensor:
        """Returns the means, float64 `[layers, kv_heads, head_dim]`: 0 where there are none, or they are not finite."""
        means = self._sums / self._tokens.clamp_min(1)
        return torch.where(means.isfinite().all(-1, keepdim=True), means, 0)


def mean_keys(
    source: SourceModel, texts: Sequence[Sequence[int]], progress: Progress = SILENT, first: int = FIRST
) -> Centres:
    """Returns the mean keys of the dense model as centres, over all tokens of some texts but the `first` ones of each.

    Where ranks have KV heads of their own, all return those of all.
    """
    model, shape = source.model, source.shape
    heads, device = heads_here(model, shape.kv_heads), input_device(model)
    means = KeyMeans(shape.layers, len(heads), shape.head_dim, first)
    recording = Recording.of(shape, RuleTable.of([Rule.FULL], 1), means=means)
    progress.start("reading prompts for mean keys", len(texts))
    with torch.no_grad(), recorded(model, recording):
        for ids in texts:
            model.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            progress.step(f"{len(ids)} tokens")
    progress.done()
    return as_centres(of_all_ranks(means.tensor(), heads, shape.kv_heads, dim=1).numpy())


def centre_texts(drafts: Sequence[SampleDraft]) -> list[list[int]]:
    """Returns the prompts that means are taken of: `SAMPLES` of a profile's drafts, spread over all of them."""
    return [[int(token) for token in draft.ids] for draft in spread_over(drafts, SAMPLES)]

"""Closed-form repair of single copies: a layer's output projection is refitted to its anchor's attention.

As `repair` does for whole plans, layer after layer, but for one copying layer at a time in the dense model: what it attends to
is made from the queries and keys of its anchor and its own values, all of one forward pass. So many copies are fitted in one
pass over the samples, and each says how much of what it changes its refitted projection cannot give back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.influence import attend
from moacompress.calibration.profile.passes import all_attended
from moacompress.calibration.profile.sharing import Attended
from moacompress.core.arrays import Floats
from moacompress.core.errors import ModelError
from moacompress.core.progress import SILENT, Progress
from moacompress.models.least_squares import Normal, in_memory
from moacompress.repair.projections import OutputProjection, Weights, output_projections
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.share import Share
from moacompress.runtime.sharing.shared_keys import SharedKeys

PENALTY = 0.1
"""Weight of the ridge; on SmolLM2 0.03 and 0.1 left the same KL."""
JUDGING = 4
"""Every so many samples one is not fitted to: what is left is measured on it."""
Rows: TypeAlias = Callable[[Sample], Iterator[tuple[Tensor, Tensor]]]
"""Of every copy what its output projection gets on a sample, and what its output lacks."""


@dataclass(frozen=True)
class CopyRepair:
    """A copy's repair.

    Attributes:
        weights: of the parameters of the layer's output projection.
        left: share of the squared change of the layer's attention output that is left, on samples that it was not fitted to.
    """

    weights: Weights
    left: float


def repaired_copies(
    model: PreTrainedModel,
    shape: ModelShape,
    copies: Sequence[tuple[int, Share]],
    samples: Sequence[Sample],
    dtype: torch.dtype,
    progress: Progress = SILENT,
) -> list[CopyRepair]:
    """Fits copies one by one, as many as there is memory for in one forward pass of the dense model over the samples.

    There are at least two samples, and may be several copies of one layer. The checkpoint will hold the weights in `dtype`.

    Raises:
        ModelError: attention that its output projection does not read as it is.
    """
    projections = output_projections(model)
    judging = samples[JUDGING - 1 :: JUDGING] or samples[1:]
    fitting = [sample for sample in samples if not any(sample is one for one in judging)]
    groups = in_memory(copies, shape.heads * shape.head_dim + 1)
    progress.start("repairing copies", len(groups) * len(samples))
    found: list[CopyRepair] = []
    for group in groups:
        rows = partial(_rows, model, shape, projections, group)
        changes = _changes(rows, fitting, progress)
        left = _left(rows, judging, changes, progress)
        found += [
            CopyRepair(projections[layer].changed(change, dtype), share)
            for (layer, _), change, share in zip(group, changes, left, strict=True)
        ]
    progress.done()
    return found


def _changes(rows: Rows, samples: Sequence[Sample], progress: Progress) -> list[Tensor]:
    """Returns what is added to the output projection of every copy, float64 `[inputs, outputs]`."""
    normals: list[Normal] = []
    for sample in samples:
        for index, (x, residual) in enumerate(rows(sample)):
            if index == len(normals):
                normals.append(Normal(x.shape[1], residual.shape[1], x.device))
            normals[index].add(x, residual, x.new_ones(len(x)))
        progress.step()
    return [normal.solve(PENALTY) for normal in normals]


def _left(rows: Rows, samples: Sequence[Sample], changes: Sequence[Tensor], progress: Progress) -> list[float]:
    """Returns the share of the squared change of every copy's output that is left."""
    before, after = np.zeros(len(changes)), np.zeros(len(changes))
    for sample in samples:
        for index, (x, residual) in enumerate(rows(sample)):
            before[index] += float(residual.double().square().sum())
            after[index] += float((residual - x @ changes[index].to(x.dtype)).double().square().sum())
        progress.step()
    left: Floats = np.minimum(np.divide(after, before, out=np.ones_like(before), where=before > 0), 1)
    return left.tolist()  # type: ignore[no-any-return]


def _rows(
    model: PreTrainedModel,
    shape: ModelShape,
    projections: Sequence[OutputProjection],
    copies: Sequence[tuple[int, Share]],
    sample: Sample,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields of every copy what its output projection gets, and what its output lacks.

    Rows `[n, inputs]`, with a one at the end where there is a bias, and `[n, outputs]`.
    """
    own: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, inputs: own.update({layer: inputs[0].reshape(-1, inputs[0].shape[-1])})

    with ExitStack() as stack:
        for layer in {layer for layer, _ in copies}:
            stack.callback(projections[layer].module.register_forward_pre_hook(keep(layer)).remove)
        attended = all_attended(model, shape, sample.input_ids)
    for layer, share in copies:
        projection, x = projections[layer], copied(attended[layer], attended[share.anchor], share)
        if x.shape != own[layer].shape:
            raise ModelError(
                f"the output projection of layer {layer} reads {tuple(own[layer].shape)} where attention gives "
                f"{tuple(x.shape)}; copies of this model cannot be repaired"
            )
        residual = (own[layer] - x) @ projection.weight
        yield x if projection.module.bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1), residual


def copied(own: Attended, anchor: Attended, share: Share) -> Tensor:
    """Returns what a copy attends to, `[n, heads * value_dim]`: by its share of the anchor, with its own values."""
    assert own.value is not None
    device = own.value.device  # its anchor may lie on another one
    logits = None if anchor.sink_logit is None else anchor.sink_logit.to(device)
    taken = SharedKeys(anchor.query.to(device), anchor.key.to(device), logits).taken(share)
    out = attend(taken.query, taken.key, own.value, anchor.spec, taken.sink_logits)
    return out[0].transpose(0, 1).flatten(1)

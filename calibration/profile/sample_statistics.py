"""The statistics of one sample: backward passes from random cotangents, which say what every rule would change.

What is predicted is the KL divergence to the dense model. Its gradient there is zero: its curvature is what counts.
So each backward pass starts at the logits of the answer tokens from a random cotangent z with covariance
diag(p) - p p^T, the Fisher matrix of the next-token distribution, or of one that is less sure of itself (see
`secant_probabilities`): a rule that hides what an answer rests on changes logits by more than the curvature at the dense model
knows of. Then the expected square of `sum_i d_i(r)` (see `influence`) is twice the KL of rule r, to second order where the
model is unsure, and about a bound of it elsewhere. A few draws of z serve a sample. What formats change is small, so theirs is
scaled back to the curvature at the dense model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.gates.training import LAG
from moacompress.calibration.profile.collectors import BaselineSums, HeadSums, InfluenceSums, TokenSums
from moacompress.calibration.profile.passes import (
    Cotangent,
    Recording,
    Tape,
    tokens_and_rows,
)
from moacompress.calibration.profile.precision import PrecisionSums
from moacompress.calibration.profile.sharing import CopySums, copyable
from moacompress.calibration.profile.statistics import DRAWN, Statistics
from moacompress.calibration.profile.tiles import Collector, GradientCollector
from moacompress.core.arrays import Floats32
from moacompress.core.errors import UsageError
from moacompress.models.placement import layer_devices
from moacompress.models.tensor_parallel import heads_here, of_all_ranks
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.key_centres import Centres
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable


def secant_probabilities(logits: Tensor) -> Tensor:
    """Returns next-token probabilities whose variance bounds the KL of changes of any size, not of small ones alone.

    KL of two outcomes of probability 1 - q and q, whose logits move apart by d, is at most `v d^2 / 2` with the variance
    `v = (1 - 2q) / (2 log((1 - q) / q))`; none smaller will do (Kearns and Saul, 1998). Its curvature at d = 0, `q (1 - q)`,
    is nearly 0 where the model is sure of a token, whose loss then seems to be free. So where the likeliest token has more
    than half, all others have `w` in place of q, with `w (1 - w) = v`, in proportion to what they had.

    Args:
        logits: `[tokens, vocabulary]`.

    Returns:
        float32 `[tokens, vocabulary]`; each row sums to 1.
    """
    p = torch.softmax(logits.float(), -1)
    at = p.argmax(-1, keepdim=True)
    others = p.scatter(-1, at, 0)
    q = others.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    below = q.clamp_max(0.4999)  # at a half the two are one
    variance = (1 - 2 * below) / (2 * (torch.log1p(-below) - below.log()))
    w = torch.where(q > below, q, (1 - (1 - 4 * variance).clamp_min(0).sqrt()) / 2)
    return (others * (w / q)).scatter(-1, at, 1 - w)


def cotangent_generator(seed: int, sample: int, draw: int) -> torch.Generator:
    """Returns what a draw of a sample's cotangent comes from: the same one in whichever process and order samples are run."""
    digest = hashlib.sha256(f"{seed} {sample} {draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class FisherCotangent:
    """A random cotangent whose covariance is the Fisher matrix of `secant_probabilities`, a mean over tokens; a `Cotangent`.

    `z = sqrt(p) eps - p (sqrt(p) . eps)` with eps ~ N(0, I), over the square root of the number of tokens.

    Attributes:
        tokens: tokens that the mean is over, those of all chunks.
        generator: on the CPU, so that every device draws the same numbers.
    """

    def __init__(self, tokens: int, generator: torch.Generator) -> None:
        self.tokens, self.generator = tokens, generator
        self._own = self._drawn = 0.0

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        """Returns the cotangent of a chunk of rows, `[rows, vocabulary]`, in the dtype of the logits."""
        p = secant_probabilities(logits)
        self._own += _trace(torch.softmax(logits.float(), -1))
        self._drawn += _trace(p)
        noise = p.sqrt() * torch.randn(p.shape, generator=self.generator).to(p.device)
        z = noise - p * noise.sum(-1, keepdim=True)
        return z.div(self.tokens**0.5).to(logits.dtype)

    @property
    def curvature(self) -> float:
        """Trace of the model's own Fisher matrix as a share of the cotangent's, over the rows that it was called for."""
        return self._own / self._drawn if self._drawn else 1.0


def _trace(p: Tensor) -> float:
    """Returns the trace of the Fisher matrices of probabilities, summed over tokens."""
    return float((1 - p.square().sum(-1)).sum())


def label_cotangent(labels: Tensor) -> Cotangent:
    """Returns the gradient of the mean cross-entropy of `labels`, int64 `[tokens]`, as MoA starts from it."""

    def gradient(logits: Tensor, part: slice) -> Tensor:
        p = torch.softmax(logits.float(), -1)
        p.scatter_add_(1, labels[part, None], p.new_full((len(p), 1), -1.0))
        return p.div_(len(labels)).to(logits.dtype)

    return gradient


def sample_statistics(
    model: PreTrainedModel,
    shape: ModelShape,
    table: RuleTable,
    sample: Sample,
    chosen: ProfileRecipe,
    seed: int,
    index: int,
    gates: GateWeights | None = None,
    centres: Centres = (),
) -> Statistics:
    """Runs one sample forward and several times backward.

    Args:
        model: the dense model, weights frozen.
        shape: its shape.
        table: the rules.
        sample: the sample.
        chosen: how many cotangents, and which statistics beside the influence.
        seed: the run's; with `index` it decides the cotangents.
        index: number of the sample.
        gates: what rules that select choose by.
        centres: what keys in codes lie less.

    Returns:
        Of all KV heads, also where ranks have some of them each; the numbers may be not finite.

    Raises:
        UsageError: copies of earlier layers, where a rank does not have all KV heads.
    """
    ids, rows = tokens_and_rows(model, sample)
    own = heads_here(model, shape.kv_heads)
    if chosen.anchors and len(own) < shape.kv_heads:
        raise UsageError(
            f"copies of {chosen.anchors} earlier layers need all KV heads of a layer in one process, and ranks have {len(own)} "
            f"of {shape.kv_heads}; profile without anchors, or without --tensor-parallel"
        )
    here, size, devices = len(own), (len(own), len(table)), layer_devices(model)
    stacked = partial(_stacked, heads=own, kv_heads=shape.kv_heads)
    recording = Recording.of(shape, table, keep=chosen.anchors > 0, gates=gates, heads=own, centres=centres)
    influence = [InfluenceSums(*size, device) for device in devices]
    rounding = [PrecisionSums(here, chosen.formats, device) for device in devices if chosen.formats]
    found: dict[str, Tensor] = {}
    heads = [HeadSums(here, device) for device in (devices if chosen.heads else ())]
    copies = [
        CopySums(recording.attended, layer, may, here, devices[layer])
        for layer, may in enumerate(copyable(shape.native_windows, chosen.anchors).tolist())
        if recording.attended is not None
    ]
    with Tape(model, recording, ids, rows) as tape:
        if chosen.baselines:
            baselines = [BaselineSums(*size, device) for device in devices]
            tape.backward(label_cotangent(ids[rows + 1]), _by_layer(baselines), last=False)
            found |= stacked(baselines)
        drawn = []
        for draw in range(chosen.draws):
            _reset([*influence, *rounding])
            cotangent = FisherCotangent(len(rows), cotangent_generator(seed, index, draw))
            wanted = _by_layer(influence, rounding, copies, heads if draw == 0 else [])
            tape.backward(cotangent, wanted, last=draw + 1 == chosen.draws)
            for copied in copies:
                copied.end()
            rounded = stacked(rounding) if rounding else {}
            for name, of_formats in rounded.items():
                of_formats *= cotangent.curvature ** (1 if name.endswith("squares") else 0.5)
            drawn.append(stacked(influence) | rounded)
    for name in drawn[0]:
        every = torch.stack([one[name] for one in drawn])
        found[name] = every if name in DRAWN else every.mean(0)
    found |= (stacked(heads) if heads else {}) | (stacked(copies) if copies else {})
    return Statistics({name: value.float().cpu().numpy() for name, value in found.items()})


def token_influence(
    model: PreTrainedModel, shape: ModelShape, sample: Sample, draws: int, seed: int, index: int
) -> Floats32:
    """Returns what hiding single tokens would do, mean over draws, `[layers, kv_heads, tokens]`; see `collectors.TokenSums`.

    The seed and the sample's index decide the cotangents.
    """
    ids, rows = tokens_and_rows(model, sample)
    heads = heads_here(model, shape.kv_heads)
    sums = [TokenSums(len(heads), len(ids), LAG, device) for device in layer_devices(model)]
    with Tape(model, Recording.of(shape, RuleTable.of([Rule.FULL], 1)), ids, rows) as tape:
        for draw in range(draws):
            cotangent = FisherCotangent(len(rows), cotangent_generator(seed, index, draw))
            tape.backward(cotangent, _by_layer(sums), last=draw + 1 == draws)
    found: Floats32 = (_stacked(sums, heads, shape.kv_heads)["of_tokens"] / draws).float().cpu().numpy()
    return found


def _by_layer(*collectors: Sequence[Collector | GradientCollector]) -> list[tuple[Collector | GradientCollector, ...]]:
    """Returns the collectors of each layer, from lists with one of every layer, or with none at all."""
    return list(zip(*filter(None, collectors), strict=True))


def _reset(collectors: Sequence[InfluenceSums | PrecisionSums]) -> None:
    for sums in collectors:
        sums.reset()


def _stacked(
    collectors: Sequence[InfluenceSums | PrecisionSums | BaselineSums | HeadSums | CopySums | TokenSums],
    heads: range,
    kv_heads: int,
) -> dict[str, Tensor]:
    """Returns the sums of all layers by name, `[layers, kv_heads, ...]`, on the device of the first.

    `heads` are the KV heads that are here, of `kv_heads` over all ranks.
    """
    layers = [sums.tensors() for sums in collectors]
    together = {name: torch.stack([layer[name].to(of.device) for layer in layers]) for name, of in layers[0].items()}
    return {name: of_all_ranks(each, heads, kv_heads, dim=1) for name, each in together.items()}

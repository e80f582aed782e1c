"""Gates: linear probes of what enters a layer, one for each KV head, that score tokens by how much hiding them would do.

The target of a KV head and a token is its influence on single tokens, `collectors.TokenSums`: what the answers lose where that
token alone is hidden from the queries that stand `LAG` tokens or more behind it. A ridge regression on its logarithm, brought
to mean 0 and variance 1 in every sample, is fitted in closed form: `score = weight . input + bias`. First tokens and the last
`LAG` take no part, as sinks and every window keep them.

They have samples of their own: what rules that select do is profiled on others. Of these samples every other one belongs to
each half. What a gate leaves is said of samples that it was not fitted to: scores of one half come from the gate that was
fitted to the other; the gates that are kept are fitted to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from moacompress.calibration.profile.passes import read_through
from moacompress.core.arrays import Floats, Floats32
from moacompress.core.artefact_names import GATES_FILE
from moacompress.core.errors import DataError
from moacompress.core.progress import SILENT, Progress
from moacompress.core.ranks import work_shard
from moacompress.core.statistics import standard_error
from moacompress.models.least_squares import Normal, in_memory
from moacompress.models.modules import attention_modules, given_hidden
from moacompress.models.processes import gathered, shared
from moacompress.rules.gate_weights import GateWeights

if TYPE_CHECKING:
    from moacompress.calibration.data.samples import Sample

LAG = 32
"""Queries that are nearer to a token than this do not count: any window shows it to them."""
FIRST = 16
"""First tokens that no gate is fitted to: sinks keep them."""
FLOOR = 0.01
"""Share of a sample's mean influence that is added before the logarithm: below it differences do not matter. On SmolLM2 1e-4
left more of the influence, at every share of the tokens."""
PENALTY = 0.01
"""Weight of the ridge, as a share of the mean square of the inputs; 0.003 to 0.03 make no difference on SmolLM2."""
SHARES = (0.03, 0.06, 0.12, 0.25)
"""Shares of the tokens for which it is said how much influence choosing so many leaves."""
JUDGED = 16
"""Samples on which that is measured, at most."""


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of a model.

    Attributes:
        weights: of what enters the layers' attention.
        report: JSON values: `samples` and `tokens` that they are fitted to, `judged` samples, `lag`, and `left`: for each of
            `SHARES` the `share` of the tokens, and the share of influence that is left out where so many are chosen by `gate`,
            by `recency` or by the influence itself, `oracle`; each the mean over samples and KV heads with its standard error
            over samples as `[value, error]`, and once more weighted by influence, `of_all`. Empty where a plan
            brought its gates.
    """

    weights: GateWeights
    report: dict[str, Any]

    def save(self, folder: Path, fingerprint: str) -> None:
        """Writes the gates into the folder of the profile with this fingerprint, atomically."""
        notes = json.dumps({"profile": fingerprint, "report": self.report})
        self.weights.save(folder / GATES_FILE, {"gates": notes})  # one alone, so that the same gates are the same bytes

    @staticmethod
    def load(folder: Path, fingerprint: str) -> Gates | None:
        """Returns the gates of a profile; None where there are none, or they are not of this profile or damaged."""
        path = folder / GATES_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="numpy") as file:
                notes = json.loads((file.metadata() or {})["gates"])
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            owner, report = notes["profile"], notes["report"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        sound = weight.ndim == 3 and bias.shape == weight.shape[:2] and np.isfinite(weight).all()
        return Gates(GateWeights(weight, bias), report) if sound and owner == fingerprint else None


def train_gates(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    influence: Callable[[int], Floats32],
    progress: Progress = SILENT,
) -> Gates:
    """Fits a gate for every KV head of a dense model.

    Under `torchrun` the processes share the samples of which the influence is found, and then the layers that are fitted;
    every process must call it with the same samples.

    Args:
        model: dense.
        samples: calibration samples.
        influence: runs one of them through the model, and returns the influence of its tokens, `[layers, kv_heads, tokens]`; a
            sample in which that is not finite takes no part.
        progress: told of every pass over a sample.

    Raises:
        DataError: fewer than two samples of finite influence: one to be fitted to, and one to be judged on.
    """
    count, (first, step) = len(samples), work_shard()
    # processes take turns layer by layer, so that a gate is the same whatever their number
    layers = range(first, len(attention_modules(model)), step)
    groups = in_memory(layers, model.config.get_text_config(decoder=True).hidden_size + 1)
    progress.start("training gates", count + len(groups) * (count + min(JUDGED, count)))
    mine: dict[int, Floats32] = {}

    def find(index: int) -> None:
        mine[index] = influence(index)

    shared(range(count), find, lambda index, _: progress.step(f"{len(samples[index].input_ids)} tokens"))
    found = gathered(mine)
    finite = [index for index in range(count) if np.isfinite(found[index]).all()]
    if len(finite) < 2:
        raise DataError(
            f"only {len(finite)} of {count} samples for gates have finite influence, and two are needed; profile with "
            "--dtype float32, and check that the model is sound"
        )
    used, of_tokens = [samples[index] for index in finite], [found[index] for index in finite]
    judged = [int(place) for place in np.linspace(0, len(used) - 1, min(JUDGED, len(used))).round()]
    fitted: dict[int, tuple[Floats32, Floats]] = {}
    for group in groups:
        sums: dict[int, tuple[Normal, Normal]] = {}  # of every layer, one for each half of the samples
        for index, sample in enumerate(used):
            for layer, x in attention_inputs(model, sample, group):
                y = target(torch.from_numpy(of_tokens[index][layer])).to(x.device).T
                if layer not in sums:
                    size = x.shape[1], y.shape[1], x.device
                    sums[layer] = Normal(*size), Normal(*size)
                sums[layer][index % 2].add(x, y, x.new_ones(len(x)))
            progress.step(f"{len(sample.input_ids)} tokens")
        left = _left(model, used, of_tokens, judged, sums, progress)
        for layer, (one, other) in sums.items():
            one.gram += other.gram
            one.cross += other.cross
            fitted[layer] = one.solve(PENALTY).T.float().cpu().numpy(), left[layer]
    progress.done()
    fitted = gathered(fitted)
    weights = np.stack([fitted[layer][0] for layer in sorted(fitted)])
    report = {
        "samples": len(used),
        "tokens": sum(len(sample.input_ids) for sample in used),
        "judged": len(judged),
        "lag": LAG,
        "left": _left_rows(np.concatenate([fitted[layer][1] for layer in sorted(fitted)], axis=1)),
    }
    return Gates(GateWeights(np.ascontiguousarray(weights[..., :-1]), np.ascontiguousarray(weights[..., -1])), report)


def _left(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    of_tokens: Sequence[Floats32],
    judged: Sequence[int],
    halves: dict[int, tuple[Normal, Normal]],
    progress: Progress,
) -> dict[int, Floats]:
    """Returns `left_out` of some samples by layer, samples in front, by the gates of the other half of the samples."""
    gates = {layer: [normal.solve(PENALTY).float() for normal in both] for layer, both in halves.items()}
    found: dict[int, list[Floats]] = {layer: [] for layer in halves}
    for index in judged:
        for layer, x in attention_inputs(model, samples[index], list(halves)):
            scores = (x @ gates[layer][1 - index % 2]).T.cpu()
            found[layer].append(left_out(torch.from_numpy(of_tokens[index][layer]), scores))
        progress.step("what they leave")
    return {layer: np.stack(of_samples) for layer, of_samples in found.items()}


def target(of_tokens: Tensor) -> Tensor:
    """Returns what gates are fitted to, `[kv_heads, tokens - FIRST - LAG]`, from the influence of a sample's tokens."""
    influence = of_tokens[:, FIRST:-LAG].double()
    mean = influence.mean(-1, keepdim=True)
    y = torch.log(influence + FLOOR * mean + 1e-300)
    y = y - y.mean(-1, keepdim=True)
    return (y / y.std(-1, keepdim=True).clamp_min(1e-12)).float().masked_fill(mean <= 0, 0)


def attention_inputs(model: PreTrainedModel, sample: Sample, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yields, from one forward pass, layers and the rows of what enters their attention, each with a one for the bias.

    Rows are float32 `[tokens - FIRST - LAG, inputs + 1]`; gates are fitted to them.
    """
    held: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held[layer] = given_hidden(args, kwargs).detach()

        return hook

    modules = attention_modules(model)
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(modules[layer].register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        read_through(model, sample.input_ids)
    for layer in layers:
        x = held.pop(layer)[0, FIRST:-LAG].float()
        yield layer, torch.cat([x, x.new_ones(len(x), 1)], 1)


def left_out(of_tokens: Tensor, scores: Tensor) -> Floats:
    """Returns the influence that is left out where tokens are selected by scores, by recency and by the influence itself.

    Args:
        of_tokens: influence of a sample's tokens, `[kv_heads, tokens]`.
        scores: `[kv_heads, tokens - FIRST - LAG]`.

    Returns:
        float64 `[kv_heads, 1 + 3 * len(SHARES)]`: all of the influence, then for each share what is left of it.
    """
    influence = of_tokens[:, FIRST:-LAG].double()
    recency = torch.arange(influence.shape[1], dtype=torch.float64).expand_as(influence)
    total = influence.sum(-1)
    found = [total]
    for share in SHARES:
        count = max(1, round(share * influence.shape[1]))
        for by in (scores, recency, influence):
            selected = influence.gather(1, by.topk(count, -1).indices).sum(-1)
            found.append((total - selected).clamp_min(0))
    return torch.stack(found, 1).numpy()


def _left_rows(counted: Floats) -> list[dict[str, Any]]:
    """Returns `left` of the report, from `left_out` of every judged sample, `[samples, heads, 1 + 3 * len(SHARES)]`.

    A sample's share is the mean over the KV heads that have any influence; samples without influence are left out.
    """
    total = counted[..., 0]
    rows = []
    for number, share in enumerate(SHARES):
        row: dict[str, Any] = {"share": share}
        for by, name in enumerate(("gate", "recency", "oracle")):
            left = counted[..., 1 + 3 * number + by]
            shares = [
                float((part[on] / whole[on]).mean())
                for part, whole, on in zip(left, total, total > 0, strict=True)
                if on.any()
            ]
            row[name] = [float(np.mean(shares)) if shares else None, standard_error(shares)]
            row[f"{name}_of_all"] = float(left.sum() / total.sum()) if total.sum() > 0 else 0.0
        rows.append(row)
    return rows

"""What a gate could look at: how much influence is left out by probes of different inputs, on samples they are not fitted to.

    python benchmarks/gate_inputs.py MODEL --recipe recipes/smollm2-135m/eighth.yaml --text prose/ --samples 24

Samples, targets and shares are those that `profile` trains gates with: ridge regression on the logarithm of a token's influence
on each KV head. One half of the samples is fitted to and the other judged, and the other way round. The probes are of

- `input`: what enters the layer's attention, as the gates of a profile are;
- `scaled`: that, every number of it brought to one size first, as in all that follow;
- `squares`: that and the square of every number in it;
- `key-value`: the KV head's own key before its rotary embedding, and its value;
- `key-value-squares`: those, and the square of every number in them;
- `hidden`: the input, through a hidden layer of 64 numbers of the KV head's own (SiLU), trained by AdamW; every sixth sample of
  those it is fitted to says when to stop.

`left` is the share of the influence that is left out where a share of the tokens is chosen: the mean over samples and KV heads,
with its standard error over samples; `difference` is that to `input`, sample by sample. `of_all` weights KV heads by their
influence. For models with a `k_proj` and a `v_proj` of their own.

With `--plan PLAN`, one with gates, it is measured with probes in place of its gates, fitted to all samples, on validation
samples of the recipe: `kl` to the dense model, nats an answer token, and the geometric mean of its ratios to that of `input`.
What the plan keeps of how many tokens stays as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats import ratio
from gate_scores import Given, choosing_modules
from torch import Tensor, nn

from moacompress.calibration.data.answers import answer_drafts
from moacompress.calibration.data.sample_sources import build_samples
from moacompress.calibration.data.samples import Sample
from moacompress.calibration.gates.gate_samples import gate_drafts, gate_recipe
from moacompress.calibration.gates.training import (
    PENALTY,
    SHARES,
    attention_inputs,
    left_out,
    mean_and_error,
    share_left,
    target,
)
from moacompress.calibration.profile.passes import answer_logits
from moacompress.calibration.profile.sample_statistics import token_influence
from moacompress.core.statistics import error_text, estimate_text
from moacompress.models.kl import kl_divergence
from moacompress.models.least_squares import Normal
from moacompress.models.modules import attention_modules
from moacompress.models.source import SourceModel, load_source
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach

WIDTH = 64
STOPPING = 6
"""Every so manieth sample that a hidden layer is fitted to says when to stop."""
EPOCHS, PATIENCE, ROWS = 40, 6, 1024
Scores = Callable[[Tensor], Tensor]
"""Takes features `[rows, features]` of all KV heads, or `[kv_heads, rows, features]`; returns `[kv_heads, rows]`."""


def features_of(module: nn.Module, x: Tensor, kv_heads: int) -> dict[str, Tensor]:
    """Returns what each probe looks at, from what enters a layer and a one for the bias, `[rows, inputs + 1]`."""
    ones = x[:, -1:]
    with torch.no_grad():
        key, value = (
            module.get_submodule(name)(x[:, :-1]).unflatten(-1, (kv_heads, -1)).transpose(0, 1)
            for name in ("k_proj", "v_proj")
        )
    own = torch.cat([key, value], -1)
    return {
        "input": x,
        "scaled": x,
        "squares": torch.cat([x[:, :-1], x[:, :-1].square(), ones], 1),
        "key-value": torch.cat([own, ones.expand(kv_heads, -1, -1)], -1),
        "key-value-squares": torch.cat([own, own.square(), ones.expand(kv_heads, -1, -1)], -1),
    }


def ridge(samples: Sequence[tuple[Tensor, Tensor]], scaled: bool) -> Scores:
    """Returns the scores of a ridge regression.

    Args:
        samples: features, `[rows, features]` or `[kv_heads, rows, features]`, and targets, `[kv_heads, rows]`.
        scaled: whether features are brought to one size first.
    """
    if not scaled:
        plain = _solved(samples)
        return lambda x: (x @ plain).T
    size = torch.cat([x.square().mean(-2, keepdim=True) for x, _ in samples], -2).mean(-2, keepdim=True).sqrt()
    size = size.clamp_min(1e-12)
    if samples[0][0].ndim == 2:
        plain_of_scaled = ridge([(x / size, y) for x, y in samples], scaled=False)
        return lambda x: plain_of_scaled(x / size)
    weights = torch.stack(
        [_solved([(x[head] / size[head], y[head : head + 1]) for x, y in samples]) for head in range(len(size))]
    )
    return lambda x: ((x / size) @ weights)[..., 0]


def _solved(samples: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    normal = Normal(samples[0][0].shape[1], len(samples[0][1]), samples[0][0].device)
    for x, y in samples:
        normal.add(x, y.T, x.new_ones(len(x)))
    return normal.solve(PENALTY).float()


def hidden_layer(samples: Sequence[tuple[Tensor, Tensor]], seed: int) -> Scores:
    """Returns the scores of a hidden layer for each KV head, as `ridge` does of features `[rows, features]`."""
    kv_heads, inputs = len(samples[0][1]), samples[0][0].shape[1] - 1
    torch.manual_seed(seed)
    size = torch.cat([x[:, :-1].square().mean(0, keepdim=True) for x, _ in samples]).mean(0).sqrt().clamp_min(1e-12)
    first, last = nn.Linear(inputs, kv_heads * WIDTH), nn.Parameter(torch.randn(kv_heads, WIDTH) / WIDTH**0.5)
    parameters = [*first.parameters(), last]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)

    def scores(x: Tensor) -> Tensor:
        hidden = nn.functional.silu(first(x[:, :-1] / size)).unflatten(-1, (kv_heads, WIDTH))
        return torch.einsum("rhw,hw->hr", hidden, last)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (scores(x) - y).square().mean()

    held, fitted = samples[::STOPPING], [each for index, each in enumerate(samples) if index % STOPPING]
    x, y = torch.cat([x for x, _ in fitted]), torch.cat([y for _, y in fitted], 1)
    best, kept, waited = float("inf"), [p.detach().clone() for p in parameters], 0
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x)).split(ROWS):
            optimizer.zero_grad()
            loss(x[part], y[:, part]).backward()
            optimizer.step()
        with torch.no_grad():
            found = float(np.mean([float(loss(*each)) for each in held]))
        waited += 1
        if found < best:
            best, kept, waited = found, [p.detach().clone() for p in parameters], 0
        if waited == PATIENCE:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return lambda x: scores(x).detach()


def probe(
    name: str, samples: Sequence[tuple[dict[str, Tensor], Tensor]], seed: int
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Fits a probe.

    Args:
        name: of it.
        samples: what `features_of` gives of each, and targets, `[kv_heads, rows]`.
        seed: of a hidden layer.

    Returns:
        Its scores, `[kv_heads, rows]`, of what `features_of` gives.
    """
    seen = "input" if name == "hidden" else name
    own = [(features[seen], targets) for features, targets in samples]
    scores = hidden_layer(own, seed) if name == "hidden" else ridge(own, name != "input")
    return lambda features: scores(features[seen])


def judge(
    source: SourceModel, inputs: Sequence[dict[int, Tensor]], influence: Sequence[np.ndarray[Any, Any]], seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Returns `left_out` of every probe, `[samples, layers * kv_heads, 1 + 3 * len(SHARES)]`, fitted to the other half.

    Args:
        source: the dense model.
        inputs: of every sample what `attention_inputs` gives, by layer.
        influence: of every sample the influence of its tokens, `[layers, kv_heads, tokens]`.
        seed: of the hidden layers.
    """
    modules, kv_heads = attention_modules(source.model), source.shape.kv_heads
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    for layer, module in enumerate(modules):
        features = [features_of(module, of_sample[layer], kv_heads) for of_sample in inputs]
        targets = [target(torch.from_numpy(of_sample[layer])) for of_sample in influence]
        of_layer: dict[str, list[Any]] = {name: [None] * len(inputs) for name in (*features[0], "hidden")}
        for half in (0, 1):
            others = range(1 - half, len(inputs), 2)
            for name, left in of_layer.items():
                scores = probe(name, [(features[index], targets[index]) for index in others], seed)
                for index in range(half, len(inputs), 2):
                    left[index] = left_out(torch.from_numpy(influence[index][layer]), scores(features[index]))
        for name, left in of_layer.items():
            found.setdefault(name, []).append(np.stack(left))
        print(f"layer {layer + 1} of {len(modules)}", file=sys.stderr, flush=True)
    return {name: np.concatenate(left, axis=1) for name, left in found.items()}


def gates_of(
    source: SourceModel, inputs: Sequence[dict[int, Tensor]], influence: Sequence[np.ndarray[Any, Any]], seed: int
) -> dict[str, list[Given]]:
    """Returns of every probe the gates of all layers, fitted to all samples; arguments as of `judge`."""
    kv_heads = source.shape.kv_heads
    found: dict[str, list[Given]] = {}
    for layer, module in enumerate(attention_modules(source.model)):
        features = [features_of(module, of_sample[layer], kv_heads) for of_sample in inputs]
        targets = [target(torch.from_numpy(of_sample[layer])) for of_sample in influence]
        for name in (*features[0], "hidden"):
            scores = probe(name, list(zip(features, targets, strict=True)), seed)
            found.setdefault(name, []).append(Given(_of_entering(scores, module, kv_heads)))
        print(f"gates of layer {layer + 1}", file=sys.stderr, flush=True)
    return found


def _of_entering(scores: Callable[[dict[str, Tensor]], Tensor], module: nn.Module, kv_heads: int) -> Scores:
    """Returns scores `[1, kv_heads, tokens]` of what enters a layer, `[1, tokens, inputs]`."""
    return lambda hidden: scores(features_of(module, nn.functional.pad(hidden[0], (0, 1), value=1.0), kv_heads))[None]


def divergences(
    source: SourceModel, plan: Plan, gates: dict[str, list[Given]], samples: Sequence[Sample]
) -> dict[str, list[float]]:
    """Returns the KL of the dense model to that under a plan by every probe's gates, nats an answer token, of each sample."""
    dense = [answer_logits(source.model, sample) for sample in samples]
    found = {}
    for name, of_layers in gates.items():
        attach(source.model, plan.in_dtype("float32"))
        for layer, module in choosing_modules(source.model):
            module.gate = of_layers[layer]
        ours = [answer_logits(source.model, sample) for sample in samples]
        detach(source.model)
        found[name] = [kl_divergence(p, q) for p, q in zip(dense, ours, strict=True)]
    return found


def measured_rows(found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns what is said of every probe end to end, from `divergences`."""
    return [
        {"probe": name, "kl": mean_and_error(np.array(kls)), "times": ratio(kls, found["input"])}
        for name, kls in found.items()
    ]


def rows(found: dict[str, np.ndarray[Any, Any]]) -> list[dict[str, Any]]:
    """Returns what is said of every probe and share, from `judge`."""
    listed = []
    for name, counted in found.items():
        for number, share in enumerate(SHARES):
            left = share_left(counted, number)
            listed.append(
                {
                    "probe": name,
                    "share": share,
                    "left": mean_and_error(left),
                    "difference": mean_and_error(left - share_left(found["input"], number)),
                    "of_all": float(counted[..., 1 + 3 * number].sum() / counted[..., 0].sum()),
                }
            )
    return listed


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="MODEL, dense")
    parser.add_argument("--recipe", type=Path, help="whose calibration gates are trained on")
    parser.add_argument("--text", help="long prose, where the recipe needs it")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--plan", type=Path, help="one with gates, to be measured with each probe's in their place")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    given = parser.parse_args()
    source = load_source(given.model, dtype="float32")
    changes = {"profile__gate_samples": given.samples, "calibration__text": given.text}
    recipe = Recipe() if given.recipe is None else Recipe.load(given.recipe)
    recipe = recipe.override(
        profile__gates=True, **{name: value for name, value in changes.items() if value is not None}
    )
    samples = answer_drafts(source.model, gate_drafts(source, recipe))
    recipe = gate_recipe(recipe)
    layers = range(source.shape.layers)
    inputs = [dict(attention_inputs(source.model, sample, layers)) for sample in samples]
    influence = [
        token_influence(source.model, source.shape, sample, recipe.profile.draws, recipe.seed, index)
        for index, sample in enumerate(samples)
    ]
    measured = []
    if given.plan is not None:
        plan, held = Plan.load(given.plan), build_samples(source, recipe, "validation")
        measured = measured_rows(divergences(source, plan, gates_of(source, inputs, influence, recipe.seed), held))
    found = rows(judge(source, inputs, influence, recipe.seed)) if not given.plan else []
    if given.json:
        tokens = sum(len(sample.input_ids) for sample in samples)
        print(json.dumps({"samples": len(samples), "tokens": tokens, "rows": found, "measured": measured}))
        return
    for row in measured:
        (kl, error), times = row["kl"], row["times"]
        print(
            f"{row['probe']:<18} {error_text(kl, error)} nats, {estimate_text(times['value'], times['ci95'])} x input's"
        )
    for row in found:
        (left, error), (more, spread) = row["left"], row["difference"]
        line = f"{row['probe']:<18} {row['share']:5.0%} chosen: {error_text(left, error, '.3f')} left, "
        print(f"{line}{error_text(more, spread, '+.3f')} to input; {row['of_all']:.3f} of all")


if __name__ == "__main__":
    main()

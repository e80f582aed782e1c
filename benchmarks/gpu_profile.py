"""The part `profile` of `gpu.py`: a profiled sample beside a forward and a backward pass of SDPA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from gpu_rows import Row, Task  # beside this script
from gpu_runner import Runner

from moacompress.rules.candidates import candidate_rules, gated_rules
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule_table import RuleTable

WAYS = {"spans": {}, "with heads": {"heads": True}, "with heads and gates": {"heads": True, "gates": True}}
"""What is profiled: the last one is what `compress` does where it is told nothing else."""


def profile(runner: Runner) -> Iterator[Task]:
    """Yields the time of a profiled sample, of a model of a few layers, for each of `WAYS`."""
    for name in ("with heads and gates", "spans", "with heads"):
        yield Task(f"{runner.sizes.sample:,} tokens, {name}", partial(_profile_row, runner, name))


def _profile_row(runner: Runner, name: str) -> Row:
    from moacompress.calibration.data.samples import Sample
    from moacompress.calibration.profile.passes import frozen
    from moacompress.calibration.profile.sample_statistics import sample_statistics
    from moacompress.recipe_sections import ProfileRecipe

    model, length = runner.model(runner.sizes.layers), runner.sizes.sample
    chosen = ProfileRecipe(draws=1, min_window=16, **WAYS[name])
    ids = np.random.default_rng(0).integers(0, runner.sizes.model["vocab_size"], length)
    targets = min(32, length // 4)
    sample = Sample(ids, np.arange(length) >= length - targets, "random", length)
    bounds = length, chosen.sinks, chosen.min_window
    rules = candidate_rules(*bounds) + (gated_rules(*bounds) if chosen.gates else ())
    table, shape = RuleTable.of(rules, chosen.min_window), runner.shape(model)
    gates = _gates(shape, runner.sizes.model["hidden_size"]) if chosen.gates else None
    tokens = torch.from_numpy(ids).to(runner.device)
    rows = torch.arange(length - targets - 1, length - 1, device=runner.device)

    def plain() -> None:
        with frozen(model), torch.enable_grad():
            embeddings = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=rows).logits[0]
            torch.autograd.grad(F.cross_entropy(logits.float(), tokens[rows + 1]), embeddings)

    few = min(3, runner.sizes.repeats)
    beside = runner.seconds(plain, few)
    seconds = runner.seconds(lambda: sample_statistics(model, shape, table, sample, chosen, None, 0, 0, gates), few)
    return {
        "layers": shape.layers,
        "rules": len(table),
        "ms": seconds * 1e3,
        "SDPA, ms": beside * 1e3,
        "x SDPA": seconds / beside,
    }


def _gates(shape: ModelShape, inputs: int) -> GateWeights:
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((shape.layers, shape.kv_heads, inputs)).astype(np.float32)
    return GateWeights(weight, draw.standard_normal((shape.layers, shape.kv_heads)).astype(np.float32))

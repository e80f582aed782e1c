"""What rounding the weights of single linear layers is predicted to cost, from backward passes.

A layer `y = W x` whose weight is off by `D` has its outputs off by `D x` at every token: the same `D` at all of them. With a
cotangent `dy` drawn as the profile draws it (`sample_statistics.logit_cotangent`) the KL is, to second order,

    1/2 E (sum over tokens dy . (D x))^2 = 1/2 E <dW, D>^2,   dW = sum over tokens dy x^T

with the sum over tokens inside the square. Errors of rounding have no sign that the gradient knows of, so numbers add:
`E <dW, D>^2 = sum E dW^2 D^2`, and within a block of 32 numbers, which have one scale, the error is as large everywhere: the
squares of `dW` are summed over blocks, beside the mean square of the error in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import Recording, Tape
from moacompress.calibration.profile.sample_statistics import cotangent_generator, fisher_cotangent
from moacompress.core.arrays import Floats
from moacompress.models.placement import input_device
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

BLOCK = 32
"""Numbers of a block, along the inputs."""


def block_error(weight: Tensor, other: Tensor) -> Tensor:
    """Returns the mean square of what two weights differ by, in blocks: float32 `[outputs, inputs / BLOCK]`.

    Args:
        weight: `[outputs, inputs]`.
        other: likewise.
    """
    apart = weight.float() - other.float()
    return apart.square().view(len(weight), -1, BLOCK).mean(-1)


def weight_influence(
    model: PreTrainedModel,
    shape: ModelShape,
    errors: Mapping[str, Tensor],
    sample: Sample,
    draws: int,
    seed: int,
    index: int,
) -> Floats:
    """Returns the predicted KL of errors in single weights on a sample, nats, float64 `[layers, kinds]`.

    Args:
        model: dense, weights frozen.
        shape: its shape.
        errors: of linear layers by name, as `block_error` has them, of several kinds: `[kinds, outputs, inputs / BLOCK]`.
        sample: the sample.
        draws: random cotangents.
        seed: the run's seed.
        index: number of the sample; with `seed` it decides the cotangents.
    """
    found = {name: np.zeros(len(error)) for name, error in errors.items()}

    def at_output(name: str, x: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            of_weight = gradient.flatten(0, -2).T.float() @ x.flatten(0, -2).float()
            squares = of_weight.square_().unflatten(1, (-1, BLOCK)).sum(-1)
            error = errors[name]
            found[name] += (error * squares.to(error.device)).sum((1, 2)).double().cpu().numpy()

        return add

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(at_output(name, inputs[0].detach()))

        return hook

    rows = torch.from_numpy(np.flatnonzero(sample.answer_mask) - 1).to(input_device(model))
    ids = torch.from_numpy(sample.input_ids).to(input_device(model))
    with ExitStack() as stack:
        for name in errors:
            stack.callback(model.get_submodule(name).register_forward_hook(watch(name)).remove)
        tape = stack.enter_context(Tape(model, Recording.of(shape, RuleTable.of([Rule.FULL], 1)), ids, rows))
        for draw in range(draws):
            cotangent = fisher_cotangent(len(rows), cotangent_generator(seed, index, draw))
            tape.backward(cotangent, [()] * shape.layers, last=draw + 1 == draws)
    return np.stack([found[name] / (2 * draws) for name in errors])

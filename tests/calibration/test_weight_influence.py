"""What rounded weights are predicted to cost: against gradients of the weights themselves, and against measured KL."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.passes import answer_logits, hidden_states, output_logits
from moacompress.calibration.profile.sample_statistics import cotangent_generator, fisher_cotangent
from moacompress.calibration.profile.weight_influence import BLOCK, block_error, weight_influence
from moacompress.models.kl import kl_divergence
from moacompress.models.source import model_shape

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj")
DRAWS = 3


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama").requires_grad_(False)


def make_sample(n: int = 96, seed: int = 0) -> Sample:
    ids = np.random.default_rng(seed).integers(3, 90, n)
    return Sample(ids.astype(np.int64), np.arange(n) >= n - 8, "needle", n)


def errors_of(model, scale: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    found = {}
    for name in NAMES:
        weight = model.get_parameter(f"{name}.weight")
        found[name] = torch.stack(
            [block_error(weight, weight + size * torch.randn_like(weight)) for size in (scale, 2 * scale)]
        )
    return found


def by_autograd(model, errors, sample) -> np.ndarray:
    """The same from the gradients that autograd has of the weights."""
    rows = torch.from_numpy(np.flatnonzero(sample.answer_mask) - 1)
    ids = torch.from_numpy(sample.input_ids)
    weights = [model.get_parameter(f"{name}.weight") for name in errors]
    found = np.zeros((len(errors), 2))
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for draw in range(DRAWS):
            hidden = hidden_states(model, model.get_input_embeddings()(ids[None]))[0, rows]
            logits = output_logits(model, hidden)
            z = fisher_cotangent(len(rows), cotangent_generator(5, 2, draw))(logits.detach(), slice(None))
            gradients = torch.autograd.grad(logits, weights, z)
            for number, (gradient, error) in enumerate(zip(gradients, errors.values(), strict=True)):
                squares = gradient.double().square().unflatten(1, (-1, BLOCK)).sum(-1)
                found[number] += (squares * error).sum((1, 2)).numpy() / (2 * DRAWS)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return found


@pytest.mark.parametrize("kept", [0, 4096])
def test_it_is_the_squared_gradient_of_the_weight_over_all_tokens(model, monkeypatch, kept):
    monkeypatch.setattr(passes, "KEEP_TOKENS", kept)  # layers run twice, or once
    errors, sample = errors_of(model, 1e-3), make_sample()
    found = weight_influence(model, model_shape(model), errors, sample, DRAWS, 5, 2)
    assert np.allclose(found, by_autograd(model, errors, sample), rtol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


def test_it_predicts_measured_kl(model):
    """Random errors in one weight, many times over: their mean KL is what is predicted."""
    sample, scale = make_sample(seed=3), 4e-3
    errors = errors_of(model, scale)
    predicted = weight_influence(model, model_shape(model), errors, sample, 400, 0, 0)[:, 0]
    dense = answer_logits(model, sample)
    generator = torch.Generator().manual_seed(0)
    for name, expected in zip(errors, predicted, strict=True):
        weight = model.get_parameter(f"{name}.weight")
        own, kls = weight.clone(), []
        for _ in range(60):
            weight.copy_(own + scale * torch.randn(own.shape, generator=generator))
            kls.append(kl_divergence(dense, answer_logits(model, sample)))
        weight.copy_(own)
        assert np.mean(kls) == pytest.approx(expected, rel=0.35), name

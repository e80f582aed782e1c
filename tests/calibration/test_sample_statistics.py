"""What one sample says: exact attention, the Fisher identity, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moacompress.calibration.profile import passes
from moacompress.calibration.profile.sample_statistics import FisherCotangent, sample_statistics, secant_probabilities
from moacompress.models.modules import decoder_layers
from moacompress.models.source import SourceModel, model_shape
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.formats import CODED
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime import attach, detach
from tests.calibration.conftest import random_sample

Factory = Callable[..., PreTrainedModel]
ALL = ProfileRecipe(draws=1, baselines=True)
TABLE = RuleTable.of((Rule.FULL, Rule(4, 32, 0)), 32)
MANY = ProfileRecipe.model_construct(draws=400, baselines=False)


def test_statistics_of_every_family_are_finite_and_full_is_free(tiny_model: Factory) -> None:
    rules = (Rule.FULL, Rule(4, 32, 0), Rule(4, 100, 0), Rule(64, 0, 512))
    for family in ("qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt_oss"):
        model = tiny_model(family)
        shape = model_shape(model)
        found = sample_statistics(model, shape, RuleTable.of(rules, 32), random_sample(128), ALL, 0, 0)
        size, formats = (shape.layers, shape.kv_heads, 4), (shape.layers, shape.kv_heads, 1 + len(CODED))
        assert found.shapes == {
            "total": (1, *size),
            **dict.fromkeys(("squares", "moa", "mass"), size),
            **dict.fromkeys(("key_squares", "value_squares"), formats),
            **dict.fromkeys(("key_total", "value_total"), (1, *formats)),
        }
        assert found.finite
        assert not any(array[..., 0].any() for array in found.arrays.values())
        assert all(parameter.grad is None for parameter in model.parameters())
        for layer, native in enumerate(shape.native_windows):
            masks = native is None or native > 32
            for array in found.arrays.values():
                assert array[..., layer, :, 1].all() == masks, family


@pytest.mark.parametrize("q", [1e-9, 1e-3, 0.1, 0.4])
def test_secant_probabilities_have_the_least_variance_that_bounds_kl(q: float) -> None:
    """Of two outcomes whose logits move apart by any amount: KL is never more than half its square times the variance."""
    logits = torch.tensor([[1 - q, q]], dtype=torch.float64).log()
    w = float(secant_probabilities(logits)[0, 1])
    moved = torch.linspace(-60, 60, 24_001, dtype=torch.float64)[:, None]
    other = (logits + torch.cat((torch.zeros_like(moved), moved), 1)).log_softmax(-1)
    kl = (logits.exp() * (logits - other)).sum(-1)
    share = kl / (w * (1 - w) * moved[:, 0].square() / 2)
    assert 0.995 < float(share[moved[:, 0].abs() > 0.1].max()) < 1.001


def test_secant_probabilities_leave_doubt_as_it_is() -> None:
    logits = torch.tensor([[0.1, 0.0, -1.0, 0.5], [8.0, 0.0, -1.0, 0.5]])
    p, found = logits.softmax(-1), secant_probabilities(logits)
    assert torch.allclose(found[0], p[0])
    assert torch.allclose(found.sum(-1), torch.ones(2))
    assert torch.allclose(found[1, 1:] / found[1, 1:].sum(), p[1, 1:] / p[1, 1:].sum())
    assert found[1, 0] < 0.95 < 0.99 < p[1, 0]


def test_the_cotangent_s_covariance_is_the_fisher_matrix() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([FisherCotangent(1, generator)(logits, slice(0, 1)) for _ in range(20_000)]).double()
    p = secant_probabilities(logits)[0].double()
    assert torch.allclose(draws.T @ draws / len(draws), p.diag() - p[:, None] * p, atol=0.01)
    assert float(draws.sum(-1).abs().max()) < 1e-6
    eight = FisherCotangent(8, torch.Generator().manual_seed(0))(logits.expand(8, 4), slice(0, 8))
    assert eight.shape == (8, 4)


def test_formats_count_by_the_models_own_curvature(tiny_model: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.1, 0.0, -1.0, 0.5], [8.0, 0.0, -1.0, 0.5]])
    cotangent = FisherCotangent(2, torch.Generator().manual_seed(0))
    for row in range(2):
        cotangent(logits[row : row + 1], slice(row, row + 1))
    own, drawn = (1 - p.square().sum(-1) for p in (logits.softmax(-1), secant_probabilities(logits)))
    assert cotangent.curvature == pytest.approx(float(own.sum() / drawn.sum()))
    assert float(own[1] / drawn[1]) < 0.1 < cotangent.curvature < 1

    model = tiny_model("llama", initializer_range=1.0)  # sure of its tokens
    given = (model, model_shape(model), TABLE, random_sample(100), ALL, 0, 0)
    found, shares = sample_statistics(*given).arrays, list[float]()
    curvature = FisherCotangent.curvature
    monkeypatch.setattr(FisherCotangent, "curvature", property(lambda self: shares.append(curvature.fget(self)) or 1.0))  # type: ignore[attr-defined,func-returns-value]
    unscaled = sample_statistics(*given).arrays
    assert shares[0] < 0.95
    for name, array in found.items():
        power = {"squares": 1.0, "total": 0.5}.get(name.rpartition("_")[2], 0.0) if "_" in name else 0.0
        np.testing.assert_allclose(array, unscaled[name] * shares[0] ** power, rtol=1e-5)


@pytest.mark.heavy
def test_the_expected_square_is_twice_the_kl(tiny_model: Factory) -> None:
    """Single KV heads and the whole plan, for a window so wide that the second order is all there is."""
    model = tiny_model("llama", num_hidden_layers=2, initializer_range=0.08)
    shape, n, rule = model_shape(model), 160, Rule(4, 140, 0)
    sample = random_sample(n, 24, seed=1)
    found = sample_statistics(model, shape, RuleTable.of((Rule.FULL, rule), 32), sample, MANY, 0, 0)
    total = found.arrays["total"][..., 1].astype(np.float64)
    rows, exact = sample.target_rows, model.double()

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = exact(torch.from_numpy(sample.input_ids)[None], use_cache=False).logits
            return logits[0, rows].log_softmax(-1)

    def kl(heads: list[tuple[int, int]]) -> float:
        rules = [[rule if (layer, head) in heads else Rule.FULL for head in range(2)] for layer in range(2)]
        attach(exact, Plan(shape, 32, tuple(map(tuple, rules))))
        changed = log_probabilities()
        detach(exact)
        return float((dense.exp() * (dense - changed)).sum(-1).mean())

    dense = log_probabilities()
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    for chosen in [*([one] for one in heads), heads]:
        predicted = (np.sum([total[:, layer, head] for layer, head in chosen], 0) ** 2).mean() / 2
        assert predicted == pytest.approx(kl(chosen), rel=0.25), chosen
    fisher = found.arrays["squares"][..., 1] / 2
    assert [float(fisher[head]) for head in heads] == pytest.approx([kl([head]) for head in heads], rel=0.25)


def test_weights_are_frozen_meanwhile(source: SourceModel) -> None:
    given = source.model, source.shape, TABLE, random_sample(128), ALL, 0, 0
    one, two = source.model.model.layers[0].mlp.up_proj, source.model.lm_head
    expected = sample_statistics(*given)
    for module in (one, two):
        module.weight.requires_grad_(True)
    assert sample_statistics(*given).digest() == expected.digest()
    free = [name for name, weight in source.model.named_parameters() if weight.requires_grad]
    assert free == ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    assert one.weight.grad is None


def test_the_model_is_restored_after_an_error(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source.model.config._attn_implementation
    recording = passes.Recording.of(source.shape, RuleTable.of((Rule.FULL,), 32))
    ids, forwards = torch.arange(5), [layer.forward for layer in decoder_layers(source.model)]
    monkeypatch.setattr(passes, "KEEP_TOKENS", 2)
    with pytest.raises(IndexError), passes.Tape(source.model, recording, ids, torch.tensor([7])):
        pass
    with pytest.raises(ZeroDivisionError), passes.Tape(source.model, recording, ids, torch.tensor([3])):
        raise ZeroDivisionError
    assert source.model.config._attn_implementation == before
    assert [layer.forward for layer in decoder_layers(source.model)] == forwards
    with pytest.raises(LookupError):
        passes._recording.get()

"""How heads attend: the tiled sums against whole float64 matrices, and against a real model's own probabilities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moacompress.calibration.profile.collectors import HeadSums
from moacompress.calibration.profile.influence import attend_backward
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.statistics import DISTANCE_BINS
from moacompress.calibration.profile.tiles import AttentionSpec
from moacompress.models.source import model_shape
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.rule import SINKS, Rule
from moacompress.rules.rule_table import RuleTable
from tests import oracle
from tests.calibration.conftest import random_sample

TABLE = RuleTable.of((Rule.FULL, Rule(4, 16, 0)), 16)


def bins(n: int) -> Tensor:
    """The bin of every query and key, spelled out: `[n, n]`, -1 for the future."""
    return torch.tensor(
        [[min((i - j).bit_length(), DISTANCE_BINS - 1) if j <= i else -1 for j in range(n)] for i in range(n)]
    )


def whole(probabilities: Tensor, escape: Tensor | None, rows: Tensor) -> dict[str, Tensor]:
    """The definition, from float64 `[kv_heads, group, n, n]` and the learned sink's `[kv_heads, group, n]`."""
    p = probabilities[:, :, rows]
    at, keys = bins(probabilities.shape[-1])[rows], torch.arange(probabilities.shape[-1])
    surprise = -(p * p.clamp_min(1e-300).log()).sum(-1)
    if escape is not None:
        surprise -= escape[:, :, rows] * escape[:, :, rows].log()
    return {
        "distance": torch.stack([(p * (at == b)).sum(-1).mean((1, 2)) for b in range(DISTANCE_BINS)], -1),
        "sink_mass": torch.stack([p[..., keys < sink].sum(-1).mean((1, 2)) for sink in SINKS], -1),
        "entropy": surprise.mean((1, 2)),
    }


@pytest.mark.parametrize(
    ("n", "native", "rows", "learned", "dtype"),
    [
        (200, None, None, False, torch.float32),
        (190, 40, None, True, torch.float32),
        (9, None, None, True, torch.float64),
        (200, 70, 3, False, torch.float64),
    ],
)
def test_sums_match_whole_matrices(
    n: int, native: int | None, rows: int | None, learned: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(n)
    heads, kv_heads, size = 6, 2, 8
    query, grad = torch.randn(2, 1, heads, n, size, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, n, size, dtype=torch.float64)
    query *= 2
    sink = torch.randn(heads, dtype=torch.float64) + 1 if learned else None
    alive = torch.arange(n) if rows is None else torch.arange(0, n, rows)
    keep = torch.zeros(n, 1, dtype=torch.float64)
    keep[alive] = 1
    spec = AttentionSpec(size**-0.5, native)
    mask, p, escape = oracle.visible(Rule.FULL, n, 16, native), [], []
    for head in range(kv_heads):
        own = slice(head * 3, head * 3 + 3)
        logits = None if sink is None else sink[own]
        weights, lse = oracle.weigh(query[0, own], key[0, head], mask, spec.scaling, None, logits)
        p.append(weights)
        escape.append(weights[..., 0] if logits is None else (logits[:, None] - lse).exp())
    expected = whole(torch.stack(p), torch.stack(escape) if learned else None, alive)

    sums = HeadSums(kv_heads)
    q, k, v, g = (tensor.to(dtype) for tensor in (query, key, value, grad * keep))
    attend_backward(q, k, v, g, spec, None if sink is None else sink.to(dtype), TABLE, [sums])
    found = sums.tensors()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, mean in expected.items():
        assert found[name].shape == mean.shape
        assert torch.allclose(found[name], mean, rtol=tolerance, atol=tolerance), name
    total = found["distance"].sum(-1)
    assert (total < 0.999).all() if learned else torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_the_last_bin_has_no_end() -> None:
    """140,000 tokens without a pattern: every bin holds its share of the keys, the last all that are farther."""
    n, size = 140_000, 1
    query, grad = torch.zeros(1, 1, n, size), torch.zeros(1, 1, n, size)
    grad[:, :, -1] = 1
    sums = HeadSums(1)
    attend_backward(query, query, query, grad, AttentionSpec(1.0), None, TABLE, [sums])
    found = sums.tensors()
    counts = [1, *(2**power for power in range(16)), n - 2**16]
    assert found["distance"][0].tolist() == pytest.approx([count / n for count in counts], rel=1e-3)
    assert found["sink_mass"][0].tolist() == pytest.approx([sink / n for sink in SINKS], rel=1e-3)
    assert float(found["entropy"][0]) == pytest.approx(np.log(n), rel=1e-5)


def test_a_model_s_own_probabilities(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("qwen3")
    model.config._attn_implementation = "eager"
    shape, n = model_shape(model), 150
    sample = random_sample(n)
    with torch.no_grad():
        attentions = model(torch.from_numpy(sample.input_ids)[None], output_attentions=True).attentions
    chosen = ProfileRecipe(draws=2, heads=True)
    found = sample_statistics(model, shape, TABLE, sample, chosen, 0, 0)
    plain = sample_statistics(model, shape, TABLE, sample, ProfileRecipe(draws=2), 0, 0)
    assert set(found.arrays) == {*plain.arrays, "distance", "sink_mass", "entropy"}
    for name, array in plain.arrays.items():
        assert np.array_equal(found.arrays[name], array)
    for layer, attention in enumerate(attentions):
        p = attention[0].double().view(shape.kv_heads, -1, n, n)
        rows = sample.target_rows if layer == shape.layers - 1 else np.arange(n - 1)
        for name, value in whole(p, None, torch.from_numpy(rows)).items():
            assert np.allclose(found.arrays[name][layer], value.numpy(), rtol=1e-4, atol=1e-6), (name, layer)

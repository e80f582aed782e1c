"""The tiled attention equals plain attention under an explicit mask, on random inputs, and never makes a large tensor."""

import math
import random

import pytest
import torch

from moacompress.kernels.arguments import Scores
from moacompress.kernels.reference import tiled
from moacompress.kernels.reference.tiled import Keys, sparse_attention
from moacompress.rules.rule import SINKS, Rule
from tests import oracle

INF = float("inf")


def by_definition(query, key, value, n, rule, native, scores):
    mask = oracle.visible(rule, n, 16, native, first=n - query.shape[3])
    logits = None if scores.sink_logits is None else scores.sink_logits.flatten()
    out = oracle.attend(query.flatten(1, 2), key, value, mask, scores.scaling, scores.softcap, logits)
    return out.view(*query.shape[:-1], -1)


def in_tiles(query, key, value, n, rule, native, scores, **more):
    return sparse_attention(query, Keys(key, value, [(0, n)]), n, rule.span(16, native), scores, **more)


def draw(rng, dtype):
    """Returns queries, keys and values, and how they are attended to."""
    batch, kv_heads, group, value_dim = rng.choice((1, 2)), rng.choice((1, 3)), rng.choice((1, 3)), rng.choice((8, 5))
    n = rng.choice((1, 2, 3, 5, 16, 17, 64, 65, 150))
    rows = rng.choice((1, n, rng.randint(1, n)))
    shapes = (batch, kv_heads, group, rows, 8), (batch, kv_heads, n, 8), (batch, kv_heads, n, value_dim)
    rule = rng.choice((Rule.FULL, Rule(rng.choice(SINKS), rng.choice((0, 7, 30, 80)), rng.choice((0, 100, 500, 1000)))))
    logits = torch.randn(kv_heads, group, dtype=torch.float64) if rng.random() < 0.3 else None
    scores = Scores(0.3, rng.choice((0.0, 0.0, 2.0)), logits)
    native = rng.choice((None, None, 1, 5, 40, 100))
    return [torch.randn(shape, dtype=dtype) for shape in shapes], (n, rule, native, scores)


@pytest.mark.seeds(60)
def test_random_configurations(seed, monkeypatch):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    inputs, rest = draw(rng, torch.float64)
    monkeypatch.setattr(tiled, "MAX_TILE", rng.choice([16, 32, 256]))
    monkeypatch.setattr(tiled, "COPY_GAP", rng.choice([0, 64]))
    (found,), (again, _) = in_tiles(*inputs, *rest), in_tiles(*inputs, *rest, with_lse=True)
    assert (again - found).abs().max() < 1e-12
    assert (found - by_definition(*inputs, *rest)).abs().max() < 1e-12


@pytest.mark.parametrize("number", [torch.nan, INF, -INF])
@pytest.mark.parametrize("what", ["query", "key", "value", "all keys"])
@pytest.mark.parametrize("seed", range(5))
def test_numbers_that_are_not_finite(seed, what, number, unchanged_or_as, monkeypatch):
    """Forward and backward, with and without a past."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    inputs, rest = draw(rng, torch.float32)
    monkeypatch.setattr(tiled, "MAX_TILE", rng.choice((16, 256)))
    other = [t.clone() for t in inputs]
    changed = other[("query", "key", "value").index(what.removeprefix("all ").removesuffix("s"))][-1, 0]
    changed = changed[-1] if what == "query" else changed
    changed[slice(None) if what == "all keys" else rng.randrange(len(changed)), 3] = number
    weight = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1])
    found, exact = [], []
    for one in (other, inputs):
        for into, attend, dtype in (
            (found, lambda *given: in_tiles(*given)[0], torch.float32),
            (exact, by_definition, torch.float64),
        ):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in one]
            out = attend(*leaves, *rest)
            into.append((out, *torch.autograd.grad(out, leaves, weight.to(out.dtype))))
    if math.isinf(number):  # rounding and what is summed first decide between infinity and NaN in the gradients
        found, exact = (
            [[ts[0], *(t.masked_fill(t.isinf(), torch.nan) for t in ts[1:])] for ts in both] for both in (found, exact)
        )
    unchanged_or_as(*found, *exact, 3e-5, bits=False)


def test_long_inputs_stay_in_tiles(monkeypatch):
    """At 6,000 tokens no score tensor comes near rows x keys."""
    largest = 0
    plain = tiled.attend

    def spy(query, keys, values, visible, *rest, **more):
        nonlocal largest
        largest = max(largest, query[..., 0].numel() * keys.shape[2])
        return plain(query, keys, values, visible, *rest, **more)

    monkeypatch.setattr(tiled, "attend", spy)
    n = 6000
    query, key = torch.randn(1, 2, 2, n, 4), torch.randn(1, 2, n, 4)
    for rule in (Rule(4, 64, 0), Rule(64, 0, 512), Rule(4, 0, 1023)):
        in_tiles(query, key, key, n, rule, None, Scores(0.5))
    assert 0 < largest <= tiled.TILE_SCORES * 1.1

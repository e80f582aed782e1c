"""The tiled attention equals plain attention under an explicit mask, on random inputs, and never makes a large tensor."""

import random

import pytest
import torch

from moacompress.kernels.arguments import Scores
from moacompress.kernels.reference import tiled
from moacompress.kernels.reference.tiled import Keys, sparse_attention
from moacompress.rules.rule import SINKS, Rule
from tests import oracle


@pytest.mark.seeds(60)
def test_random_configurations(seed, monkeypatch):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, kv_heads, group, dim, value_dim = (
        rng.choice([1, 2]),
        rng.choice([1, 3]),
        rng.choice([1, 3]),
        8,
        rng.choice([8, 5]),
    )
    n = rng.choice([1, 2, 3, 5, 16, 17, 64, 65, 150])
    rows = rng.choice([1, n, rng.randint(1, n)])
    rule = rng.choice([Rule.FULL, Rule(rng.choice(SINKS), rng.choice([0, 7, 30, 80]), rng.choice([0, 100, 500, 1000]))])
    native = rng.choice([None, None, 1, 5, 40, 100])
    softcap = rng.choice([None, 2.0])
    query = torch.randn(batch, kv_heads, group, rows, dim, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, n, dim, dtype=torch.float64)
    value = torch.randn(batch, kv_heads, n, value_dim, dtype=torch.float64)
    sink_logits = torch.randn(kv_heads, group, dtype=torch.float64) if rng.random() < 0.3 else None
    monkeypatch.setattr(tiled, "MAX_TILE", rng.choice([16, 32, 256]))
    monkeypatch.setattr(tiled, "COPY_GAP", rng.choice([0, 64]))
    scores = Scores(0.3, softcap or 0.0, sink_logits)
    (found,) = sparse_attention(query, Keys(key, value, [(0, n)]), n, rule.span(16, native), scores)
    again, _ = sparse_attention(query, Keys(key, value, [(0, n)]), n, rule.span(16, native), scores, with_lse=True)
    assert (again - found).abs().max() < 1e-12
    mask = oracle.visible(rule, n, 16, native, first=n - rows)
    logits = None if sink_logits is None else sink_logits.flatten()
    expected = oracle.attend(query.flatten(1, 2), key, value, mask, 0.3, softcap, logits)
    assert (found.flatten(1, 2) - expected).abs().max() < 1e-12


def test_columns_of_pieces():
    keys = Keys(torch.zeros(1, 1, 42, 2), torch.zeros(1, 1, 42, 2), [(0, 16), (100, 20), (130, 6)])
    assert keys.columns(0, 16) == (0, 16)
    assert keys.columns(4, 100) == (4, 16)
    assert keys.columns(50, 60) == (16, 16)
    assert keys.columns(99, 101) == (16, 17)
    assert keys.columns(110, 133) == (26, 39)
    assert keys.columns(0, 1000) == (0, 42)
    assert keys.positions().tolist() == [*range(16), *range(100, 120), *range(130, 136)]


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
        sparse_attention(query, Keys(key, key, [(0, n)]), n, rule.span(16), Scores(0.5))
    assert 0 < largest <= tiled.TILE_SCORES * 1.1


def test_full_attention_with_a_native_window_does_not_take_the_causal_short_cut():
    n = 40
    query, key = torch.randn(1, 1, 1, n, 4), torch.randn(1, 1, n, 4)
    (windowed,) = sparse_attention(query, Keys(key, key, [(0, n)]), n, Rule.FULL.span(16, 10), Scores(0.5))
    (whole,) = sparse_attention(query, Keys(key, key, [(0, n)]), n, Rule.FULL.span(16), Scores(0.5))
    assert torch.allclose(windowed[:, :, :, :10], whole[:, :, :, :10], atol=1e-6)
    assert not torch.allclose(windowed[:, :, :, 10:], whole[:, :, :, 10:], atol=1e-3)

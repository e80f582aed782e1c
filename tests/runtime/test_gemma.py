"""The runtime on Gemma 3 270M, a real model with windows of its own: 512 tokens in 15 of its 18 layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moacompress.models.source import SourceModel, load_source
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach

pytestmark = [pytest.mark.real, pytest.mark.heavy]
LENGTH = 640
"""Longer than the native windows, so that they hide something."""


@pytest.fixture(scope="module")
def source(gemma: Path) -> SourceModel:
    return load_source(gemma, dtype="float32")


@pytest.fixture(scope="module")
def ids(source: SourceModel) -> torch.Tensor:
    numbers = ", ".join(str(n * n) for n in range(1, 400))
    return source.tokenizer(numbers, return_tensors="pt").input_ids[:, :LENGTH]


def test_its_windows_are_known(source: SourceModel) -> None:
    assert source.shape.native_windows == tuple(None if layer % 6 == 5 else 512 for layer in range(18))
    assert (source.shape.kv_heads, source.shape.head_dim) == (1, 256)


def test_full_span_equals_stock(source: SourceModel, ids: torch.Tensor) -> None:
    model: Any = source.model
    assert ids.shape[1] == LENGTH
    with torch.no_grad():
        stock = model(ids, use_cache=False, logits_to_keep=64).logits
        attach(model, Plan.full(source.shape))
        found = model(ids, use_cache=False, logits_to_keep=64).logits
    detach(model)
    assert (found - stock).abs().max() < 1e-3 * stock.abs().max()


def test_cached_equals_uncached_and_the_cache_obeys_the_plan(
    source: SourceModel, ids: torch.Tensor, random_plan: Callable[..., Plan]
) -> None:
    model: Any = source.model
    plan = random_plan(source.shape, 1, full_share=0.2).in_dtype("float32")  # which the cache is in
    attach(model, plan)
    with torch.no_grad():
        whole = model(ids, use_cache=False, logits_to_keep=8).logits
        cache = model(ids[:, :530], logits_to_keep=1).cache
        assert cache.used_bytes() == plan.kv_bytes(530)
        model(ids[:, 530 : LENGTH - 8], cache=cache, logits_to_keep=1)
        steps = []
        for at in range(LENGTH - 8, LENGTH):
            steps.append(model(ids[:, at : at + 1], cache=cache).logits)
            assert cache.used_bytes() == plan.kv_bytes(at + 1)
    detach(model)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-3 * whole.abs().max()
    assert plan.kv_bytes(LENGTH) < source.shape.dense_kv_bytes(LENGTH)

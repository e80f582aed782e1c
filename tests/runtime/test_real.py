"""The runtime on real models: SmolLM2-135M, and Gemma 3 270M, whose windows are 512 tokens in 15 of its 18 layers."""

import pytest
import torch

from moacompress.models.source import load_source
from moacompress.pipeline import measured_kv_bytes
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach
from tests.runtime.forwards import difference

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=["smollm2", pytest.param("gemma", marks=pytest.mark.heavy)])
def source(request):
    return load_source(request.getfixturevalue(request.param), dtype="float32")


@pytest.fixture
def ids(source):
    """A text longer than Gemma's windows, so that they hide something."""
    length = 640 if source.shape.model_type.startswith("gemma") else 300
    numbers = ", ".join(str(n * n) for n in range(1, 400))
    return source.tokenizer(numbers, return_tensors="pt").input_ids[:, :length]


def test_full_span_equals_stock(source, ids):
    model = source.model
    if ids.shape[1] > 512:
        assert source.shape.native_windows == tuple(None if layer % 6 == 5 else 512 for layer in range(18))
    with torch.no_grad():
        stock = model(ids, use_cache=False, logits_to_keep=32).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
        attach(model, Plan.full(source.shape))
        assert difference(model(ids, use_cache=False, logits_to_keep=32).logits, stock) < 1e-3
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)
    detach(model)


def test_cached_equals_uncached_and_the_cache_obeys_the_plan(source, ids, random_plan):
    model, end = source.model, ids.shape[1]
    plan = random_plan(source.shape, 1, full_share=0.2).in_dtype("float32")  # which the cache is in
    attach(model, plan)
    with torch.no_grad():
        whole = model(ids, use_cache=False, logits_to_keep=8).logits
        cache = model(ids[:, : end - 100], logits_to_keep=1).cache
        assert cache.used_bytes() == plan.kv_bytes(end - 100)
        model(ids[:, end - 100 : end - 8], cache=cache, logits_to_keep=1)
        steps = []
        for at in range(end - 8, end):
            steps.append(model(ids[:, at : at + 1], cache=cache).logits)
            assert cache.used_bytes() == plan.kv_bytes(at + 1)
    detach(model)
    assert difference(torch.cat(steps, 1), whole) < 1e-3


@pytest.mark.heavy
def test_bytes_of_the_live_cache_are_the_plans(smollm2, tmp_path):
    source = load_source(smollm2, dtype="float32")
    shape = source.shape
    rows = [(Rule(4, 0, 128), Rule(64, 96, 64), Rule(16, 256, 0))] * shape.layers
    plan = Plan(shape, 32, tuple(rows))
    attach(source.model, plan).save_pretrained(tmp_path)
    assert measured_kv_bytes(tmp_path, 1024) == plan.kv_bytes(1024)
    assert plan.kv_bytes(1024) < 0.25 * shape.dense_kv_bytes(1024)

"""The cache holds what the plan says, to the byte, at every length, and frees the rest."""

import gc

import pytest
import torch

from moacompress.errors import UnsupportedError
from moacompress.models import model_shape
from moacompress.plan import Plan, Rule
from moacompress.runtime import attach
from moacompress.runtime.cache import HeadStore, PlanCache


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_the_plans_at_every_length(family, seed, tiny_model, random_plan, token_ids):
    model = tiny_model(family)
    plan = random_plan(model_shape(model), seed)
    attach(model, plan)
    ids = token_ids(2, 140)
    cache = PlanCache(plan)
    with torch.no_grad():
        for at in range(40):
            model(ids[:, at : at + 1], cache=cache)
            assert cache.kv_bytes() == plan.kv_bytes(at + 1, batch=2)
        model(ids[:, 40:137], cache=cache)
    assert cache.get_seq_length() == 137
    assert cache.kv_bytes() == plan.kv_bytes(137, batch=2)


def test_memory_is_really_freed(tiny_model, token_ids):
    """No tensor anywhere in the process is as long as the prompt once a narrow plan has prefilled it."""
    model = tiny_model()
    attach(model, Plan.uniform(model_shape(model), Rule(4, 32, 0)))
    with torch.no_grad():
        cache = model(token_ids(1, 777)).cache
    gc.collect()
    longest = max(max(t.shape) for layer in cache.layers for store in layer.stores for t in store.tensors)
    assert longest <= 16 + 48
    leftovers = [o for o in gc.get_objects() if type(o) is torch.Tensor and 777 in o.shape and o.ndim == 4]
    assert not leftovers


def test_store_keeps_exactly_the_visible_keys():
    """Random chunks: every key the next query sees is there, unchanged, at its position."""
    generator = torch.Generator().manual_seed(0)
    everything = torch.randn(2, 1, 400, 4, generator=generator)
    for rule, native in [(Rule(4, 20, 0), None), (Rule(16, 0, 300), None), (Rule(64, 30, 100), 90), (Rule.FULL, 50)]:
        store, n = HeadStore(rule, [0], 16, native), 0
        while n < 380:
            size = int(torch.randint(1, 60, (), generator=generator)) if n % 3 else 1
            size = min(size, 400 - n)
            chunk = everything[:, :, n : n + size]
            store.commit(chunk, -chunk, n)
            n += size
            keys = store.committed(n)
            found = dict(zip(keys.positions().tolist(), keys.keys[0, 0], strict=True))
            visible = [
                j
                for j in range(n)
                if (j < rule.sink or j >= n - min(n, max(16, rule.alpha + rule.beta_q * n // 1024)))
                and (native is None or j >= n - native)
            ]
            for j in visible:
                assert torch.equal(found[j], everything[0, 0, j])
            assert torch.equal(keys.values, -keys.keys)
            assert store.tensors[0].shape[2] == rule.slots(n, 16, native)


def test_rows_can_be_selected_and_repeated(tiny_model, random_plan, token_ids):
    model = tiny_model()
    attach(model, random_plan(model_shape(model), 1))
    ids = token_ids(3, 60)
    with torch.no_grad():
        cache = model(ids[:, :50]).cache
        cache.batch_select_indices(torch.tensor([2, 0]))
        found = model(ids[[2, 0], 50:], cache=cache).logits
        expected = model(ids, use_cache=False).logits[[2, 0], 50:]
    assert (found - expected).abs().max() < 1e-4
    with torch.no_grad():
        cache = model(ids[:1, :50]).cache
        cache.batch_repeat_interleave(3)
        found = model(ids[:1, 50:].repeat(3, 1), cache=cache).logits
    assert (found - model(ids[:1], use_cache=False).logits[:, 50:]).abs().max() < 1e-4


def test_reset_empties_the_cache(tiny_model, random_plan, token_ids):
    model = attach(tiny_model(), random_plan(model_shape(tiny_model()), 1))
    ids = token_ids(1, 30)
    with torch.no_grad():
        cache = model(ids).cache
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.kv_bytes() == 0
        assert torch.equal(model(ids, cache=cache).logits, model(ids).logits)


def test_a_forward_that_broke_off_poisons_its_cache(tiny_model, random_plan, token_ids, monkeypatch):
    """A cache whose layers stand at different lengths must not go on as if nothing had happened."""
    model = attach(tiny_model(), random_plan(model_shape(tiny_model()), 1))
    ids = token_ids(1, 30)
    cache = model(ids).cache

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moacompress.runtime.attention.sparse_attention", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, :1], cache=cache)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="middle of a forward"):
        model(ids[:, :1], cache=cache)


def test_batch_of_another_size_is_refused(tiny_model, random_plan, token_ids):
    model = attach(tiny_model(), random_plan(model_shape(tiny_model()), 1))
    cache = model(token_ids(2, 30)).cache
    with pytest.raises(UnsupportedError, match="2 rows, the input has 1"):
        model(token_ids(1, 1), cache=cache)

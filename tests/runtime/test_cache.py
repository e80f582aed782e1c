"""The cache holds what the plan says, to the block, at every length; memory is freed, shared, and never moved."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.windows import BLOCK
from moacompress.runtime import attach
from moacompress.runtime.cache.block_runs import LAG
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.cache.pool import LEAST_GROWTH, SLACK
from tests import plan_kinds
from tests.runtime.forwards import GREEDY, difference, in_parts, logits, plan_of


@pytest.fixture
def under(model, random_plan):
    """Makes a tiny Llama under a random plan, and returns the plan too."""

    def make(seed=3, **options):
        made = model(plan=lambda made: random_plan(model_shape(made), seed, **options))
        return made, plan_of(made)

    return make


def generated(model, ids, **given):
    """What `generate` returns, and the cache with it."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **GREEDY | given)


def test_blocks_are_the_plans_from_the_first_token_on(model, token_ids):
    made, ids = model("mistral", plan=1, sliding_window=24), token_ids(2, 40)
    found = in_parts(made, ids, [], PlanCache(plan_of(made)), plan=plan_of(made))
    assert difference(found, logits(made, ids, use_cache=False)) < 2e-5


@pytest.mark.parametrize("seed", range(2))
def test_memory_is_the_plans_where_the_length_is_known(seed, under, token_ids):
    """`generate` knows how long it may get: what it takes is the most that the plan needs on the way, and no more."""
    model, plan = under(seed)
    out = generated(model, token_ids(1, 100, seed), max_new_tokens=41)
    shape = plan.model
    most = sum(
        max(sum(rule.slots(n, plan.min_window) for rule in rules) for n in range(100, 141)) for rules in plan.rules
    )
    assert out.cache.get_seq_length() == 140
    assert out.cache.kv_bytes() == most * shape.token_bytes(Rule.FULL)
    slack = shape.layers * shape.kv_heads * BLOCK
    assert most * shape.token_bytes(Rule.FULL) <= plan.kv_bytes(140) + slack * shape.token_bytes(Rule.FULL)
    assert all(len(layer.held.pool.keys) == 1 for layer in out.cache.layers)


def test_memory_stays_within_the_stated_slack_where_it_is_not(under, token_ids):
    model, plan = under(2, full_share=0.3)
    cache, ids = PlanCache(plan), token_ids(1, 700)
    most = 0
    with torch.no_grad():
        for at in range(0, 700, 7):
            places = {t.data_ptr() for layer in cache.layers for t in layer.tensors}
            model(ids[:, at : at + 7], cache=cache, logits_to_keep=1)
            assert places <= {t.data_ptr() for layer in cache.layers for t in layer.tensors}, "growing moves nothing"
            for layer, rules in zip(cache.layers, plan.rules, strict=True):
                needed = sum(rule.slots(at + 7, plan.min_window) for rule in rules) // BLOCK
                most = max(most, needed)
                assert layer.blocks == needed
                assert len(layer.held.pool.refs) <= max(most * (1 + 1 / SLACK), most + LEAST_GROWTH)


def test_the_prompt_is_really_freed(model, token_ids):
    """No tensor anywhere in the process is as long as the prompt once a narrow plan has prefilled it."""
    made = model(plan=lambda made: Plan.uniform(model_shape(made), Rule(4, 32, 0)))
    with torch.no_grad():
        cache = made(token_ids(1, 777)).cache
    gc.collect()
    assert all(layer.blocks <= 2 * 4 for layer in cache.layers)
    leftovers = [o for o in gc.get_objects() if type(o) is torch.Tensor and 777 in o.shape and o.ndim == 4]
    assert not leftovers


@pytest.mark.parametrize("chunk", [None, 50])
def test_repeated_prompts_are_held_once(chunk, under, token_ids):
    """The rows that `generate` makes of one prompt share its blocks from the first forward on; other rows have their own."""
    model, plan = under(2, full_share=0.5)
    drawn = {"do_sample": True, "num_return_sequences": 3, "prefill_chunk_size": chunk}
    out = generated(model, token_ids(2, 150), max_new_tokens=1, **drawn)
    assert out.cache.batch_size == 6
    assert out.cache.used_bytes() == plan.kv_bytes(150, batch=2)
    tables = out.cache.layers[0].held.table.ids
    assert (tables[0] == tables[2]).all()
    assert not (tables[0] == tables[3]).all()


def test_rows_that_look_the_same_are_not_joined_unless_they_are(under, token_ids):
    """Rows with the last token, or all tokens, of another row but other keys have blocks of their own."""
    model, plan = under(2)
    ids = token_ids(1, 60).repeat(3, 1)
    ids[1, 5] += 1
    positions = torch.arange(60).repeat(3, 1)
    positions[2] += 7
    with torch.no_grad():
        cache = model(ids, position_ids=positions).cache
        assert cache.used_bytes() == plan.kv_bytes(60, batch=3)


def test_forks_share_blocks_and_give_them_back(under, token_ids):
    (model, _), ids = under(), token_ids(1, 220)
    with torch.no_grad():
        cache = model(ids[:, :150]).cache
        pools = [layer.held.pool for layer in cache.layers]
        held = [pool.refs.copy() for pool in pools]
        expected = model(ids[:, 150:200], cache=copy.deepcopy(cache)).logits
        again = model(ids[:, 150:200], cache=cache.fork()).logits
        assert torch.equal(again, expected)
        gc.collect()
        for pool, before in zip(pools, held, strict=True):
            assert (pool.refs[: len(before)] == before).all()
            assert not pool.refs[len(before) :].any()
        assert torch.equal(model(ids[:, 150:200], cache=cache).logits, expected)
    gone = weakref.ref(pools[0])
    del cache, pools
    gc.collect()
    assert gone() is None


def test_rolling_back_needs_a_record(tiny_model, token_ids):
    """But where nothing is evicted."""
    model = tiny_model()
    attach(model, Plan.full(model_shape(model)))
    ids = token_ids(1, 300)
    with torch.no_grad():
        expected = model(ids[:, :60], use_cache=False).logits[:, 30:]
        cache = model(ids[:, :100]).cache
        cache.crop(-70)
        assert (model(ids[:, 30:60], cache=cache).logits - expected).abs().max() < 1e-5
        plan = Plan.uniform(model_shape(model), Rule(4, 40, 0))
        attach(model, plan)
        cache = model(ids[:, :250]).cache
        with pytest.raises(UnsupportedError, match="cannot be rolled back by 40 tokens"):
            cache.crop(-40)
        recorded = PlanCache(plan)
        recorded.activate_past_recording()
        model(ids[:, :260], cache=recorded)
        with pytest.raises(UnsupportedError, match=f"the last {LAG} tokens"):
            recorded.crop(-LAG - 60)
        with pytest.raises(UnsupportedError, match=r"crop\(5\) is not possible"):
            recorded.crop(5)
        with pytest.raises(UnsupportedError, match=r"crop\(-500\) is not possible on a cache of 260 tokens"):
            recorded.crop(-500)


def test_what_gates_selected_is_remembered_of_few_lengths(model, token_ids):
    made, ids = model(plan=plan_kinds.gates), token_ids(1, 407)
    cache, at = PlanCache(plan_of(made)), 0
    cache.activate_past_recording()
    for size in (90, *[1] * 20, 127, *[1] * 10, 100, 60):
        in_parts(made, ids[:, at : at + size], [size], cache)
        at += size
        assert max(len(layer._held.past) for layer in cache.layers) <= 5


@pytest.mark.parametrize("kind", ["formats", "gates"])
def test_another_default_device_is_left_alone(kind, model, token_ids):
    made, ids, places = model(plan=plan_kinds.KINDS[kind]), token_ids(1, 40), torch.arange(40)[None]
    with torch.device("meta"):
        cache = PlanCache(plan_of(made))
        logits(made, ids[:, :39], cache=cache, position_ids=places[:, :39])
        found = logits(made, ids[:, 39:], cache=cache, position_ids=places[:, 39:])
    assert (found - logits(made, ids, use_cache=False)[:, 39:]).abs().max() < 1e-4


def test_a_pickled_cache_has_the_blocks_in_use_and_no_more(under, token_ids):
    """Each once however many rows name it; it shares nothing with the one it was."""
    (model, plan), ids = under(), token_ids(2, 100)
    cache = PlanCache(plan)
    with torch.no_grad():
        model(ids[:, :90], cache=cache)
        cache.batch_repeat_interleave(2)
        fork = cache.fork()
        model(ids.repeat_interleave(2, 0), cache=fork)  # what it writes is in the memory that is shared
        twin = pickle.loads(pickle.dumps(cache))
        assert twin.kv_bytes() == twin.used_bytes() == cache.used_bytes() < cache.kv_bytes()
        pools = [layer.held.pool for layer in twin.layers]
        del twin
        gc.collect()
        assert not any(pool.refs.any() for pool in pools)


@pytest.mark.heavy
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_pickled_cache_is_not_the_one_that_it_was_for_a_compiled_model(under, token_ids):
    (model, plan), ids = under(), token_ids(1, 62)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1:]
        cache = PlanCache(plan)
        compiled(ids[:, :60], cache=cache)
        twin = pickle.loads(pickle.dumps(cache))
        for one in (cache, twin):
            compiled(ids[:, 60:61], cache=one)
        for one in (twin, cache):
            assert (compiled(ids[:, 61:], cache=one).logits - expected).abs().max() < 1e-4


def test_an_empty_cache_is_pickled_too(under, token_ids):
    (model, plan), ids = under(), token_ids(1, 60)
    emptied = model(ids).cache
    emptied.reset()
    for cache in (PlanCache(plan, reserve=200), emptied):
        twin = pickle.loads(pickle.dumps(cache))
        with torch.no_grad():
            assert torch.equal(model(ids, cache=twin).logits, model(ids, cache=cache).logits)
        assert twin.kv_bytes() == cache.kv_bytes()


def test_rows_by_a_mask_and_emptying(under, token_ids):
    (model, _), ids = under(2), token_ids(3, 60)
    with torch.no_grad():
        cache = model(ids).cache
        cache.batch_select_indices(torch.tensor([True, False, True]))
        assert cache.batch_size == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.kv_bytes() == 0
    assert cache.batch_size == -1
    cache = model(ids).cache
    for _ in range(2):  # before a step and after one
        with pytest.raises(UnsupportedError, match="holds 3 rows, the input has 2"):
            model(ids[:2, :1], cache=cache)
        with torch.no_grad():
            model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("kind", [plan_kinds.formats, plan_kinds.gates])
def test_a_cache_of_inference_mode_goes_on_outside(kind, backend, model, token_ids, request, use_backend):
    if backend == "compiled":
        request.getfixturevalue("compiled_kernels")
    else:
        use_backend("reference")
    made, ids, found = model(plan=kind), token_ids(1, 131), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            cache = made(ids[:, :110]).cache
        found.append(in_parts(made, ids[:, 110:], [20], cache))
    assert torch.equal(*found)

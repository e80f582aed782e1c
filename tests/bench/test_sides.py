"""The sides: one set of weights, caches that hold the same and share nothing, and come back as they were."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moacompress.bench.bench_request import Cell
from moacompress.bench.sides import (
    STATIC,
    DecodeTurn,
    FilledPlanCache,
    PrefillTurn,
    filled_cache,
    overlapping_kv,
    random_ids,
)
from moacompress.runtime.compat.alternates import CACHE, cache_argument
from moacompress.runtime.hf.attaching import attached_plan
from tests.conftest import tiny_model
from tests.plan_kinds import random_plan

SIDES = ("plan", "full_span", "dense", STATIC)


def fill(side, models, plan, cell):
    model = models["dense" if side == STATIC else side]
    return model, filled_cache(side, model, plan, cell, 4, 7, "cpu")


def step(model, cache, cell, at=0):
    ids = random_ids((cell.batch, 1), 160, 3, "cpu")
    position = torch.full((cell.batch, 1), cell.length + at)
    with torch.no_grad():
        return model(input_ids=ids, position_ids=position, use_cache=True, **cache_argument(cache)).logits


def test_weights_are_there_once(models, checkpoint):
    pointers = [
        [tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())] for model in models.values()
    ]
    assert pointers[0] == pointers[1] == pointers[2]
    assert attached_plan(models["plan"]).key() == checkpoint.plan.key()
    assert all(rule.is_full for row in attached_plan(models["full_span"]).rules for rule in row)
    assert attached_plan(models["dense"]) is None
    assert models["dense"].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("side", SIDES[:3])
def test_a_prompts_last_state_is_multiplied_without_copies_of_weights(side, models):
    """PyTorch has a batched product in place of a plain one where weights are frozen, and copies them for it."""
    with Products(models[side].config.vocab_size) as products:
        PrefillTurn(models[side], random_ids((1, 40), 160, 3, "cpu"), "cpu").run()
    assert products.plain
    assert not products.with_the_head


class Products(TorchDispatchMode):
    """Counts plain products of matrices, and batched ones with the head."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.plain, self.with_the_head = vocabulary, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.plain += str(func) in ("aten.mm.default", "aten.addmm.default", "mkldnn._linear_pointwise.default")
        self.with_the_head += func is torch.ops.aten.bmm.default and self.vocabulary in args[1].shape
        return func(*args, **kwargs or {})


def test_dense_sides_say_the_same(models, checkpoint):
    """So the caches hold the same, and all three attend to all of it."""
    cell = Cell("float32", 200, 2)
    logits = []
    for side in SIDES[1:]:
        model, filled = fill(side, models, checkpoint.plan, cell)
        logits.append(step(model, filled.fresh(), cell))
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (logits[2] - logits[1]).abs().max() < 1e-4
    model, filled = fill("plan", models, checkpoint.plan, cell)
    assert (step(model, filled.fresh(), cell) - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("side", SIDES)
def test_a_cache_comes_back_as_it_was(side, models, checkpoint):
    cell = Cell("float32", 130, 2)
    model, filled = fill(side, models, checkpoint.plan, cell)
    found = []
    for _ in range(2):
        cache = filled.fresh()
        assert int(cache.get_seq_length()) == cell.length
        found.append(step(model, cache, cell))
        step(model, cache, cell, at=1)
        assert int(cache.get_seq_length()) == cell.length + 2
    assert torch.equal(*found)


@pytest.mark.parametrize(("dtype", "length", "batch"), [("float32", 100, 1), ("bfloat16", 512, 3)])
def test_bytes_are_the_plans(dtype, length, batch, models, checkpoint):
    cell, plan = Cell(dtype, length, batch), checkpoint.plan
    expected = plan.in_dtype(dtype).kv_bytes(length, batch)
    assert fill("plan", models, plan, cell)[1].kv_bytes() == expected
    exact = 2 * plan.model.layers * plan.model.kv_heads * plan.model.head_dim * length * batch
    assert fill("dense", models, plan, cell)[1].kv_bytes() == exact * (4 if dtype == "float32" else 2)


def test_what_gates_keep_is_there(checkpoint):
    plan, cell = checkpoint.plan, Cell("float32", 300, 2)
    rows = [[replace(rule, select_alpha=20, select_beta_q=64) for rule in row] for row in plan.rules]
    gated = replace(plan, rules=tuple(map(tuple, rows))).in_dtype("float32")
    filled = FilledPlanCache(gated, cell, 310, 0, "cpu")
    assert filled.kv_bytes() == gated.kv_bytes(300, 2) > plan.in_dtype("float32").kv_bytes(300, 2)


def test_rows_share_no_blocks(models, checkpoint):
    cell = Cell("float32", 256, 4)
    model, filled = fill("plan", models, checkpoint.plan, cell)
    turn = DecodeTurn(model, filled, random_ids((4, 4, 1), 160, 0, "cpu"), cell.length, "cpu")
    turn.prepare()
    for layer in turn._cache.layers:
        ids = layer.held.table.ids[layer.held.table.ids >= 0]
        assert len(ids) == len(np.unique(ids))
        keys = torch.cat([segment.flatten(1) for segment in layer.held.pool.keys])[np.unique(ids)]
        keys = keys[keys.ne(0).any(1)]  # memory that nothing was written to yet may be all zeros
        assert len(keys.unique(dim=0)) == len(keys)  # and no two hold the same


def test_rows_of_overlapping_keys_and_values_share_no_blocks(checkpoint):
    """Else a step would read the same memory for every row."""
    plan, cell = checkpoint.plan.in_dtype("float32"), Cell("float32", 512, 3)
    kv = overlapping_kv(plan.model, cell, 5, "cpu")
    keys = kv[0][0]
    assert keys.shape == (3, plan.model.kv_heads, 512, plan.model.head_dim)
    assert torch.equal(keys[1, :, :-1], keys[0, :, 1:])
    filled = FilledPlanCache(plan, cell, 520, 5, "cpu", kv)
    assert filled.kv_bytes() == plan.kv_bytes(512, 3)


@pytest.mark.parametrize("side", SIDES)
def test_turns_of_decoding_take_steps_from_the_cells_length_on(side, models, checkpoint):
    cell = Cell("float32", 96, 2)
    model, filled = fill(side, models, checkpoint.plan, cell)
    lengths = []

    def forward(**inputs):
        cache = inputs[CACHE]
        lengths.append((int(cache.get_seq_length()), int(inputs["position_ids"][0, 0])))
        return model(**inputs)

    turn = DecodeTurn(forward, filled, random_ids((4, 2, 1), 160, 0, "cpu"), cell.length, "cpu")
    for _ in range(2):
        turn.prepare()
        turn.run()
    assert lengths == [(n, n) for n in range(96, 100)] * 2


@pytest.mark.parametrize("side", SIDES[:3])
def test_turns_of_prefilling_begin_with_nothing(side, models):
    turn = PrefillTurn(models[side], random_ids((2, 80), 160, 0, "cpu"), "cpu")
    for _ in range(2):
        turn.prepare()
        assert turn._cache is None
        turn.run()
        assert turn._cache.get_seq_length() == 80


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox"])
def test_other_families(family):
    """Sliding windows of their own among them: a step from a filled cache is the same in every dense side."""
    from moacompress.bench.sides import make_models
    from moacompress.models.source import model_shape
    from moacompress.runtime import attach

    model = tiny_model(family)
    plan = random_plan(model_shape(model), 2)
    models = make_models(attach(model, plan), plan)
    cell = Cell("float32", 150, 2)
    found = []
    for side in SIDES[1:]:
        used, filled = fill(side, models, plan, cell)
        found.append(step(used, filled.fresh(), cell))
        assert int(filled.fresh().get_seq_length()) == cell.length
    assert max((logits - found[0]).abs().max() for logits in found) < 1e-3

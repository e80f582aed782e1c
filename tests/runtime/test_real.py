"""The runtime on SmolLM2-135M."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moacompress.models.source import model_shape
from moacompress.pipeline import measured_kv_bytes
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2).eval()


@pytest.fixture
def ids():
    return torch.randint(100, 40_000, (1, 300), generator=torch.Generator().manual_seed(0))


def test_full_span_equals_stock(model, ids):
    with torch.no_grad():
        stock = model(ids, use_cache=False, logits_to_keep=32).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
        attach(model, Plan.full(model_shape(model)))
        assert (model(ids, use_cache=False, logits_to_keep=32).logits - stock).abs().max() < 1e-3 * stock.abs().max()
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)
    detach(model)


def test_cached_equals_uncached_under_a_sparse_plan(model, ids, random_plan):
    attach(model, random_plan(model_shape(model), 1))
    with torch.no_grad():
        whole = model(ids, use_cache=False, logits_to_keep=8).logits
        cache = model(ids[:, :200], logits_to_keep=1).cache
        model(ids[:, 200:292], cache=cache, logits_to_keep=1)
        steps = [model(ids[:, at : at + 1], cache=cache).logits for at in range(292, 300)]
    detach(model)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-3 * whole.abs().max()


def test_padded_rows_beams_and_drafts(model, ids, random_plan):
    """A left-padded batch gives the logits of its rows alone; beams and drafts on it the tokens of runs without a cache."""
    attach(model, random_plan(model_shape(model), 2))
    rows = [ids[0, :200], ids[0, 120:255]]
    batch, mask = torch.zeros(2, 200, dtype=torch.long), torch.zeros(2, 200, dtype=torch.long)
    for number, row in enumerate(rows):
        batch[number, -len(row) :], mask[number, -len(row) :] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    kinds = {"attention_mask": mask[1:], "do_sample": False, "max_new_tokens": 6}
    with torch.no_grad():
        together = model(batch, attention_mask=mask, position_ids=positions, logits_to_keep=8).logits
        for number, row in enumerate(rows):
            alone = model(row[None], use_cache=False, logits_to_keep=8).logits[0]
            assert (together[number] - alone).abs().max() < 1e-3 * alone.abs().max()
        beams = model.generate(batch[1:], num_beams=2, **kinds)
        assert torch.equal(beams, model.generate(batch[1:], num_beams=2, use_cache=False, **kinds))
        drafted = model.generate(
            ids[:, :60].repeat(1, 3), prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=12
        )
        assert torch.equal(drafted, model.generate(ids[:, :60].repeat(1, 3), do_sample=False, max_new_tokens=12))
    detach(model)


def test_bytes_of_the_live_cache_are_the_plans(model, smollm2, tmp_path):
    shape = model_shape(model)
    rows = [(Rule(4, 0, 128), Rule(64, 96, 64), Rule(16, 256, 0))] * shape.layers
    plan = Plan(shape, 32, tuple(rows))
    attach(model, plan)
    model.save_pretrained(tmp_path)
    detach(model)
    assert measured_kv_bytes(tmp_path, 1024) == plan.kv_bytes(1024)
    assert plan.kv_bytes(1024) < 0.25 * shape.dense_kv_bytes(1024)

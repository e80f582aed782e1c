"""Generating with a compressed model, padded or not, gives what single rows and runs without a cache give."""

import pytest
import torch
from transformers import StoppingCriteriaList

from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach
from moacompress.runtime.cache import pool
from moacompress.runtime.compat.alternates import returned_cache
from tests.runtime.forwards import GREEDY, difference, plan_of

TOLERANCE = 1e-4


@pytest.fixture
def model(model):
    return model()


def padded(rows, side="left"):
    """Joins rows of unequal length to ids and mask."""
    joined = [
        torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_side=side)
        for each in (rows, [torch.ones_like(row) for row in rows])
    ]
    return joined[0], joined[1]


@pytest.fixture
def rows(token_ids):
    return [token_ids(1, size, seed=size)[0] for size in (70, 7, 41, 100)]


def test_a_forward_that_failed_early_leaves_the_cache_as_it_was(model, token_ids, monkeypatch):
    ids = token_ids(1, 40)
    positions = torch.arange(41)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
        cache = model(ids[:, :39], position_ids=positions[:, :39]).cache
        with monkeypatch.context() as patch:
            patch.setattr(model.model.embed_tokens, "forward", lambda ids: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, 39:], position_ids=positions[:, 39:40], attention_mask=torch.ones(1, 40), cache=cache)
        found = model(ids[:, 39:], position_ids=positions[:, 39:40], cache=cache).logits[:, -1]
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("side", "new", "beams", "chunk"),
    [("left", 25, 1, 13), ("left", 10, 3, None), ("right", 10, 1, 7), ("right", 10, 3, None)],
)
def test_padded_prompts(side, new, beams, chunk, model, rows):
    """With and without a cache the same; from a padded token generating continues, in a dense model too."""
    ids, mask = padded(rows, side)
    plan = plan_of(model)
    asked = {**GREEDY, "attention_mask": mask, "max_new_tokens": new, "num_beams": beams}
    uncached = model.generate(ids, use_cache=False, **asked)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **asked), uncached)
    stock = detach(model).generate(ids, prefill_chunk_size=chunk, **asked)
    attach(model, Plan.full(plan.model))
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **asked), stock)


def test_what_is_allowed_is_not_reserved(model, token_ids):
    """A server allows as many tokens as a client asks for, and stops at an end, or when it has enough."""
    ids, caches = token_ids(1, 100), []

    def stop(ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] >= 160, dtype=torch.bool)

    for most in (60, 10**9):
        asked = {**GREEDY, "max_new_tokens": most, "stopping_criteria": StoppingCriteriaList([stop])}
        out = model.generate(ids, return_dict_in_generate=True, **asked)
        caches.append((out.sequences, returned_cache(out)))
    assert torch.equal(caches[0][0], caches[1][0])
    few, many = (cache.kv_bytes() for _, cache in caches)
    a_token = many / (100 + pool.AT_ONCE)
    assert few < many < few + a_token * pool.AT_ONCE


def test_training_on_padded_rows(tiny_model, random_plan, rows):
    """Gradients of a padded batch are the sum of those of its rows, also with layers that are computed twice."""
    model = tiny_model(num_hidden_layers=2).requires_grad_(True)
    attach(model, random_plan(model_shape(model), 4))
    weights = list(model.parameters())

    def loss(ids, mask):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return (logits.logsumexp(-1) * mask).sum()

    expected = [torch.zeros_like(weight) for weight in weights]
    for row in rows:
        for total, part in zip(expected, torch.autograd.grad(loss(*padded([row])), weights), strict=True):
            total += part
    for twice in (False, True):
        if twice:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        found = torch.autograd.grad(loss(*padded(rows)), weights)
        assert all(difference(ours, theirs) < 1e-4 for ours, theirs in zip(found, expected, strict=True))

"""Generating with a compressed model, padded or not, gives what single rows and runs without a cache give."""

import pytest
import torch
from transformers import StoppingCriteriaList

from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach
from moacompress.runtime.cache import pool
from moacompress.runtime.compat.alternates import returned_cache

TOLERANCE = 1e-4
CLEAR = 1e-3
"""Difference of the two best logits beyond which tokens must agree: GEMMs of other shapes round differently."""


@pytest.fixture
def model(tiny_model, random_plan):
    model = tiny_model()
    return attach(model, random_plan(model_shape(model), 3))


def settings(**more):
    return {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}


def padded(rows, side="left", holes=0):
    """Joins rows of unequal length to ids and mask; `holes` pads are put into the middle of every row."""
    width = max(map(len, rows)) + holes
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        at = torch.arange(len(row))
        at[len(row) // 2 :] += holes
        at += width - len(row) - holes if side == "left" else 0
        ids[number, at], mask[number, at] = row, 1
    return ids, mask


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def assert_same_tokens(model, prompt, found, expected):
    """Tokens agree up to the first place where the two best logits of the reference are too near to tell."""
    if torch.equal(found, expected):
        return
    with torch.no_grad():
        logits = model(expected[None], use_cache=False).logits[0]
    for at in range(len(prompt), len(expected)):
        best = logits[at - 1].topk(2).values
        if best[0] - best[1] <= CLEAR:
            return
        assert found[at] == expected[at], f"token {at}"


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


def test_left_padded_greedy(model, rows):
    ids, mask = padded(rows)
    together = model.generate(ids, attention_mask=mask, prefill_chunk_size=13, **settings(max_new_tokens=25))
    for number, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings(max_new_tokens=25))[0]
        found = together[number][ids.shape[1] - len(row) :]
        assert_same_tokens(model, row, found, alone)


@pytest.mark.parametrize("kinds", [{"num_beams": 3}, {"prefill_chunk_size": 7}])
def test_prompts_that_end_in_padding(kinds, model, rows):
    """Generating continues from a padded token then, in a dense model too; with and without a cache the same."""
    ids, mask = padded(rows, "right")
    plan = model.config.quantization_config.plan
    kinds = settings(max_new_tokens=10, **kinds)
    if "prefill_chunk_size" not in kinds:
        uncached = model.generate(ids, attention_mask=mask, use_cache=False, **kinds)
        assert torch.equal(model.generate(ids, attention_mask=mask, **kinds), uncached)
    detach(model)
    stock = model.generate(ids, attention_mask=mask, **kinds)
    attach(model, Plan.full(plan.model))
    assert torch.equal(model.generate(ids, attention_mask=mask, **kinds), stock)


def test_what_is_allowed_is_not_reserved(model, token_ids):
    """A server allows as many tokens as a client asks for, and stops at an end, or when it has enough."""
    ids, caches = token_ids(1, 100), []

    def stop(ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] >= 160, dtype=torch.bool)

    for most in (60, 10**9):
        criteria = StoppingCriteriaList([stop])
        out = model.generate(
            ids,
            max_new_tokens=most,
            stopping_criteria=criteria,
            return_dict_in_generate=True,
            **settings(),
        )
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
        logits = model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits
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
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()

"""`torch.compile` takes a compressed model whole: no graph breaks, a few graphs for all lengths, and the same results."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.dispatch import backend_for
from moacompress.models.source import model_shape
from moacompress.runtime import attach
from moacompress.runtime.cache.plan_cache import PlanCache
from tests.conftest import TINY
from tests.plan_kinds import gated_plan

TOLERANCE = 1e-4
DIFFERENT = ("phi3", "gpt_neox", "gpt_oss")
"""Families whose layers are put together in ways of their own; the others are for `make test-all`."""


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(tiny_model, random_plan):
    model = tiny_model()
    return attach(model, random_plan(model_shape(model), 3))


def cache_of(model):
    return PlanCache(model.config.quantization_config.plan)


def logits_in_steps(forward, cache, ids, prompt, mask=None):
    """Feeds a prompt, then single tokens; returns the logits of all, `[rows, tokens, vocabulary]`."""
    found, begin = [], 0
    for end in (prompt, *range(prompt + 1, ids.shape[1] + 1)):
        given = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        found.append(forward(ids[:, begin:end], cache=cache, **given).logits)
        begin = end
    return torch.cat(found, 1)


def assert_no_breaks(model, ids, prompt, mask=None):
    """A prompt and single tokens, compiled and not, are the same and take three graphs at most."""
    counter = CompileCounter()
    with torch.no_grad():
        expected = logits_in_steps(model, cache_of(model), ids, prompt, mask)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        found = logits_in_steps(compiled, cache_of(model), ids, prompt, mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert (found - expected)[real].abs().max() < TOLERANCE
    assert counter.frame_count <= 3  # a prompt; one token; one token after any number of tokens


@pytest.mark.parametrize(
    "family", [family if family in DIFFERENT else pytest.param(family, marks=pytest.mark.heavy) for family in TINY]
)
def test_every_family_has_no_breaks(family, tiny_model, random_plan, token_ids):
    model = tiny_model(family)
    attach(model, random_plan(model_shape(model), 5))
    assert_no_breaks(model, token_ids(2, 96), 90)


def test_nor_have_gates(tiny_model, token_ids):
    model = tiny_model("gemma3_text")
    attach(model, gated_plan(model, 5))
    assert_no_breaks(model, token_ids(2, 96), 90)


def test_nor_has_padding(tiny_model, random_plan, token_ids):
    model = tiny_model("gemma3_text")
    attach(model, random_plan(model_shape(model), 5))
    ids = token_ids(2, 96)
    mask = torch.ones_like(ids)
    mask[0, :21] = 0
    assert_no_breaks(model, ids, 90, mask)


@pytest.mark.heavy
def test_compiled_code_says_the_same(model, token_ids):
    """By torch's own code generator, with caches of several lengths and batches: none needs graphs of its own."""
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows, tokens, prompt in ((2, 100, 96), (3, 40, 36)):
            ids = token_ids(rows, tokens, seed=tokens)
            expected = logits_in_steps(model, cache_of(model), ids, prompt)
            assert (logits_in_steps(compiled, cache_of(model), ids, prompt) - expected).abs().max() < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 2  # prompts; single tokens


def test_a_compiled_model_generates(model, token_ids):
    """With beams: the cache is reordered between the compiled steps."""
    ids = token_ids(1, 60)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12, "num_beams": 3}
    expected = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_gradients_through_a_compiled_model(model, token_ids):
    """Training without a cache and without padding is one graph too; with padding the attention stands between graphs."""
    ids, embedding = token_ids(2, 70), model.get_input_embeddings()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def gradient(forward, mask):
        fed = embedding(ids).requires_grad_(True)
        logits = forward(inputs_embeds=fed, attention_mask=mask, use_cache=False).logits
        return torch.autograd.grad((logits.logsumexp(-1) * (1 if mask is None else mask)).sum(), fed)[0]

    traced = backend_for(embedding.weight).capabilities.traced
    for given, whole in ((None, traced), (mask, False)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
        expected = gradient(model, given)
        assert (gradient(compiled, given) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_what_is_refused_is_refused_in_a_graph_too(model, token_ids):
    ids, cache = token_ids(2, 40), cache_of(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(ids, cache=cache, position_ids=torch.arange(40)[None])
        with pytest.raises(UnsupportedError, match="position_ids that do not count on"):
            compiled(ids[:, :1], cache=cache, position_ids=torch.zeros(1, 1, dtype=torch.long))
        taken_back = torch.ones(2, 41, dtype=torch.long)
        taken_back[0, 3] = 0
        with pytest.raises(UnsupportedError, match="says otherwise of tokens that are in the cache"):
            compiled(ids[:, :1], cache=cache, attention_mask=taken_back)
        packed = torch.arange(40).remainder(20)[None]
        with pytest.raises(UnsupportedError, match="position_ids that do not count on"):
            compiled(ids, position_ids=packed, use_cache=False)
        found = compiled(ids[:, :1], cache=cache).logits  # nothing that was refused has touched the cache
        whole = model(torch.cat((ids, ids[:, :1]), 1), use_cache=False).logits
    assert (found[:, 0] - whole[:, -1]).abs().max() < TOLERANCE
    assert np.array_equal(cache.layers[0].lengths, [41, 41])


def test_a_cache_is_not_made_in_a_graph(model, token_ids):
    """Without one, and without asking for none, a compiled forward makes it between two graphs."""
    ids = token_ids(1, 30)
    with torch.no_grad():
        out = torch.compile(model, backend="eager")(ids)
        assert isinstance(out.cache, PlanCache)
        assert (out.logits - model(ids, use_cache=False).logits).abs().max() < TOLERANCE
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cache=PlanCache\(plan\)"):
            torch.compile(model, backend="eager", fullgraph=True)(token_ids(1, 31))

"""`torch.compile` takes a compressed model whole: no graph breaks, a few graphs for all lengths, and the same results."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.dispatch import backend_for
from moacompress.runtime.cache.plan_cache import PlanCache
from tests.conftest import TINY
from tests.plan_kinds import gates
from tests.runtime.forwards import GREEDY, difference, in_parts, logits, plan_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
TOLERANCE = 1e-4
DIFFERENT = ("gpt_oss",)
"""A family whose layers are put together in a way of their own; the others are for `make test-all`."""


@pytest.fixture
def llama(model):
    return model()


def cache_of(model):
    return PlanCache(plan_of(model))


OF_FAMILIES = [
    pytest.param(family, 5, 0, marks=[] if family in DIFFERENT else [pytest.mark.heavy], id=family) for family in TINY
]


@pytest.mark.parametrize(
    ("family", "plan", "pads"),
    [
        *OF_FAMILIES,
        pytest.param("gemma3_text", gates, 0, id="gates"),
        pytest.param("gemma3_text", 5, 21, id="padding"),
    ],
)
def test_there_are_no_breaks(family, plan, pads, model, token_ids):
    """A prompt and single tokens, compiled and not, are the same and take three graphs at most."""
    made, ids, counter = model(family, plan=plan), token_ids(2, 96), CompileCounter()
    mask = None
    if pads:
        mask = torch.ones_like(ids)
        mask[0, :pads] = 0
    expected = in_parts(made, ids, [90], cache_of(made), mask)
    found = in_parts(torch.compile(made, backend=counter, fullgraph=True), ids, [90], cache_of(made), mask)
    assert (found - expected)[0, pads:].abs().max() < TOLERANCE
    assert (found - expected)[1].abs().max() < TOLERANCE
    assert counter.frame_count <= 3  # a prompt; one token; one token after any number of tokens


@pytest.mark.heavy
def test_compiled_code_says_the_same(llama, token_ids):
    """By torch's own code generator, with caches of several lengths and batches: none needs graphs of its own."""
    counters.clear()
    compiled = torch.compile(llama, fullgraph=True, dynamic=True)
    for rows, tokens, prompt in ((2, 100, 96), (3, 40, 36)):
        ids = token_ids(rows, tokens, seed=tokens)
        found, expected = (in_parts(run, ids, [prompt], cache_of(llama)) for run in (compiled, llama))
        assert (found - expected).abs().max() < TOLERANCE
    assert counters["stats"]["unique_graphs"] == 2  # prompts; single tokens


def test_a_compiled_model_generates(llama, token_ids):
    """With beams: the cache is reordered between the compiled steps."""
    ids, settings = token_ids(1, 60), {**GREEDY, "max_new_tokens": 12, "num_beams": 3}
    expected = llama.generate(ids, **settings)
    llama.forward = torch.compile(llama.forward, backend="eager", fullgraph=True)
    assert torch.equal(llama.generate(ids, **settings), expected)


@pytest.mark.heavy
def test_gradients_through_a_compiled_model(llama, token_ids):
    """Training without a cache and without padding is one graph too; with padding the attention stands between graphs."""
    ids, embedding = token_ids(2, 70), llama.get_input_embeddings()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def gradient(forward, mask):
        fed = embedding(ids).requires_grad_(True)
        logits = forward(inputs_embeds=fed, attention_mask=mask, use_cache=False).logits
        return torch.autograd.grad((logits.logsumexp(-1) * (1 if mask is None else mask)).sum(), fed)[0]

    traced = backend_for(embedding.weight).capabilities.traced
    for given, whole in ((None, traced), (mask, False)):
        torch._dynamo.reset()
        compiled = torch.compile(llama, backend="aot_eager", fullgraph=whole)
        assert difference(gradient(compiled, given), gradient(llama, given)) < 1e-4


def test_what_is_refused_is_refused_in_a_graph_too(llama, token_ids):
    ids, cache = token_ids(2, 40), cache_of(llama)
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
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
        whole = logits(llama, torch.cat((ids, ids[:, :1]), 1), use_cache=False)
    assert (found[:, 0] - whole[:, -1]).abs().max() < TOLERANCE
    assert np.array_equal(cache.layers[0].lengths, [41, 41])


def test_a_cache_is_not_made_in_a_graph(llama, token_ids):
    """Without one, and without asking for none, a compiled forward makes it between two graphs."""
    ids = token_ids(1, 30)
    with torch.no_grad():
        out = torch.compile(llama, backend="eager")(ids)
        assert isinstance(out.cache, PlanCache)
        assert (out.logits - logits(llama, ids, use_cache=False)).abs().max() < TOLERANCE
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cache=PlanCache\(plan\)"):
            torch.compile(llama, backend="eager", fullgraph=True)(token_ids(1, 31))

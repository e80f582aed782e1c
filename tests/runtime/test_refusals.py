"""What a compressed model cannot do raises one clear error and is never silently wrong."""

import pickle
import sys
from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.configuration_utils import GenerationMode

from moacompress.core.errors import UnsupportedError
from moacompress.models.source import model_shape
from moacompress.runtime import attach
from moacompress.runtime.compat.alternates import CACHE, returned_cache
from moacompress.runtime.compat.http_errors import RefusedRequest


@pytest.fixture
def model(model):
    return model(plan=1)


@pytest.fixture
def ids(token_ids):
    return token_ids(2, 20)


def refuses(match, call):
    with pytest.raises(UnsupportedError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def way(name):
    """A way of generating, asked for as `generate` does."""
    return lambda model, ids: model._prepare_cache_for_generation(
        model.generation_config, {}, GenerationMode(name), 1, 20
    )


def of_cache(name):
    return lambda model, ids: model.generate(ids, cache_implementation=name, max_new_tokens=2)


def positions(given):
    return lambda model, ids: model(ids, position_ids=given)


PACKED, COUNTED = torch.cat((torch.arange(12), torch.arange(8)))[None], torch.arange(20)[None]
REFUSED = [
    (r"shape \(2, 19\) and should have \(2, 20\)", lambda model, ids: model(ids, attention_mask=torch.ones(2, 19))),
    (r"should have \(2, 20\)", lambda model, ids: model(ids, attention_mask=torch.ones(1, 20))),
    (
        "20 tokens in the cache and 1 new ones",
        lambda model, ids: model(ids[:, :1], attention_mask=torch.ones(2, 1), cache=model(ids).cache),
    ),
    ("mask of shape", lambda model, ids: model(ids, attention_mask={"full_attention": torch.zeros(2, 1, 20, 20)})),
    *(
        (f"generating with {name} is not supported", way(name))
        for name in ("contrastive_search", "dola_generation", "group_beam_search", "constrained_beam_search")
    ),
    ("brings its own cache", of_cache("dynamic")),
    ("continuous batching", of_cache("paged")),
    ("continuous batching", lambda model, ids: model.init_continuous_batching()),
    ("continuous batching", lambda model, ids: model.continuous_batching_context_manager()),
    ("cannot use a DynamicCache", lambda model, ids: model(ids, cache=DynamicCache())),
    (
        "cannot use a StaticCache",
        lambda model, ids: model(ids, past_key_values=StaticCache(model.config, max_cache_len=64)),
    ),
    ("packed", lambda model, ids: model(ids, position_ids=PACKED, use_cache=False)),
    *(("packed", positions(given)) for given in (PACKED, COUNTED.flip(1), COUNTED.expand(3, 2, 20))),
    (
        "packed",
        lambda model, ids: model(
            ids[:, :1], position_ids=torch.tensor([[7]]), cache=model(ids, position_ids=COUNTED).cache
        ),
    ),
    ("output_attentions", lambda model, ids: model(ids, output_attentions=True)),
    (
        "no derivatives in forward mode",
        lambda model, ids: torch.func.jvp(
            lambda x: model(inputs_embeds=x).logits, *[(model.get_input_embeddings()(ids).detach(),)] * 2
        ),
    ),
]
"""Words of the refusal, and what is refused."""


@pytest.mark.parametrize(("words", "call"), REFUSED)
def test_what_is_refused(words, call, model, ids):
    refuses(words, lambda: call(model, ids))


def test_masks_that_change_their_mind(model, ids):
    cache, mask = model(ids).cache, torch.ones(2, 21)
    mask[1, 3] = 0
    refuses("says otherwise of tokens", lambda: model(ids[:, :1], attention_mask=mask, cache=cache))
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    cache = model(ids, attention_mask=padded).cache
    refuses("says otherwise of tokens", lambda: model(ids[:, :1], attention_mask=torch.ones(2, 21), cache=cache))
    assert model(ids[:, :1], cache=cache).logits.shape == (2, 1, 160)


def test_a_cache_implementation_of_the_model_itself(model, ids):
    model.generation_config.cache_implementation = "static"
    refuses("set model.generation_config.cache_implementation to None", lambda: model.generate(ids, max_new_tokens=2))
    model.generation_config.cache_implementation = None
    model.generate(ids, max_new_tokens=2)


def test_drafts_on_a_cache_of_an_earlier_turn(model, ids):
    row = ids[:1]
    first = model.generate(row, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    again = torch.cat((first.sequences, row), 1)
    given = {CACHE: returned_cache(first), "max_new_tokens": 4, "do_sample": False}
    refuses("leave the cache out", lambda: model.generate(again, prompt_lookup_num_tokens=3, **given))
    expected = model.generate(again, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(again, **given), expected)


def test_a_web_server_hands_refusals_to_its_client(model, monkeypatch):
    exceptions = pytest.importorskip("starlette.exceptions")
    with pytest.raises(RefusedRequest) as caught:
        model.init_continuous_batching()
    assert isinstance(caught.value, exceptions.HTTPException)
    assert (caught.value.status_code, caught.value.detail) == (501, str(caught.value))
    assert not set('"\\\n') & set(str(caught.value))  # a stream puts it into JSON as it is
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (type(copied), str(copied)) == (RefusedRequest, str(caught.value))
    monkeypatch.delitem(sys.modules, "starlette.exceptions")
    with pytest.raises(UnsupportedError) as caught:
        model.init_continuous_batching()
    assert type(caught.value) is RefusedRequest


def test_cache_of_another_plan(model, ids, tiny_model, random_plan):
    other = tiny_model()
    cache = attach(other, random_plan(model_shape(other), 2))(ids).cache
    refuses("another plan", lambda: model(ids[:, :1], cache=cache))


def test_positions_that_stand_in_the_cache_already(model, ids):
    """A forward that is given none counts them itself, so they are known all the same."""
    cache = model(ids).cache
    for again in (COUNTED, COUNTED[:, :1]):
        call = partial(model, ids[:, : again.shape[1]], position_ids=again, cache=cache)
        refuses("tokens that the cache has already", call)
    model(ids[:, :1], cache=cache)
    model(ids, position_ids=torch.arange(21, 41)[None], cache=cache)
    elsewhere = model(ids, position_ids=torch.arange(5, 25)[None]).cache
    model(ids, cache=elsewhere)  # which jumps back to 20, as it does without a plan; where it is now is not known
    model(ids, position_ids=torch.arange(90, 110)[None], cache=elsewhere)


def test_another_dtype_behind_a_cache(model, ids):
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(ids).cache
        for more in (ids, ids[:, :1]):
            refuses("in bfloat16, and this forward makes them in float32", lambda more=more: model(more, cache=cache))
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, cache=cache)


@pytest.mark.usefixtures("compiled_kernels")
def test_gradients_of_gradients(model, ids):
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, use_cache=False).logits.square().sum()
    (found,) = torch.autograd.grad(loss, embedded, create_graph=True)
    refuses("no gradients of gradients", lambda: torch.autograd.grad(found.square().sum(), embedded))


def test_not_causal(model, ids):
    model.config.is_causal = False
    refuses("is_causal=False", lambda: model(ids))


def test_attention_dropout(tiny_model, random_plan, ids):
    model = tiny_model(attention_dropout=0.1)
    attach(model, random_plan(model_shape(model), 1)).train()
    refuses("dropout", lambda: model(ids, use_cache=False))
    model.eval()(ids)


def test_overlaid_masks(tiny_model, random_plan, ids):
    model = tiny_model("gemma3_text")
    attach(model, random_plan(model_shape(model), 1))
    model(ids)
    model.config.use_bidirectional_attention = True
    refuses("stock causal", lambda: model(ids))

"""What a compressed model cannot do raises one clear error and is never silently wrong."""

import pickle
import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.configuration_utils import GenerationMode

from moacompress.core.errors import UnsupportedError
from moacompress.models.source import model_shape
from moacompress.runtime import attach
from moacompress.runtime.compat.alternates import CACHE, returned_cache


@pytest.fixture
def model(tiny_model, random_plan):
    model = tiny_model()
    return attach(model, random_plan(model_shape(model), 1))


@pytest.fixture
def ids(token_ids):
    return token_ids(2, 20)


def refuses(match, call):
    with pytest.raises(UnsupportedError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_masks_that_do_not_fit(model, ids):
    refuses(r"shape \(2, 19\) and should have \(2, 20\)", lambda: model(ids, attention_mask=torch.ones(2, 19)))
    refuses(r"should have \(2, 20\)", lambda: model(ids, attention_mask=torch.ones(1, 20)))
    cache = model(ids).cache
    step, match = ids[:, :1], "20 tokens in the cache and 1 new ones"
    refuses(match, lambda: model(step, attention_mask=torch.ones(2, 1), cache=cache))


def test_masks_that_change_their_mind(model, ids):
    cache, mask = model(ids).cache, torch.ones(2, 21)
    mask[1, 3] = 0
    refuses("says otherwise of tokens", lambda: model(ids[:, :1], attention_mask=mask, cache=cache))
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    cache = model(ids, attention_mask=padded).cache
    refuses("says otherwise of tokens", lambda: model(ids[:, :1], attention_mask=torch.ones(2, 21), cache=cache))
    assert model(ids[:, :1], cache=cache).logits.shape == (2, 1, 160)


@pytest.mark.parametrize(
    "mode", ["contrastive_search", "dola_generation", "group_beam_search", "constrained_beam_search"]
)
def test_other_ways_of_generating(mode, model):
    config = model.generation_config
    refuses(
        f"generating with {mode} is not supported",
        lambda: model._prepare_cache_for_generation(config, {}, GenerationMode(mode), 1, 20),
    )


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized", "dynamic", "offloaded_static"])
def test_other_cache_implementations(kind, model, ids):
    refuses("brings its own cache", lambda: model.generate(ids, cache_implementation=kind, max_new_tokens=2))


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


def test_paged_and_continuous_batching(model, ids):
    match = "continuous batching"
    refuses(match, lambda: model.generate(ids, cache_implementation="paged", max_new_tokens=2))
    refuses(match, lambda: model.generate_batch(inputs=ids.tolist()))
    refuses(match, lambda: model.init_continuous_batching())
    refuses(match, lambda: model.continuous_batching_context_manager())


def test_a_web_server_hands_refusals_to_its_client(model, monkeypatch):
    exceptions = pytest.importorskip("starlette.exceptions")
    with pytest.raises(UnsupportedError) as caught:
        model.init_continuous_batching()
    assert isinstance(caught.value, exceptions.HTTPException)
    assert (caught.value.status_code, caught.value.detail) == (501, str(caught.value))
    assert not set('"\\\n') & set(str(caught.value))  # a stream puts it into JSON as it is
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (type(copied), str(copied)) == (UnsupportedError, str(caught.value))
    monkeypatch.delitem(sys.modules, "starlette.exceptions")
    with pytest.raises(UnsupportedError) as caught:
        model.init_continuous_batching()
    assert type(caught.value) is UnsupportedError


def test_other_cache_objects(model, ids):
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        match = f"cannot use a {type(cache).__name__}"
        refuses(match, lambda cache=cache: model(ids, cache=cache))
        refuses(match, lambda cache=cache: model(ids, past_key_values=cache))
        refuses(match, lambda cache=cache: model.generate(ids, cache=cache, max_new_tokens=2))


def test_cache_of_another_plan(model, ids, tiny_model, random_plan):
    other = tiny_model()
    attach(other, random_plan(model_shape(other), 2))
    cache = other(ids).cache
    refuses("another plan", lambda: model(ids[:, :1], cache=cache))


def test_packed_sequences(model, ids):
    restart = torch.cat((torch.arange(12), torch.arange(8)))[None]
    refuses("packed", lambda: model(ids, position_ids=restart, use_cache=False))
    refuses("packed", lambda: model(ids, position_ids=restart))
    backwards = torch.arange(20).flip(0)[None]
    refuses("packed", lambda: model(ids, position_ids=backwards))
    cache = model(ids, position_ids=torch.arange(20)[None]).cache
    refuses("packed", lambda: model(ids[:, :1], position_ids=torch.tensor([[7]]), cache=cache))
    refuses("packed", lambda: model(ids, position_ids=torch.arange(20).expand(3, 2, 20)))
    bounds = torch.tensor([0, 12, 20], dtype=torch.int32)
    refuses("packed", lambda: model(ids, use_cache=False, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds))


def test_positions_that_stand_in_the_cache_already(model, ids):
    """A forward that is given none counts them itself, so they are known all the same."""
    cache = model(ids).cache
    refuses("tokens that the cache has already", lambda: model(ids, position_ids=torch.arange(20)[None], cache=cache))
    refuses(
        "tokens that the cache has already", lambda: model(ids[:, :1], position_ids=torch.tensor([[0]]), cache=cache)
    )
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


def test_derivatives_in_forward_mode(model, ids):
    def logits(x):
        return model(inputs_embeds=x, use_cache=False).logits

    embedded = model.get_input_embeddings()(ids).detach()
    refuses("no derivatives in forward mode", lambda: torch.func.jvp(logits, (embedded,), (embedded,)))


def test_masks_that_are_not_two_dimensional(model, ids):
    mask = torch.zeros(2, 1, 20, 20)
    refuses("mask of shape", lambda: model(ids, attention_mask=mask))
    refuses("mask of shape", lambda: model(ids, attention_mask={"full_attention": mask}))


def test_not_causal(model, ids):
    refuses("is_causal=False", lambda: model(ids, is_causal=False))
    model.config.is_causal = False
    refuses("is_causal=False", lambda: model(ids))


def test_attention_weights(model, ids):
    refuses("output_attentions", lambda: model(ids, output_attentions=True))
    refuses("output_attentions", lambda: model.generate(ids, output_attentions=True, return_dict_in_generate=True))


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

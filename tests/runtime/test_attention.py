"""A model under a plan computes what a dense model with the explicit mask computes, whichever way it is run."""

import pytest
import torch

from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS, Rule
from moacompress.runtime import attach, detach
from moacompress.runtime.cache.plan_cache import PlanCache

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt_oss")
TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_full_span_equals_stock(family, tiny_model, token_ids):
    model = tiny_model(family, initializer_range=0.02)
    ids = token_ids(2, 90)
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
        tokens = model.generate(ids[:, :50], attention_mask=torch.ones(2, 50), max_new_tokens=20, do_sample=False)
        attach(model, Plan.full(model_shape(model)))
        assert (model(ids, use_cache=False).logits - stock).abs().max() < 1e-5
        assert (model(ids).logits - stock).abs().max() < 1e-5
        ours = model.generate(ids[:, :50], attention_mask=torch.ones(2, 50), max_new_tokens=20, do_sample=False)
        assert torch.equal(ours, tokens)
        detach(model)
        assert torch.equal(model(ids, use_cache=False).logits, stock)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_sparse_equals_explicit_mask(family, seed, tiny_model, random_plan, explicit_logits, token_ids):
    model = tiny_model(family)
    plan = random_plan(model_shape(model), seed)
    ids = token_ids(2, 140, seed)
    expected = explicit_logits(model, plan, ids)
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
        assert (expected - stock).abs().max() > 100 * TOLERANCE, "the plan must change the model, or this shows nothing"
        attach(model, plan)
        assert (model(ids, use_cache=False).logits - expected).abs().max() < TOLERANCE
        assert (_in_pieces(model, ids, [70, 1, 1, 1, 17, 1, 49]) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("native", [1, 8, 24])
def test_native_windows_shorter_than_the_sinks(native, tiny_model, random_plan, explicit_logits, token_ids):
    model = tiny_model("mistral", sliding_window=native)
    plan = random_plan(model_shape(model), native)
    ids = token_ids(1, 100)
    expected = explicit_logits(model, plan, ids)
    attach(model, plan)
    with torch.no_grad():
        assert (model(ids, use_cache=False).logits - expected).abs().max() < TOLERANCE
        assert (_in_pieces(model, ids, [50, 1, 48, 1]) - expected).abs().max() < TOLERANCE


def _in_pieces(model, ids, sizes):
    """Runs the model with its cache over chunks of the given sizes."""
    assert sum(sizes) == ids.shape[1]
    cache, outs, at = None, [], 0
    for size in sizes:
        out = model(ids[:, at : at + size], cache=cache, use_cache=True)
        cache, at = out.cache, at + size
        outs.append(out.logits)
    return torch.cat(outs, 1)


EDGE_LENGTHS = sorted({1, 2, *(n for sink in SINKS for n in (sink - 1, sink, sink + 1)), 15, 33, 100, 200})


@pytest.mark.parametrize(
    "rule", [Rule(4, 0, 0), Rule(16, 40, 0), Rule(64, 0, 300), Rule(4, 20, 700), Rule(64, 100, 1023)]
)
def test_every_length_around_sinks_and_windows(rule, tiny_model, explicit_logits, token_ids):
    model = tiny_model("llama", num_hidden_layers=2)
    shape = model_shape(model)
    plan = Plan(shape, 16, ((rule, Rule(16, 7, 100)), (Rule.FULL, rule)))
    ids = token_ids(1, max(EDGE_LENGTHS))
    for n in EDGE_LENGTHS:
        expected = explicit_logits(model, plan, ids[:, :n])
        attach(model, plan)
        with torch.no_grad():
            assert (model(ids[:, :n], use_cache=False).logits - expected).abs().max() < TOLERANCE
            half = n // 2
            sizes = [half, *[1] * (n - half)] if half else [1] * n
            assert (_in_pieces(model, ids[:, :n], sizes) - expected).abs().max() < TOLERANCE
        detach(model)


def test_windows_count_from_the_tokens_so_far_not_from_the_prompt(tiny_model, random_plan, token_ids):
    """Generating in two turns on one cache gives what one turn gives: nothing depends on where the prompt ended."""
    model = tiny_model()
    attach(model, random_plan(model_shape(model), 5))
    ids = token_ids(1, 120)
    kept = {
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    whole = model.generate(ids, **kept)
    first = model.generate(ids[:, :50], **{**kept, "max_new_tokens": 1})
    again = model.generate(ids, cache=first.cache, **kept)
    assert torch.equal(whole.sequences, again.sequences)
    assert again.cache.get_seq_length() == 131
    third = torch.cat((again.sequences, ids[:, :30]), 1)
    more = model.generate(third, cache=again.cache, **kept)
    assert torch.equal(more.sequences, model.generate(third, **kept).sequences)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 100, 1000])
def test_chunked_prefill(chunk, tiny_model, random_plan, token_ids):
    """Chunks shorter and longer than the windows give the tokens of an unchunked prefill."""
    model = tiny_model()
    attach(model, random_plan(model_shape(model), 2, full_share=0))
    ids = token_ids(2, 150)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **settings), model.generate(ids, **settings))


def test_sampling_is_that_of_the_explicit_mask(tiny_model, random_plan, explicit_logits, token_ids):
    model = tiny_model()
    plan = random_plan(model_shape(model), 1)
    ids = token_ids(1, 60)
    attach(model, plan)
    torch.manual_seed(7)
    out = model.generate(
        ids, max_new_tokens=15, do_sample=True, temperature=0.7, top_k=0, num_return_sequences=3, eos_token_id=None
    )
    detach(model)
    torch.manual_seed(7)
    rows = ids.repeat(3, 1)
    for _ in range(15):
        logits = explicit_logits(model, plan, rows)[:, -1] / 0.7
        rows = torch.cat((rows, torch.multinomial(logits.softmax(-1), 1)), 1)
    assert torch.equal(out, rows)


def test_batch_equals_single(tiny_model, random_plan, token_ids):
    model = tiny_model()
    attach(model, random_plan(model_shape(model), 3))
    ids = token_ids(3, 100)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    alone = [model.generate(row[None], attention_mask=torch.ones(1, 100), **settings)[0] for row in ids]
    assert torch.equal(together, torch.stack(alone))


def test_inputs_embeds_and_positional_arguments(tiny_model, random_plan, token_ids):
    model = tiny_model()
    attach(model, random_plan(model_shape(model), 3))
    ids = token_ids(1, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds, use_cache=False).logits, expected)
        assert torch.equal(model.lm_head(model.model(ids, torch.ones_like(ids), use_cache=False)[0]), expected)


def test_bfloat16_stays_close_to_float32(tiny_model, random_plan, token_ids):
    model = tiny_model(initializer_range=0.05)
    plan = random_plan(model_shape(model), 3)
    ids = token_ids(1, 100)
    with torch.no_grad():
        expected = attach(model, plan)(ids).logits
        half = model.to(torch.bfloat16)
        found = half(ids)
    assert found.cache.kv_bytes() == plan.kv_bytes(100) // 2
    assert (found.logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_gradients_are_those_of_the_explicit_mask(tiny_model, random_plan, explicit_logits, token_ids):
    """Fine-tuning goes through the attention: every weight gets the gradient that the explicit mask gives."""
    model = tiny_model(num_hidden_layers=2).requires_grad_(True)
    plan = random_plan(model_shape(model), 4)
    ids = token_ids(1, 80)
    pull = torch.randn(1, 80, 160, generator=torch.Generator().manual_seed(1))
    weights = list(model.parameters())
    expected = torch.autograd.grad((explicit_logits(model, plan, ids) * pull).sum(), weights)
    attach(model, plan)
    found = torch.autograd.grad((model(ids, use_cache=False).logits * pull).sum(), weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_cache_is_made_only_when_wanted(tiny_model, random_plan, token_ids):
    model = attach(tiny_model(), random_plan(model_shape(tiny_model()), 3))
    ids = token_ids(1, 20)
    assert isinstance(model(ids).cache, PlanCache)
    assert model(ids, use_cache=False).cache is None
    model.config.use_cache = False
    assert model(ids).cache is None


@pytest.mark.parametrize("backend", [None, "reference", "counting"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_first_chunk_of_padding_alone(tokens, backend, tiny_model, random_plan, use_backend):
    """Left-padded input that is fed in pieces: the rows have no token yet, and the next piece is as without the padding."""
    if backend is not None:
        use_backend(backend)
    model = tiny_model("llama")
    attach(model, random_plan(model_shape(model), 3))
    ids = torch.randint(3, 150, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[:, :tokens] = 0
    with torch.no_grad():
        cache = model(ids[:, :tokens], attention_mask=mask[:, :tokens], use_cache=True).cache
        found = model(ids[:, tokens:], attention_mask=mask, cache=cache).logits
        expected = model(ids[:, tokens:]).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_gradients_of_one_projection_alone(trained, tiny_model, random_plan):
    """Rows that end in padding, no cache: as in float64, which plain PyTorch computes."""
    ids = torch.randint(3, 150, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 30:] = 0
    found = []
    for dtype in (torch.float32, torch.float64):
        model = tiny_model("llama").to(dtype)
        attach(model, random_plan(model_shape(model), 3))
        weights = [getattr(layer.self_attn, trained).weight.requires_grad_() for layer in model.model.layers]
        model(ids, attention_mask=mask, use_cache=False).logits.square().sum().backward()
        found.append([weight.grad.double() for weight in weights])
    for mine, exact in zip(*found, strict=True):
        assert exact.abs().max() > 0
        assert (mine - exact).abs().max() < 1e-4 * exact.abs().max()

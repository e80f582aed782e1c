"""Models with weights in blocks go by the same routes as dense ones, and compute what these do with the same numbers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from moacompress.core.errors import UnsupportedError
from moacompress.models.fingerprint import weights_fingerprint
from moacompress.rules.share import Share
from moacompress.runtime import PlanCache, attach, detach
from tests import plan_kinds
from tests.runtime.forwards import difference, in_parts, logits
from tests.runtime.test_routes import WITHOUT
from tests.weight_blocks import put_random_blocks

TYPES = {
    "q_proj": "Q4_1",
    "k_proj": "Q4_0",
    "v_proj": "Q5_0",
    "o_proj": "Q8_0",
    "gate_proj": "Q4_1",
    "down_proj": "Q8_0",
    "embed_tokens": "Q8_0",
    "lm_head": "Q8_0",
}
"""What is left out stays dense: a layer may mix."""
LAYERS = 3


@pytest.fixture
def twins(tiny_model):
    """A tiny model with blocks and its dense copy."""

    def make(family="llama", dtype=torch.float32, **config):
        blocks = tiny_model(family, num_hidden_layers=LAYERS, **config).to(dtype)
        return blocks, put_random_blocks(blocks, TYPES)

    return make


@pytest.mark.usefixtures("compiled_kernels")
def test_every_route(twins, steps, monkeypatch):
    blocks, dense = twins("qwen2")
    plan = plan_kinds.windows(dense)
    attach(blocks, plan)
    expected = steps(attach(dense, plan), 2, 12)
    for name, without in WITHOUT.items():
        without(monkeypatch)
        assert difference(steps(blocks, 2, 12), expected) < 3e-5
        cache = PlanCache(plan)
        in_parts(blocks, torch.zeros(2, 41, dtype=torch.long), [40], cache)
        assert cache.step_routes == {name: LAYERS}


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("plain", [0, LAYERS - 1])
def test_a_layer_of_plain_numbers_among_others_in_blocks(plain, twins, steps):
    blocks, dense = twins()
    for name, module in dense.model.layers[plain].named_modules():
        if isinstance(module, torch.nn.Linear):
            blocks.model.layers[plain].set_submodule(name, copy.deepcopy(module))
    plan = plan_kinds.windows(dense)
    assert difference(steps(attach(blocks, plan), 2, 6), steps(attach(dense, plan), 2, 6)) < 3e-5


def shares(model):
    return plan_kinds.with_shares(plan_kinds.windows(model), (None, Share(0, (1, 0)), Share(0, (0, 1))))


@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("gemma3_text", plan_kinds.windows, torch.float32),
        ("qwen3", plan_kinds.formats, torch.float32),
        ("gemma3_text", plan_kinds.gates, torch.float32),
        ("llama", shares, torch.float32),
        ("llama", plan_kinds.full, torch.bfloat16),
        ("llama", plan_kinds.windows, torch.float16),
    ],
)
def test_prompts_and_steps_under_every_kind_of_plan(family, kind, dtype, twins, steps):
    blocks, dense = twins(family, dtype)
    plan, near = kind(dense), 5e-5 if dtype == torch.float32 else 0.06
    assert dtype != torch.float32 or weights_fingerprint(blocks) == weights_fingerprint(dense)
    found, expected = steps(attach(blocks, plan), 3, 6), steps(attach(dense, plan), 3, 6)
    assert found.dtype == dtype
    assert difference(found, expected) < near
    if kind is shares:
        assert blocks.model.layers[1].self_attn.q_proj.weight.shape == (0, 40)
    ids = torch.arange(90)[None] % 150
    assert difference(detach(blocks)(ids).logits, detach(dense)(ids).logits) < near


@pytest.mark.heavy
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model(twins, token_ids):
    blocks, dense = twins()
    plan = plan_kinds.windows(dense)
    attach(blocks, plan)
    ids = token_ids(2, 60)
    compiled = torch.compile(blocks, backend="eager", fullgraph=True, dynamic=True)
    found = in_parts(compiled, ids, (50, 1, 1, 8), PlanCache(plan))
    assert difference(found, logits(attach(dense, plan), ids)) < 5e-5


def test_gradients_of_inputs(twins):
    blocks, dense = twins()
    for model in (blocks, dense):
        attach(model, plan_kinds.windows(dense))
    embedded = blocks.model.embed_tokens(torch.arange(60)[None])
    found = []
    for model in (blocks, dense):
        x = embedded.clone().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
        found.append(x.grad)
    assert difference(*found) < 1e-4


def test_gradients_of_gradients_of_a_layer(twins):
    blocks, dense = twins()
    x, found = torch.randn(12, dense.config.hidden_size), []
    for model in (blocks, dense):
        given = x.clone().requires_grad_()
        made = model.model.layers[0].mlp(given).square().sum()
        (first,) = torch.autograd.grad(made, given, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), given)[0])
    assert found[0].abs().max() > 1e-3
    assert difference(*found) < 1e-3


def test_what_would_change_constants_is_refused(twins, token_ids, tmp_path):
    """torch speaks of dtypes that can require gradients, and of kernels for bytes, and transformers of sizes."""
    blocks, dense = twins()
    plan = plan_kinds.windows(dense)
    attach(blocks, plan).save_pretrained(tmp_path)
    for model in (blocks, AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(blocks)):
        with pytest.raises(
            UnsupportedError, match=r"weights are in blocks, such as model.embed_tokens in Q8_0, and cannot get grad"
        ):
            model.requires_grad_()
        with pytest.raises(UnsupportedError, match=r"cannot be given rows for 300 tokens \(resize_token_embeddings\)"):
            model.resize_token_embeddings(300)
        assert model.requires_grad_(False) is model
        assert model(token_ids(1, 20)).logits.shape[1] == 20
    attach(dense, plan)
    assert dense.requires_grad_() is dense
    assert dense.resize_token_embeddings(300).weight.shape[0] == 300


def test_adapters_train_on_blocks_as_on_numbers_and_are_not_merged(twins, token_ids):
    peft = pytest.importorskip("peft")
    blocks, dense = twins()
    plan, ids, found = plan_kinds.windows(dense), token_ids(1, 60), []
    before = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}
    for model in (blocks, dense):
        torch.manual_seed(0)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        adapted = peft.get_peft_model(attach(model, plan), lora)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(3):
            adapted(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        found.append(adapted.eval()(ids).logits)
        if model is blocks:
            refusal = r"cannot be merged into a weight in .* blocks: .*`moacompress heal`"
            for merge in (
                adapted.merge_and_unload,
                adapted.merge_adapter,
                partial(adapted.merge_adapter, safe_merge=True),
            ):
                with pytest.raises(UnsupportedError, match=refusal):
                    merge()
            with pytest.raises(UnsupportedError, match=refusal):
                copy.deepcopy(adapted).merge_and_unload()
            own = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
            assert all(torch.equal(own[name], tensor) for name, tensor in before.items())
    assert difference(*(each.detach() for each in found)) < 1e-4

"""Layers that share attention, against stock models whose attention is written from the definition."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.reference.rounding import rounded
from moacompress.models.modules import attention_modules
from moacompress.models.source import model_shape
from moacompress.rules.formats import FORMATS
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share, with_shared_rules
from moacompress.runtime import attach, detach
from moacompress.runtime.cache.plan_cache import PlanCache
from tests.runtime.conftest import attended, explicit_mask

FIVE = {"layer_types": [*["sliding_attention", "full_attention"] * 2, "sliding_attention"]}
LAYERS = {"gemma3_text": FIVE, "cohere2": FIVE}
"""What the tiny configs of some families need for five layers."""


def shares_of(shape: Any, seed: int) -> tuple[Share | None, ...]:
    """Returns shares at random: about half of the layers, and at least one, share with an earlier one like them."""
    draw = random.Random(seed)
    shares: list[Share | None] = []
    for layer, native in enumerate(shape.native_windows):
        anchors = [
            earlier for earlier in range(layer) if shares[earlier] is None and shape.native_windows[earlier] == native
        ]
        last = layer == shape.layers - 1 and not any(shares)
        if not anchors or not (last or draw.random() < 0.6):
            shares.append(None)
            continue
        heads = tuple(draw.randrange(shape.kv_heads) for _ in range(shape.kv_heads))
        shares.append(Share(draw.choice(anchors), heads))
    return tuple(shares)


def with_shares(plan: Plan, shares: tuple[Share | None, ...]) -> Plan:
    """Returns a plan whose layers share."""
    return Plan(plan.model, plan.min_window, with_shared_rules(plan.rules, shares), shares=shares)


class Oracle:
    """Attention by explicit masks that keeps what anchors attended with, for the layers that share it."""

    def __init__(self, plan: Plan, n: int) -> None:
        self.plan = plan
        self.seen: dict[int, tuple[Any, Any, Any]] = {}
        self.masks = [explicit_mask(plan, layer, n) for layer in range(plan.model.layers)]

    def __call__(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: Any = None,
        softcap: Any = None,
        **kw: Any,
    ) -> tuple[torch.Tensor, None]:
        layer, sinks = module.layer_idx, kw.get("s_aux")
        share, rules, group = self.plan.share(layer), self.plan.rules[layer], query.shape[1] // key.shape[1]
        self.seen[layer] = query, key, sinks
        if share is not None:
            its_query, its_key, its_sinks = self.seen[share.anchor]
            key = its_key[:, list(share.head_map)]
            heads = [of * group + g for of in share.head_map for g in range(group)]
            query, sinks = its_query[:, heads], None if its_sinks is None else its_sinks[heads]
        key = rounded(key, [FORMATS[rule.key_format].code for rule in rules]).to(query.dtype)
        value = rounded(value, [FORMATS[rule.value_format].code for rule in rules]).to(query.dtype)
        return attended(query, key, value, self.masks[layer], scaling, softcap, sinks), None


@contextmanager
def by_definition(model: PreTrainedModel, plan: Plan, n: int) -> Iterator[None]:
    """Makes a dense model share attention as a plan says, for forwards of `n` tokens, while the context lasts."""
    AttentionInterface.register("shared_by_definition", Oracle(plan, n))
    AttentionMaskInterface.register("shared_by_definition", lambda *args, **kwargs: None)
    before = model.config._attn_implementation_internal
    model.config._attn_implementation_internal = "shared_by_definition"
    try:
        yield
    finally:
        model.config._attn_implementation_internal = before


def oracle_logits(model: PreTrainedModel, plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    """Returns a dense model's logits with attention shared as a plan says, from the definition."""
    with by_definition(model, plan, ids.shape[1]):
        return logits(model, ids, use_cache=False)


def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Returns the logits of a forward without gradients."""
    with torch.no_grad():
        return model(ids, **kwargs).logits


def in_parts(
    model: PreTrainedModel,
    ids: torch.Tensor,
    sizes: list[int],
    plan: Plan | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the logits of forwards over a cache that take so many tokens each; under a plan the cache takes its bytes."""
    parts, cache, done = [], None, 0
    for size in sizes:
        here = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            here = {"attention_mask": mask[:, : done + size], "position_ids": positions[:, done : done + size]}
        with torch.no_grad():
            out = model(ids[:, done : done + size], cache=cache, use_cache=True, **here)
        parts.append(out.logits)
        cache, done = out.cache, done + size
        assert plan is None or cache.used_bytes() == plan.kv_bytes(done, batch=len(ids))
    return torch.cat(parts, 1)


SIZES = [70, 1, 45, 1, 1, 30, 1, 1, 1]
EXACT, FLIPS = 2e-5, 2e-2
"""Largest differences of logits, as shares of the largest: of summation order, and of codes that it flips by one step."""


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference as a share of the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def shared(family: str, tiny_model: Callable[..., Any], random_plan: Callable[..., Plan]) -> tuple[Any, Plan]:
    """A model of every family under a plan with layers that share attention, and the plan."""
    model = tiny_model(family, num_hidden_layers=5, **LAYERS.get(family, {}))
    shape = model_shape(model)
    return model, with_shares(random_plan(shape, 5), shares_of(shape, sum(map(ord, family))))


@pytest.fixture
def llama(tiny_model: Callable[..., Any], random_plan: Callable[..., Plan]) -> Callable[..., tuple[Any, Plan]]:
    """Returns a function that makes a tiny model of six layers and a plan under which some share attention."""

    def make(seed: int = 0, formats: bool = False) -> tuple[Any, Plan]:
        model = tiny_model("llama", num_hidden_layers=6)
        shape = model_shape(model)
        return model, with_shares(random_plan(shape, seed, formats=formats), shares_of(shape, seed))

    return make


def test_sharing_is_the_stock_model_with_it(shared: tuple[Any, Plan], token_ids: Any) -> None:
    model, plan = shared
    ids = token_ids(2, sum(SIZES))
    expected = oracle_logits(model, plan, ids)
    assert difference(oracle_logits(model, replace(plan, shares=()), ids), expected) > 0.01, "sharing must matter"
    attach(model, plan)
    assert difference(logits(model, ids, use_cache=False), expected) < EXACT
    assert difference(in_parts(model, ids, SIZES, plan), expected) < EXACT


def test_formats_too(
    family: str, tiny_model: Callable[..., Any], random_plan: Callable[..., Plan], token_ids: Any
) -> None:
    model = tiny_model(family, num_hidden_layers=5, **LAYERS.get(family, {}))
    shape = model_shape(model)
    plan = with_shares(random_plan(shape, 6, formats=True), shares_of(shape, 1 + sum(map(ord, family))))
    ids = token_ids(2, sum(SIZES))
    expected = oracle_logits(model, plan, ids)
    attach(model, plan)
    assert difference(logits(model, ids, use_cache=False), expected) < FLIPS
    assert difference(in_parts(model, ids, SIZES, plan), expected) < FLIPS


def test_padding_changes_nothing(shared: tuple[Any, Plan], token_ids: Any) -> None:
    model, plan = shared
    attach(model, plan)
    ids, lengths = token_ids(3, sum(SIZES)), (sum(SIZES), sum(SIZES) - 13, sum(SIZES) - 80)
    mask = torch.stack([torch.arange(sum(SIZES)) >= sum(SIZES) - length for length in lengths]).long()
    found = in_parts(model, ids, SIZES, mask=mask)
    for row, length in enumerate(lengths):
        alone = logits(model, ids[row : row + 1, -length:], use_cache=False)
        assert difference(found[row : row + 1, -length:], alone) < EXACT


@pytest.mark.parametrize("seed", range(3))
def test_every_way_of_generating(llama: Callable[..., tuple[Any, Plan]], token_ids: Any, seed: int) -> None:
    model, plan = llama(seed)
    attach(model, plan)
    ids, ways = token_ids(2, 90), {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(ids, **ways)
    steps = logits(model, greedy[:, :-1], use_cache=False)[:, 89:]
    assert torch.equal(steps.argmax(-1), greedy[:, 90:])
    beams = model.generate(ids, num_beams=3, **ways)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **ways))
    one = torch.cat((ids[:1], ids[:1, 40:80]), 1)  # there is something to look up
    drafted = model.generate(one, prompt_lookup_num_tokens=4, **ways)
    assert torch.equal(drafted, model.generate(one, **ways))


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_operations_is_a_cacheless_forward(
    llama: Callable[..., tuple[Any, Plan]], token_ids: Any, seed: int
) -> None:
    """Chunks, steps, forks, pickles, rows in another order, and drafts that are taken back."""
    draw = random.Random(seed)
    model, plan = llama(seed)
    attach(model, plan)
    ids = token_ids(2, 400, seed)
    with torch.no_grad():
        cache = model(ids[:, :37], use_cache=True).cache
    if seed % 2:
        for layer in cache.layers:
            layer.activate_past_recording()
    tokens, rows = [ids[0, :37], ids[1, :37]], []
    for _ in range(14):
        what = draw.choice(["chunk", "step", "step", "fork", "pickle", "rows", "crop"])
        if what == "fork":
            rows.append((cache.fork(), list(tokens)))  # it lives on, and what it holds must not change
        elif what == "pickle":
            cache = pickle.loads(pickle.dumps(cache))
        elif what == "rows":
            order = [draw.randrange(len(tokens)) for _ in range(draw.choice([2, 3]))]
            cache.reorder_cache(torch.tensor(order))
            tokens = [tokens[row] for row in order]
        elif what == "crop" and seed % 2 and len(tokens[0]) > 45:
            cache.crop(-3)
            tokens = [row[:-3] for row in tokens]
        else:
            more = token_ids(len(tokens), 1 if what == "step" else draw.randrange(2, 40), draw.randrange(10**6))
            with torch.no_grad():
                found = model(more, cache=cache).logits
            tokens = [torch.cat(pair) for pair in zip(tokens, more, strict=True)]
            expected = logits(model, torch.stack(tokens), use_cache=False)[:, -more.shape[1] :]
            assert difference(found, expected) < EXACT, what
    more = token_ids(2, 5, seed + 1)
    for kept, its in rows:
        with torch.no_grad():
            found = model(more[:1].expand(len(its), -1), cache=kept).logits
        whole = torch.stack([torch.cat((row, more[0])) for row in its])
        assert difference(found, logits(model, whole, use_cache=False)[:, -5:]) < EXACT


def test_layers_made_alike_lose_nothing(tiny_model: Callable[..., Any], token_ids: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    first, second = (model.model.layers[layer].self_attn for layer in (1, 2))
    with torch.no_grad():
        for name in ("o_proj", "v_proj"):
            getattr(first, name).weight.zero_()  # what the second reads is what the first read
        model.model.layers[1].mlp.down_proj.weight.zero_()
        for name in ("q_proj", "k_proj"):
            getattr(second, name).weight.copy_(getattr(first, name).weight)
        model.model.layers[2].input_layernorm.weight.copy_(model.model.layers[1].input_layernorm.weight)
    ids, plan = token_ids(1, 100), Plan.full(model_shape(model))
    expected = logits(model, ids)
    attach(model, replace(plan, shares=(None, None, Share(1, (0, 1)))))
    assert difference(in_parts(model, ids, [60, 1, 39], plan=None), expected) < EXACT
    attach(model, replace(plan, shares=(None, None, Share(1, (1, 0)))))
    assert difference(logits(model, ids), expected) > 0.01


def _share_gone(name: str, heads: int, kv_heads: int) -> Fraction:
    """Returns how much of a weight of attention a reuse layer does without."""
    if name.startswith(("qkv_proj", "query_key_value")):
        return Fraction(kv_heads + heads, heads + 2 * kv_heads)
    return Fraction(name.startswith(("k_", "q_")))


def test_a_checkpoint_has_no_dropped_projections(shared: tuple[Any, Plan], token_ids: Any, tmp_path: Path) -> None:
    model, plan = shared
    ids, count = token_ids(1, 60), model.num_parameters()
    dense, gone = logits(model, ids), Fraction(0)
    for module, share in zip(attention_modules(model), plan.shares, strict=True):
        if share is None:
            continue
        for name, weight in module.named_parameters():
            gone += weight.numel() * _share_gone(name, plan.model.heads, plan.model.kv_heads)
    attach(model, plan)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.num_parameters() == count - gone
    with pytest.raises(UnsupportedError, match="have no queries and keys of their own"):
        detach(loaded)
    detach(model)
    assert torch.equal(logits(model, ids), dense)
    assert model.num_parameters() == count


def test_what_was_trained_and_moved_stays_so_without_a_plan(shared: tuple[Any, Plan], token_ids: Any) -> None:
    """Values of a reuse layer that a fused projection makes, too, and the queries and keys that were out of the model."""
    model, plan = shared
    ids = token_ids(1, 60)
    attach(model, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    trained = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
    model.bfloat16()
    detach(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    layers = {f"layers.{layer}." for layer, share in enumerate(plan.shares) if share is not None}
    fused = 0
    for name, parameter in model.named_parameters():
        there = trained.get(name)
        if there is not None and there.shape == parameter.shape:
            assert torch.equal(there, parameter)
        elif there is not None and len(there):  # some rows are trained, the others as they were
            assert any(layer in name for layer in layers)
            assert sum(any(torch.equal(row, mine) for mine in parameter) for row in there) == len(there)
            fused += 1
    families = {"qkv_proj": 1, "query_key_value": 1}
    assert bool(fused) == any(name.split(".")[-2] in families for name in trained)
    assert logits(model, ids).isfinite().all()


def test_without_moacompress_it_fails(llama: Callable[..., tuple[Any, Plan]], tmp_path: Path) -> None:
    model, plan = llama(0)
    attach(model, plan).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_definition(
    llama: Callable[..., tuple[Any, Plan]], token_ids: Any, checkpointing: bool
) -> None:
    model, plan = llama(3)
    ids = token_ids(2, 90)
    model.requires_grad_(True).train()
    with by_definition(model, plan, 90):
        model(ids, use_cache=False).logits.square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    attach(model, plan)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, use_cache=False).logits.square().sum().backward()
    anchor = next(share.anchor for share in plan.shares if share is not None)
    assert expected[f"model.layers.{anchor}.self_attn.k_proj.weight"].abs().max() > 0
    for name, weight in model.named_parameters():
        if weight.numel():
            assert difference(weight.grad, expected[name]) < 1e-4, name


def test_reentrant_checkpointing_is_refused(llama: Callable[..., tuple[Any, Plan]], token_ids: Any) -> None:
    model, plan = llama(3)
    attach(model, plan).requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedError, match="by reentrant gradient checkpointing, .*'use_reentrant': False"):
        model(token_ids(2, 40), use_cache=False)
    model.eval()
    model(token_ids(2, 40), use_cache=False)


def test_compiled_is_eager(tiny_model: Callable[..., Any], random_plan: Callable[..., Plan], token_ids: Any) -> None:
    model = tiny_model("llama")
    shares = (None, Share(0, (1, 1)), Share(0, (1, 0)))
    plan = with_shares(random_plan(model_shape(model), 1), shares)
    attach(model, plan)
    ids = token_ids(2, 70)
    expected = logits(model, ids)
    torch._dynamo.reset()
    compiled, cache = torch.compile(model, backend="eager", fullgraph=True, dynamic=True), PlanCache(plan)
    with torch.no_grad():
        parts = [compiled(ids[:, low:high], cache=cache).logits for low, high in ((0, 50), (50, 51), (51, 70))]
    torch._dynamo.reset()
    assert difference(torch.cat(parts, 1), expected) < EXACT


def test_a_layer_alone_is_refused(llama: Callable[..., tuple[Any, Plan]]) -> None:
    model, plan = llama(0)
    attach(model, plan)
    layer = next(layer for layer, share in enumerate(plan.shares) if share is not None)
    hidden = torch.randn(1, 5, model.config.hidden_size)
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with pytest.raises(UnsupportedError, match=f"layer {layer} shares the attention of layer .* run the decoder whole"):
        model.model.layers[layer](hidden, position_embeddings=rotary)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("seed", range(12))
def test_the_step_through_all_layers(llama: Callable[..., tuple[Any, Plan]], token_ids: Any, seed: int) -> None:
    """It gives what the layers give one after the other, and leaves such a cache; forks and room included."""
    model, plan = llama(seed, formats=seed % 2 == 1)
    attach(model, plan)
    ids, near = token_ids(3, 120, seed), EXACT if seed % 2 == 0 else FLIPS
    with torch.no_grad():
        fast = model(ids[:, :50], use_cache=True).cache
        slow = pickle.loads(pickle.dumps(fast))
        for at in range(50, 120):
            token = ids[:, at : at + 1]
            if at in (70, 101):  # blocks that others name are copied before they are written to
                forks = fast.fork(), slow.fork()
                found = model(token.flip(0), cache=forks[0]).logits
                assert difference(found, one_by_one(model, token.flip(0), forks[1])) < near
            expected = one_by_one(model, token, slow)
            assert difference(model(token, cache=fast).logits, expected) < near, at
    assert fast.step_routes == {"all layers": 70 * plan.model.layers}
    del forks
    assert fast.used_bytes() == plan.kv_bytes(120, batch=3)


def one_by_one(model: Any, token: torch.Tensor, cache: Any) -> torch.Tensor:
    """Returns the logits of a step whose layers each do their part by themselves."""
    (hook,) = model.get_decoder()._forward_pre_hooks.values()
    stack, hook.stack = hook.stack, None
    try:
        return model(token, cache=cache).logits
    finally:
        hook.stack = stack

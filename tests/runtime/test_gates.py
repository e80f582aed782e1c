"""Tokens that gates keep: attention as the oracle has it, and what models, checkpoints and caches make of gates."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.models.fingerprint import weights_fingerprint
from moacompress.models.source import model_shape
from moacompress.rules.formats import FORMATS
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK
from moacompress.runtime import attach, detach
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.decode.attention import attention_forward
from moacompress.runtime.decode.context import CONTEXT, LayerCall, LayerContext
from tests import oracle
from tests.plan_kinds import gated_plan

MODULE: Any = types.SimpleNamespace(is_causal=True)
MIN_WINDOW = 16
DIM, GROUP = 8, 2


class Case:
    """Random rules, tokens and scores of one layer; what the attention makes of them in chunks, and the oracle's word."""

    def __init__(self, seed: int, formats: bool = False, dtype: torch.dtype = torch.float64) -> None:
        self.rng = rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.n = rng.choice((1, 1, 2, 3)), rng.randint(30, 160)
        names = ("native", *[name for name in FORMATS if name != "native"]) if formats else ("native",)

        def rule() -> Rule:
            span = rng.choice(((0, 0), (20, 0), (40, 0), (0, 150), (10, 400), (0, 1024)))
            select = rng.choice(((0, 0), (1, 0), (7, 0), (20, 0), (40, 0), (0, 100), (5, 300), (0, 1024)))
            return Rule(rng.choice((4, 16)), *span, rng.choice(names), rng.choice(names), *select)

        self.rules = [rule() for _ in range(rng.choice((1, 2, 3)))]
        if not any(each.selects for each in self.rules):
            self.rules[0] = Rule(4, 20, 0, select_alpha=9)
        heads = len(self.rules)
        shape = (self.rows, heads, self.n, DIM)
        self.query = torch.randn(self.rows, heads * GROUP, self.n, DIM, generator=generator, dtype=dtype)
        self.key, self.value = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
        few = rng.choice((3, 40, 30000))  # ties, and none
        self.scores = torch.randint(-few, few, shape[:3], generator=generator).to(torch.int16)

    def expected(self) -> torch.Tensor:
        found = oracle.attend_under(self.rules, MIN_WINDOW, self.query, self.key, self.value, gate_scores=self.scores)
        return found.transpose(1, 2).to(self.query.dtype)

    def attended(self) -> torch.Tensor:
        """What a layer gives of all tokens without a cache, `[rows, n, heads, dim]`."""
        call: Any = {CONTEXT: LayerCall(LayerContext.of(0, self.rules, MIN_WINDOW, None), None, self.scores)}
        return attention_forward(MODULE, self.query, self.key, self.value, None, **call)[0]


def test_a_checkpoint_holds_its_gates(
    tiny_folder: Any, tiny_model: Callable[..., Any], token_ids: Any, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama").eval()
    plan = gated_plan(model, 1)
    before = set(model.state_dict())
    own = weights_fingerprint(model)
    attach(model, plan)
    assert weights_fingerprint(model) == own  # gates are none of its weights
    names = set(model.state_dict()) - before
    assert names
    assert all(name.rpartition(".self_attn.gate.")[2] in ("weight", "bias") for name in names)
    model.save_pretrained(tmp_path / "out")
    ids = token_ids(1, 90)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)
    # with gradients on, as loaded: gates learn where they are told to
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-4)
    assert loaded(
        ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.arange(3), 0), use_cache=False
    ).logits.requires_grad
    out = loaded.generate(ids, max_new_tokens=8, num_beams=2, do_sample=False)
    assert out.shape[1] <= 98
    detach(model)
    assert set(model.state_dict()) == before


def test_a_plan_is_attached_by_its_file(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model, other = tiny_model("llama").eval(), tiny_model("llama").eval()
    plan = gated_plan(model, 1)
    plan.save(tmp_path / "plan.json")
    ids = torch.arange(3, 103).unsqueeze(0)
    expected = attach(model, plan)(ids).logits
    assert attach(other, str(tmp_path / "plan.json")) is other
    assert torch.equal(other(ids).logits, expected)
    for name, said in (("missing.json", "No such file"), ("broken.json", "not a moacompress plan")):
        (tmp_path / "broken.json").write_text("{}")
        with pytest.raises(PlanError, match=f"{name}.*{said}"):
            attach(other, tmp_path / name)
    assert torch.equal(other(ids).logits, expected)


def test_what_does_not_go_together_is_refused(tiny_model: Callable[..., Any], tmp_path: Any) -> None:
    model = tiny_model("llama").eval()
    plan = gated_plan(model, 1)
    with pytest.raises(PlanError, match=f"the gates {plan.gates} choose, and these are not at hand"):
        attach(model, Plan.from_dict(plan.to_dict()))
    plan.save(tmp_path / "a.json")
    read = Plan.load(tmp_path / "a.json").gate_weights
    assert read is not None
    assert read.fingerprint == plan.gates
    assert plan.gate_weights is not None
    other = GateWeights(plan.gate_weights.weight + 1, plan.gate_weights.bias)
    other.save(tmp_path / "a.gates.safetensors")
    with pytest.raises(PlanError, match=f"it names {plan.gates}, these are {other.fingerprint}"):
        Plan.load(tmp_path / "a.json")
    attach(model, plan)
    cache = model(torch.ones(1, 40, dtype=torch.int64)).cache
    with pytest.raises(UnsupportedError, match="nothing was kept to roll back to"):
        cache.crop(-1)
    shape = model_shape(tiny_model("gemma3_text"))
    with pytest.raises(PlanError, match="sliding window of its own"):
        Plan.uniform(shape, Rule(4, 20, 0, select_alpha=5))


def test_a_kept_token_takes_what_a_block_says() -> None:
    case = Case(7)
    layer = PlanCacheLayer(RuleTable.of(case.rules, MIN_WINDOW))
    layer.update(case.key, case.value)
    layer.commit(Chunk(case.n), case.scores)
    held = layer.blocks_held()
    assert held.selected is not None
    counts = held.rules.selected(np.full(case.rows, case.n))
    assert ((held.selected.ids >= 0).sum(2) == -(-counts // BLOCK)).all()


@pytest.mark.parametrize("formats", [False, True])
@pytest.mark.usefixtures("compiled_kernels")
def test_one_call_for_all_layers_selects_in_bfloat16(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], formats: bool
) -> None:
    """What the layers select one by one, but where the last bits of a product give another code and another choice."""
    model, begin = tiny_model("llama").to(torch.bfloat16).eval(), 40
    plan = gated_plan(model, 11)
    if formats:
        plan = replace(plan, rules=tuple(tuple(rule.in_formats("int8", "int4") for rule in row) for row in plan.rules))
    attach(model, plan.in_dtype("bfloat16"))
    ids = token_ids(2, begin + 60)
    caches = [model(ids[:, :begin]).cache for _ in range(2)]
    found, expected = [], []
    with torch.no_grad():
        for at in range(begin, begin + 60):
            token = ids[:, at : at + 1]
            found.append(model(token, cache=caches[0]).logits.float())
            expected.append(stepped_plainly(model, token, caches[1]).float())
    assert caches[0].step_routes == {"all layers": 60 * plan.model.layers}
    assert caches[1].step_routes["all layers"] == 0
    wanted = torch.cat(expected, 1)
    assert (torch.cat(found, 1) - wanted).abs().mean() < 0.25 * wanted.abs().mean()
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert (ours.held.left == theirs.held.left).all()
        assert ours.used_bytes == theirs.used_bytes


def stepped_plainly(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """A step that layers do by themselves: somebody looks at the first one."""
    handle = model.model.layers[0].register_forward_pre_hook(lambda *given: None)
    try:
        return model(ids, cache=cache).logits
    finally:
        handle.remove()

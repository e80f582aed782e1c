"""Every supported family, one matrix: what a plan means is the same in all of them.

The oracle is the family's own eager attention with a ready-made mask for every head, so that its scaling, soft caps, sink
logits and rotary embeddings are transformers' own. The tests that need one family only are in the other files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

from moacompress.kernels import dispatch
from moacompress.kernels.reference.rounding import rounded
from moacompress.models.source import model_shape
from moacompress.rules.formats import FORMATS
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.windows import visible_intervals
from moacompress.runtime import attach, detach
from moacompress.runtime.hf.attaching import attached_plan

ALL = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "gpt_neox", "olmo2", "granite"),
    *("cohere2", "qwen3_moe", "ministral3", "gpt_oss"),
)
SEVERAL = ("llama", "gemma2", "gpt_oss")
SIDES = ("key_format", "value_format")
BACKENDS = (None, "reference", "counting", "triton")
"""What the machine has; plain PyTorch; and a backend that is none of the product's."""
EXACT = 1e-5
"""Largest difference in fp32 where only the order of sums differs, as a share of the largest logit."""
FLIPS = 2e-3
"""The same with formats: what differs in the last bits is now and then rounded to the next code."""
_MASKS: dict[int, torch.Tensor] = {}
_FORMATS: dict[int, tuple[list[int], list[int]]] = {}


def plan_mask(plan: Plan, layer: int, n: int) -> torch.Tensor:
    """Returns the mask to add to the scores of a layer's query heads, `[1, heads, n, n]`, made from the plan."""
    count = torch.arange(1, n + 1)[:, None]
    key = torch.arange(n)[None]
    native = plan.model.native_windows[layer]
    masks = []
    for rule in plan.rules[layer]:
        (first, sink_end), (start, _) = visible_intervals(count, rule.span(plan.min_window, native))
        seen = ((first <= key) & (key < sink_end)) | ((start <= key) & (key < count))
        masks.append(torch.zeros(n, n).masked_fill(~seen, torch.finfo(torch.float32).min))
    group = plan.model.heads // plan.model.kv_heads
    return torch.stack(masks).repeat_interleave(group, 0)[None]


def _stock_eager(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    forward = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    keys, values = _FORMATS[module.layer_idx]
    key, value = rounded(key, keys), rounded(value, values)
    return forward(module, query, key, value, _MASKS[module.layer_idx], **kwargs)


AttentionInterface.register("stock_eager_with_plan_masks", _stock_eager)
AttentionMaskInterface.register("stock_eager_with_plan_masks", lambda *args, **kwargs: None)


def stock_logits(model: PreTrainedModel, plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    """Returns a dense model's logits under ready-made masks: `[batch, n, vocabulary]`."""
    _MASKS.update({layer: plan_mask(plan, layer, ids.shape[1]) for layer in range(plan.model.layers)})
    for layer, rules in enumerate(plan.rules):
        _FORMATS[layer] = tuple([FORMATS[getattr(rule, name)].code for rule in rules] for name in SIDES)  # type: ignore[assignment]
    before = model.config._attn_implementation_internal
    model.config._attn_implementation_internal = "stock_eager_with_plan_masks"
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits
    finally:
        model.config._attn_implementation_internal = before
        _MASKS.clear()
        _FORMATS.clear()


def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


PARTS, FEW_PARTS = (60, 1, 1, 40, 1, 33, 1, 1, 12), (60, 1, 24, 1, 1, 3)
"""Tokens of chunks and steps; the few are for kernels that are interpreted, where each takes seconds."""


def in_parts(model: PreTrainedModel, plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits of rows that are fed in chunks and one by one; the cache takes the plan's bytes."""
    cache, parts, at = None, [], 0
    for size in PARTS if ids.shape[1] == sum(PARTS) else FEW_PARTS:
        with torch.no_grad():
            out = model(ids[:, at : at + size], cache=cache, use_cache=True)
        cache, at = out.cache, at + size
        parts.append(out.logits)
        assert cache.used_bytes() == plan.kv_bytes(at, batch=len(ids))
    assert at == ids.shape[1]
    return torch.cat(parts, 1)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference as a share of the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())


def mean_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square of the difference as a share of that of the expected numbers.

    Where products differ in a last bit, as from one processor to the next, a number may be rounded to the next code, which few
    logits tell.
    """
    return float((found - expected).norm() / expected.norm())


CASES = [(name, backend) for backend in BACKENDS for name in (ALL if backend is None else SEVERAL)]
HEAVY = (("llama", "triton"), ("gemma2", "triton"))
"""The interpreter takes minutes. GPT-OSS has sinks and windows of its own; the kernels' tests have capped scores; Llama steps
through tests of devices."""


@pytest.fixture(params=[pytest.param(case, marks=[pytest.mark.heavy] * (case in HEAVY)) for case in CASES], ids=str)
def family(request: pytest.FixtureRequest, use_backend: Callable[[str], Any], counting: Any) -> Iterator[str]:
    """Every family by the kernels that this machine has, and those that differ most by every backend."""
    name, backend = request.param
    counting.calls.clear()
    if backend is not None:
        use_backend(backend)
    yield name
    assert bool(counting.calls) == (backend == counting.name) or os.environ.get("MOACOMPRESS_TEST_BACKEND")


@pytest.fixture
def sparse(family: str, tiny_model: Callable[..., Any], random_plan: Callable[..., Plan]) -> tuple[Any, Plan]:
    """A tiny dense model of the family and a sparse plan for it."""
    model = tiny_model(family)
    return model, random_plan(model_shape(model), seed=4, full_share=0.1)


def interpreted() -> bool:
    """Returns whether each token takes a tenth of a second, because Triton's kernels are run line by line."""
    return dispatch.chosen().name == "triton"


def test_no_family_is_left_out(families: tuple[str, ...]) -> None:
    assert set(families) == set(ALL)


def test_full_span_is_the_stock_model(family: str, tiny_model: Callable[..., Any], token_ids: Any) -> None:
    model = tiny_model(family)
    ids = token_ids(1, 90) if interpreted() else token_ids(2, 120)
    stock = logits(model, ids, use_cache=False)
    attach(model, Plan.full(model_shape(model)))
    assert difference(logits(model, ids, use_cache=False), stock) < EXACT
    assert difference(logits(model, ids), stock) < EXACT


def test_a_sparse_plan_is_the_stock_model_with_its_masks(sparse: tuple[Any, Plan], token_ids: Any) -> None:
    model, plan = sparse
    ids = token_ids(2, 150)
    expected = stock_logits(model, plan, ids)
    full = stock_logits(model, Plan.full(plan.model), ids)
    dense = logits(model, ids, use_cache=False)
    assert difference(full, dense) < EXACT, "the oracle itself must be the stock model where nothing is masked"
    assert difference(expected, dense) > 0.01, "the plan must change the model, or this shows nothing"
    attach(model, plan)
    assert difference(logits(model, ids, use_cache=False), expected) < EXACT


def test_formats_are_the_stock_model_with_rounded_keys_and_values(
    family: str, tiny_model: Callable[..., Any], random_plan: Callable[..., Plan], token_ids: Any
) -> None:
    model = tiny_model(family)
    plan = random_plan(model_shape(model), seed=4, full_share=0.1, formats=True)
    ids = token_ids(1, sum(FEW_PARTS)) if interpreted() else token_ids(2, sum(PARTS))
    expected = stock_logits(model, plan, ids)
    native = replace(plan, rules=tuple(tuple(Rule(*rule.to_list()[:3]) for rule in row) for row in plan.rules))
    assert mean_difference(expected, stock_logits(model, native, ids)) > 10 * FLIPS, "the formats must change the model"
    attach(model, plan)
    assert mean_difference(logits(model, ids, use_cache=False), expected) < FLIPS
    assert mean_difference(in_parts(model, plan, ids), expected) < FLIPS


def test_generated_tokens_are_the_argmax_of_a_cacheless_forward(sparse: tuple[Any, Plan], token_ids: Any) -> None:
    model, plan = sparse
    ids = token_ids(1, 90)
    attach(model, plan)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    steps = logits(model, out[:, :-1], use_cache=False)[:, 89:]
    assert torch.equal(steps.argmax(-1), out[:, 90:])


def test_a_saved_model_loads_bit_equal(sparse: tuple[Any, Plan], token_ids: Any, tmp_path: Any) -> None:
    model, plan = sparse
    ids = token_ids(1, 130)
    dense = logits(model, ids)
    attach(model, plan)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert attached_plan(loaded) == plan
    assert torch.equal(logits(loaded, ids), expected)
    assert torch.equal(logits(detach(loaded), ids), dense)

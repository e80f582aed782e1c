"""Every supported family, one matrix: what a plan means is the same in all of them, by every backend.

`tests/oracle.py` has the family's own scaling, soft caps, sink logits and rotary embeddings, which transformers hands on. The
tests that need one family only are in the other files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from moacompress.kernels import dispatch
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach
from tests import oracle
from tests.conftest import TINY
from tests.plan_kinds import random_plan
from tests.runtime.forwards import difference, in_parts, logits

SEVERAL = ("llama", "gemma2", "gpt_oss")
BACKENDS = (None, "reference", "counting", "triton")
"""What the machine has; plain PyTorch; and a backend that is none of the product's."""
EXACT = 1e-5
"""Largest difference in fp32 where only the order of sums differs, as a share of the largest logit."""
FLIPS = 2e-3
"""The same with formats: what differs in the last bits is now and then rounded to the next code."""
PARTS, FEW_PARTS = (60, 1, 1, 40, 1, 33, 1, 1, 12), (60, 1, 24, 1, 1, 3)
"""Tokens of chunks and steps; the few are for kernels that are interpreted, where each takes seconds."""


def mean_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square of the difference as a share of that of the expected numbers.

    Where products differ in a last bit, as from one processor to the next, a number may be rounded to the next code, which few
    logits tell.
    """
    return float((found - expected).norm() / expected.norm())


CASES = [(name, backend) for backend in BACKENDS for name in (TINY if backend is None else SEVERAL)]
HEAVY = tuple((name, "triton") for name in SEVERAL)
"""The interpreter takes minutes. Sinks, windows and capped scores are in the kernels' tests; Llama steps on devices."""


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
def ids(family: str, token_ids: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Two rows; one where each token takes a tenth of a second, because Triton's kernels are run line by line."""
    return token_ids(1, sum(FEW_PARTS)) if dispatch.chosen().name == "triton" else token_ids(2, sum(PARTS))


def test_full_span_is_the_stock_model(family: str, tiny_model: Callable[..., Any], ids: torch.Tensor) -> None:
    model = tiny_model(family)
    stock = logits(model, ids, use_cache=False)
    assert difference(oracle.logits(model, Plan.full(model_shape(model)), ids), stock) < EXACT
    attach(model, Plan.full(model_shape(model)))
    assert difference(logits(model, ids, use_cache=False), stock) < EXACT
    assert difference(logits(model, ids), stock) < EXACT


def test_a_plan_is_the_stock_model_with_its_masks_and_rounded_keys_and_values(
    family: str, tiny_model: Callable[..., Any], ids: torch.Tensor
) -> None:
    model, parts = tiny_model(family), PARTS if ids.shape[1] == sum(PARTS) else FEW_PARTS
    plan = random_plan(model_shape(model), seed=5, full_share=0.1, formats=True)
    native = replace(plan, rules=tuple(tuple(Rule(*rule.to_list()[:3]) for rule in row) for row in plan.rules))
    expected = oracle.logits(model, native, ids)
    assert difference(expected, logits(model, ids, use_cache=False)) > 0.01, "the plan must change the model"
    attach(model, native)
    assert difference(logits(model, ids, use_cache=False), expected) < EXACT
    assert difference(in_parts(model, ids, parts, plan=native), expected) < EXACT
    detach(model)
    spans, expected = expected, oracle.logits(model, plan, ids)
    assert mean_difference(expected, spans) > 10 * FLIPS, "the formats must change the model"
    attach(model, plan)
    assert mean_difference(logits(model, ids, use_cache=False), expected) < FLIPS
    assert mean_difference(in_parts(model, ids, parts, plan=plan), expected) < FLIPS


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_first_chunk_of_padding_alone(
    tokens: int, model: Callable[..., Any], token_ids: Callable[..., torch.Tensor]
) -> None:
    """Left-padded input that is fed in pieces: the rows have no token yet, and the next piece is as without the padding."""
    made, ids = model(), token_ids(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[:, :tokens] = 0
    found = in_parts(made, ids, [tokens, 60 - tokens], mask=mask)[:, tokens:]
    assert difference(found, logits(made, ids[:, tokens:])) < EXACT


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_gradients_of_one_projection_alone(
    trained: str, model: Callable[..., Any], token_ids: Callable[..., torch.Tensor]
) -> None:
    """Rows that end in padding, no cache: as in float64, which plain PyTorch computes."""
    ids, mask, found = token_ids(2, 40), torch.ones(2, 40, dtype=torch.long), []
    mask[0, 30:] = 0
    for dtype in (torch.float32, torch.float64):
        made = model(dtype=dtype)
        weights = [getattr(layer.self_attn, trained).weight.requires_grad_() for layer in made.model.layers]
        made(ids, attention_mask=mask, use_cache=False).logits.square().sum().backward()
        found.append([weight.grad.double() for weight in weights])
    for mine, exact in zip(*found, strict=True):
        assert exact.abs().max() > 0
        assert difference(mine, exact) < 1e-4

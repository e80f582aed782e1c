"""vLLM says under a plan what transformers says, whatever is freed, batched, cut into chunks, preempted or cached.

All memory is NaN before it is written, and NaN again as soon as it is freed: an answer that is a number has read nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach
from tests.plan_kinds import centres, random_plan
from tests.serving.engine.conftest import VOCABULARY

pytestmark = pytest.mark.usefixtures("poisoned")
CLOSE = 2e-4
"""Largest difference of a log-probability in float32."""


def prompts(seed: int = 0, lengths: tuple[int, ...] = (17, 100, 431, 700, 1500)) -> list[list[int]]:
    """Returns random prompts."""
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def spans(model: Any) -> Plan:
    """Returns a plan of many different spans, in the model's own dtype."""
    return random_plan(model_shape(model), seed=2, full_share=0.1)


def everything(model: Any) -> Plan:
    """Returns the plan that frees nothing."""
    return Plan.full(model_shape(model))


def agree(found: list[Any], model: Any, expected: Callable[..., list[float]]) -> float:
    """Returns the largest difference of a log-probability from transformers', NaN if there is one."""
    differences = [
        torch.tensor(answer.logprobs, dtype=torch.float64) - torch.tensor(expected(model, answer), dtype=torch.float64)
        for answer in found
    ]
    return float(torch.cat(differences).abs().max())


def check_served(served: Any, model: Any, expected: Callable[..., list[float]], poisoned: list[int]) -> None:
    """Holds answers to prompts together and one by one against transformers', and sees that all memory comes back."""
    assert agree(served.ask(prompts()), model, expected) < CLOSE
    assert agree(served.ask(prompts(1), together=False), model, expected) < CLOSE
    assert len(poisoned) > 100
    pool = served.core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize("chunk", [17, 4096])
def test_spans(engine, checkpoints, expected, poisoned, chunk):
    folder, model = checkpoints(spans)
    check_served(engine(folder, max_num_batched_tokens=chunk), model, expected, poisoned)


def test_keys_less_their_centres(engine, checkpoints, expected, poisoned):
    """Of norm 100, under codes: what is cached and what is in the chunk lie less the same."""
    folder, model = checkpoints(centres, "qwen2")
    found = engine(folder, max_num_batched_tokens=96).ask(prompts())
    # a code may fall on the other side, and the centre is in scores of some hundred
    assert agree(found, model, expected) < 0.05
    wrong = attach(model, replace(centres(model), centres=()))
    assert agree(found, wrong, expected) > 0.5


def test_a_block_too_many_is_noticed(engine, checkpoints, expected, monkeypatch):
    """The negative control: these tests see what is freed too soon."""
    from moacompress.serving.vllm.freed_blocks import Freed, FreedBlocks

    at = FreedBlocks.at

    def too_many(self: FreedBlocks, n: int) -> Freed:
        front, gap, gap_end = at(self, n)
        return Freed(front, gap, gap_end + (gap_end > gap))

    folder, model = checkpoints(spans)
    monkeypatch.setattr(FreedBlocks, "at", too_many)
    difference = agree(engine(folder).ask(prompts(), together=False), model, expected)
    assert not difference < CLOSE


def test_nothing_freed_is_what_stock_vllm_says(engine, checkpoints):
    full, _ = checkpoints(everything)
    dense, _model = checkpoints(None)
    for one, other in zip(engine(full).ask(prompts()), engine(dense).ask(prompts()), strict=True):
        assert one.tokens == other.tokens
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=CLOSE)


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "qwen3"])
def test_other_families(engine, checkpoints, expected, poisoned, family):
    """Native windows beside the plan's; norms of queries and keys."""
    folder, model = checkpoints(spans, family)
    assert agree(engine(folder).ask(prompts()), model, expected) < CLOSE
    assert poisoned


@pytest.mark.parametrize("unit", [None, 8])
def test_prefixes_are_found_again(engine, checkpoints, expected, unit):
    """Sinks and windows are there, null blocks between; what is cached may be evicted for others."""
    folder, model = checkpoints(spans)
    served = engine(folder, enable_prefix_caching=True, kv_cache_memory_bytes=6 << 20, prefix_match_unit=unit)
    shared = prompts(9, (400,))[0]
    at_once = served.ask([shared[:150], shared[:300], shared])  # each begins with blocks that the one before fills
    assert [answer.cached for answer in at_once] == [0, 144, 288]
    before = served.ask(prompts())
    again = served.ask(prompts())
    assert [answer.cached > 0 for answer in again] == [len(prompt) > 16 for prompt in prompts()]
    longer = [prompt + answer.tokens + prompts(5, (40,))[0] for prompt, answer in zip(prompts(), before, strict=True)]
    continued = served.ask(longer)
    assert sum(answer.cached for answer in continued) > 1000
    others = served.ask(prompts(7, (1500,) * 8))
    assert agree([*at_once, *before, *again, *continued, *others, *served.ask(prompts())], model, expected) < CLOSE


def test_preempted_requests_are_computed_again(engine, checkpoints, expected, preempted):
    folder, model = checkpoints(spans)
    served = engine(folder, kv_cache_memory_bytes=2 << 20, max_model_len=1024, max_num_batched_tokens=512)
    found = served.ask(prompts(3, (300, 500, 400, 200, 350, 450, 250, 100)), new=400)
    assert preempted
    assert agree(found, model, expected) < CLOSE


@pytest.mark.parametrize("most", [1, 6])
def test_few_classes(engine, checkpoints, expected, monkeypatch, most):
    folder, model = checkpoints(spans)
    served = engine(folder, additional_config={"moacompress": {"classes": most}})
    assert len(served.managers) <= most
    assert agree(served.ask(prompts()), model, expected) < CLOSE


def test_a_window_of_few_tokens(engine, checkpoints, expected):
    """No sinks, and windows that grow by none: most of a prompt is freed while it is computed."""

    def narrow(model: Any) -> Plan:
        return Plan.uniform(model_shape(model), Rule(4, 0, 0), 16)

    folder, model = checkpoints(narrow)
    served = engine(folder, max_num_batched_tokens=64)
    assert agree(served.ask(prompts(2, (1, 2, 15, 16, 17, 1000, 1900))), model, expected) < CLOSE

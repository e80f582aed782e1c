"""Plans whose gates choose tokens: the same are chosen as on transformers, whatever the steps, and answers are the same."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.kernels.arguments import Passing, Scores, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.dispatch import REFERENCE
from moacompress.rules.formats import FORMATS
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import competing_tokens, eviction_schedule
from tests.plan_kinds import gated_plan
from tests.serving.engine.test_exact import CLOSE, agree, poisoned, prompts
from tests.serving.engine.test_formats import HEADS, KV_HEADS, LAYERS, WIDTH, Blocks, in_steps

assert poisoned  # a fixture
GROWTH = ((9, 0), (5, 0), (40, 0), (0, 200), (0, 0))


def gated_rules(rng: random.Random) -> tuple[Rule, ...]:
    """Returns rules of a layer, some of which select."""
    drawn = []
    for _ in range(KV_HEADS):
        rule = Rule(rng.choice((4, 16)), rng.choice((0, 20)), rng.choice((0, 100)), *rng.choices([*FORMATS], k=2))
        alpha, beta_q = rng.choice(GROWTH)
        drawn.append(replace(rule, select_alpha=alpha, select_beta_q=beta_q))
    drawn[rng.randrange(KV_HEADS)] = Rule(4, 0, 0, select_alpha=20, select_beta_q=50)
    return tuple(drawn)


def seen(rules: RuleTable, scores: torch.Tensor) -> Passing:
    """Returns which tokens of a whole row are attended to beside sinks and windows, by the definition.

    Args:
        rules: of the KV heads, in numpy.
        scores: int16 `[tokens, kv_heads]`.
    """
    first, after = (rules.tokens_left(np.array([n])) for n in (0, len(scores)))
    tokens = competing_tokens(rules, first, after)
    _, heads = tokens.rows_and_heads
    found = eviction_schedule(tokens, rules, scores.numpy()[tokens.positions, heads].astype(np.int64)).ever_selected
    return Passing(*map(torch.from_numpy, (found.begins, -1 - found.positions, found.admitted, found.evicted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_steps_select_as_all_at_once(seed, dtype, monkeypatch):
    """By scores with many equals, over memory that is freed and used again, in every format."""
    from moacompress.serving.vllm.gates import LayerGate

    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = ModelShape("llama", LAYERS, HEADS, KV_HEADS, WIDTH, str(dtype).removeprefix("torch."), (None,) * LAYERS, "")
    plan = Plan(shape, 16, tuple(gated_rules(rng) for _ in range(LAYERS)), gates="0" * 16)
    blocks = Blocks(plan, dtype, rng)
    assert {one.heads.selected for one in blocks.classes} == {False, True}
    scores = Scores(WIDTH**-0.5, rng.choice((0.0, 5.0)), rng.choice((None, torch.randn(HEADS))))
    layers = {
        f"model.layers.{index}": SimpleNamespace(
            plan_view=None,
            plan_gate=LayerGate(KV_HEADS, 8, dtype),
            plan_classes=blocks.classes,
            plan_table=as_tensors(RuleTable.of(rules, plan.min_window)),
            plan_scores=scores,
            head_size_v=WIDTH,
        )
        for index, rules in enumerate(plan.rules)
    }
    counts = [rng.randint(1, 400) for _ in range(3)]
    drawn = [
        [
            [
                *(torch.randn(count, heads, WIDTH, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)),
                torch.randint(-20, 20, (count, KV_HEADS), dtype=torch.int16),
            ]
            for count in counts
        ]
        for _ in layers
    ]
    found = in_steps(blocks, layers, drawn, rng, monkeypatch)
    for index, (layer, rows_of) in enumerate(zip(layers.values(), drawn, strict=True)):
        for row, (*vectors, of_tokens) in enumerate(rows_of):
            parts = [part.transpose(0, 1)[None].float() for part in vectors]
            passing = seen(RuleTable(layer.plan_table.columns.numpy()), of_tokens)
            expected = prefill_alone(REFERENCE, *parts, rules=layer.plan_table, scores=scores, passing=passing)
            error = (found[index][row].float() - expected[0].transpose(0, 1)).abs().max()
            assert error < (2e-5 if dtype == torch.float32 else 3e-2), (index, row)


def chosen(model: Any) -> Plan:
    """Returns a plan whose gates choose, in the model's own dtype."""
    return gated_plan(model, 5)


@pytest.mark.parametrize("chunk", [17, 96, 256])
def test_gates(engine, checkpoints, expected, poisoned, chunk):
    folder, model = checkpoints(chosen)
    served = engine(folder, max_num_batched_tokens=chunk)
    together = served.ask(prompts())
    assert agree(together, model, expected) < CLOSE
    assert agree(served.ask(prompts(1), together=False), model, expected) < CLOSE
    assert len(poisoned) > 100
    pool = served.core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1

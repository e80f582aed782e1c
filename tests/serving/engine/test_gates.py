"""Plans whose gates choose tokens: the same are chosen as on transformers, whatever the steps, and answers are the same."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moacompress.core.errors import MoaCompressError
from moacompress.kernels.arguments import Scores, TransientTokens, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.rules.formats import FORMATS
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import competing_tokens, eviction_schedule
from tests.plan_kinds import gated_plan, gates
from tests.serving.engine.test_exact import CLOSE, agree, check_served, prompts
from tests.serving.engine.test_formats import HEADS, KV_HEADS, LAYERS, WIDTH, Blocks, in_steps

GROWTH = ((9, 0), (5, 0), (40, 0), (0, 200), (0, 0))


def gated_rules(rng: random.Random) -> tuple[Rule, ...]:
    """Returns rules of a layer, some of which select."""
    drawn = []
    for _ in range(KV_HEADS):
        keys, values = rng.choices([*FORMATS], k=2)
        rule = Rule(rng.choice((4, 16)), rng.choice((0, 20)), rng.choice((0, 100)), keys, values)
        alpha, beta_q = rng.choice(GROWTH)
        drawn.append(replace(rule, select_alpha=alpha, select_beta_q=beta_q))
    drawn[rng.randrange(KV_HEADS)] = Rule(4, 0, 0, select_alpha=20, select_beta_q=50)
    return tuple(drawn)


def seen(rules: RuleTable, scores: torch.Tensor) -> TransientTokens:
    """Returns which tokens of a whole row are attended to beside sinks and windows, by the definition.

    Args:
        rules: of the KV heads, in numpy.
        scores: int16 `[tokens, kv_heads]`.
    """
    first, after = (rules.tokens_left(np.array([n])) for n in (0, len(scores)))
    tokens = competing_tokens(rules, first, after)
    _, heads = tokens.rows_and_heads
    found = eviction_schedule(tokens, rules, scores.numpy()[tokens.positions, heads].astype(np.int64)).ever_selected
    return TransientTokens(*map(torch.from_numpy, (found.begins, -1 - found.positions, found.admitted, found.evicted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("seed", "in_one_call"), [(seed, seed != 5) for seed in range(6)])
def test_steps_select_as_all_at_once(seed, in_one_call, dtype, monkeypatch):
    """By scores with many equals, over memory that is freed and used again, in every format.

    Also by a backend that cannot let tokens compete in the call in which they are attended to.
    """
    monkeypatch.setattr(CpuBackend, "capabilities", replace(CpuBackend.capabilities, decode_selecting=in_one_call))
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


@pytest.mark.parametrize("chunk", [17, 96, 256])
def test_gates(engine, checkpoints, expected, poisoned, chunk):
    folder, model = checkpoints(gates)
    check_served(engine(folder, max_num_batched_tokens=chunk), model, expected, poisoned)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_other_families(engine, checkpoints, expected, poisoned, family):
    """Layers with a sliding window of their own, in which no rule selects."""
    folder, model = checkpoints(gates, family)
    assert agree(engine(folder).ask(prompts()), model, expected) < CLOSE
    assert poisoned


def test_few_are_selected_of_long_prompts(engine, checkpoints, expected, poisoned):
    """Windows that grow by none: most of a prompt competes for two places, and leaves while it is computed."""

    def narrow(model: Any) -> Plan:
        plan = gated_plan(model, 3)
        row = (Rule(4, 0, 0, select_alpha=2), Rule(4, 0, 0, select_alpha=17))
        return replace(plan, rules=(row,) * plan.model.layers)

    folder, model = checkpoints(narrow)
    served = engine(folder, max_num_batched_tokens=64)
    assert agree(served.ask(prompts(2, (1, 2, 15, 16, 17, 22, 1000, 1900)), new=40), model, expected) < CLOSE


def test_everything_is_selected(engine, checkpoints, expected, poisoned):
    """Of the tokens that leave tiny windows nearly all: a sequence has more blocks of them than there are for its tokens."""
    from moacompress.serving.vllm.spec import SelectedSpec

    def most(model: Any) -> Plan:
        plan = gated_plan(model, 4)
        alphas = range(0, 500 * len(plan.rules), 500)
        rows = [(Rule(4, alpha, 0, select_beta_q=1024), Rule(4, 0, 0, select_alpha=1400)) for alpha in alphas]
        return replace(plan, rules=tuple(rows))

    folder, model = checkpoints(most)
    served = engine(folder, max_num_batched_tokens=96)
    selected = [one.spec for one in served.layers.values() if isinstance(getattr(one, "spec", None), SelectedSpec)]
    assert any(spec.blocks.held(1500) > 1500 // 16 for spec in selected)
    assert agree(served.ask(prompts()), model, expected) < CLOSE


def test_formats(engine, checkpoints, expected, poisoned):
    """A code that rounds the other way, and who is selected by it, is all that may differ."""

    def mixed(model: Any) -> Plan:
        plan, rng = gated_plan(model, 7), random.Random(7)
        return replace(
            plan, rules=tuple(tuple(one.in_formats(*rng.choices([*FORMATS], k=2)) for one in row) for row in plan.rules)
        )

    folder, model = checkpoints(mixed)
    difference = agree(engine(folder, max_num_batched_tokens=96).ask(prompts(), new=40), model, expected)
    assert difference < 0.02


def test_preempted_requests_are_computed_again(engine, checkpoints, expected, poisoned, preempted):
    folder, model = checkpoints(gates)
    served = engine(folder, kv_cache_memory_bytes=576 << 10, max_model_len=1024, max_num_batched_tokens=128)
    found = served.ask(prompts(3, (60, 80, 100, 120, 140, 160)), new=300)
    assert preempted
    assert agree(found, model, expected) < CLOSE


def test_who_is_not_committed_is_missed(engine, checkpoints, expected, monkeypatch):
    """The negative control: these tests see whether the right tokens are selected."""
    from moacompress.serving.vllm.selection import Selection

    commit, left = Selection.commit, [40]

    def all_but_some(self: Selection) -> None:
        left[0] -= 1
        if left[0] < 0 or left[0] % 8:
            commit(self)

    folder, model = checkpoints(gates)
    monkeypatch.setattr(Selection, "commit", all_but_some)
    difference = agree(engine(folder, max_num_batched_tokens=96).ask(prompts(0, (700,))), model, expected)
    assert not difference < CLOSE


def test_prefixes_are_not_cached(engine, checkpoints, expected, caplog):
    folder, model = checkpoints(gates)
    served = engine(folder, enable_prefix_caching=True)
    assert not served.core.vllm_config.cache_config.enable_prefix_caching
    twice = [*served.ask(prompts(4, (500,))), *served.ask(prompts(4, (500,)))]
    assert not any(answer.cached for answer in twice)
    assert agree(twice, model, expected) < CLOSE


def test_refused_in_a_sentence(engine, checkpoints):
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    folder, _ = checkpoints(gates)
    with pytest.raises(MoaCompressError, match="with drafts where its gates choose tokens; leave out --speculative"):
        engine(folder, speculative_config=drafts)


def test_a_checkpoint_without_its_gates_is_refused(engine, checkpoints):
    folder, _ = checkpoints(gates)
    (file,) = folder.glob("model*.safetensors")
    save_file({name: part for name, part in load_file(file).items() if ".gate." not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not initialized from checkpoint.*\.plan_gate\."):
        engine(folder)
    with pytest.raises(MoaCompressError, match=r"no weights for the gate of model\.layers\.0.* export it again"):
        engine(folder, model_loader_extra_config={"enable_weights_track": False})

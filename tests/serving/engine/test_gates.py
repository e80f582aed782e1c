"""Plans whose gates choose tokens: the same are chosen as on transformers, whatever the steps, and answers are the same."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moacompress.core.errors import MoaCompressError
from moacompress.rules.formats import FORMATS
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from tests.plan_kinds import gated_plan, gates
from tests.serving.engine.test_exact import CLOSE, agree, check_served, prompts


@pytest.mark.parametrize("chunk", [17, 256])
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
        rows = (tuple(one.in_formats(*rng.choices([*FORMATS], k=2)) for one in row) for row in plan.rules)
        return replace(plan, rules=tuple(rows))

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

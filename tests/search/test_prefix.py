"""Reusing unchanged layers gives the numbers of a whole forward pass, to the bit, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import answer_logits
from moacompress.models.modules import attention_modules, decoder_layers
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.runtime import attach, detach
from moacompress.search.measure.prefix import first_changed, record, resumed
from tests.conftest import tiny_model

FAMILIES = ("llama", "gemma3_text", "gpt_neox", "gpt_oss")


def make_sample(n: int = 160, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(rng.integers(3, 150, n), np.isin(np.arange(n), [n // 2, n - 2, n - 1]), "random", n)


def ablated(plan: Plan, layer: int) -> Plan:
    """Returns the full plan with the first KV head of one layer cut short."""
    rows = [list(row) for row in plan.rules]
    rows[layer][0] = Rule(4, 32, 0)
    return replace(plan, rules=tuple(map(tuple, rows)))


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_is_the_whole_forward_to_the_bit(family: str) -> None:
    model, sample = tiny_model(family), make_sample()
    full = Plan.full(model_shape(model))
    attach(model, full)
    prefix, dense = record(model, lambda: answer_logits(model, sample))
    assert torch.equal(dense, answer_logits(model, sample))
    for _ in range(2):  # what was recorded is not worn by use
        for layer in range(full.model.layers):
            plan = ablated(full, layer)
            assert first_changed(plan, full) == layer
            attach(model, plan)
            whole = answer_logits(model, sample)
            with resumed(model, prefix, layer):
                assert torch.equal(answer_logits(model, sample), whole)
            assert not torch.equal(whole, dense)
    attach(model, full)
    assert first_changed(full, full) == full.model.layers
    with resumed(model, prefix, full.model.layers):
        assert torch.equal(answer_logits(model, sample), dense)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_layers_that_share_are_computed_from_their_anchor_on(family: str) -> None:
    model, sample = tiny_model(family, num_hidden_layers=5), make_sample()
    full = Plan.full(model_shape(model))
    heads = tuple(range(full.model.kv_heads))
    near, far = Share(2, heads), Share(1, heads[::-1])
    base = replace(full, shares=(None, None, None, far, None))
    late = replace(full, shares=(None, None, None, None, near))
    straight = replace(full, shares=(None, None, None, replace(far, head_map=heads), None))
    around_full = [(base, 1), (late, 2), (straight, 1)]
    around_base = [(full, 3), (late, 2), (straight, 1), (ablated(base, 4), 4), (ablated(base, 2), 1)]
    for start, plans in ((full, around_full), (base, around_base)):
        attach(model, start)
        prefix, before = record(model, lambda: answer_logits(model, sample))
        for plan, layer in plans:
            assert first_changed(plan, start) == layer
            attach(model, plan)
            whole = answer_logits(model, sample)
            with resumed(model, prefix, layer):
                assert torch.equal(answer_logits(model, sample), whole)
            assert not torch.equal(whole, before)


def test_layers_before_are_not_computed_and_those_after_are() -> None:
    model, sample = tiny_model("llama"), make_sample()
    prefix, _ = record(model, lambda: answer_logits(model, sample))
    ran: list[int] = []
    for layer, module in enumerate(attention_modules(model)):
        module.register_forward_pre_hook(lambda *args, layer=layer: ran.append(layer))  # type: ignore[misc]
    with resumed(model, prefix, 2):
        answer_logits(model, sample)
    assert ran == [2]
    answer_logits(model, sample)
    assert ran == [2, 0, 1, 2]


def test_layers_that_return_tuples() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.self_attn = inner.self_attn
            self.whole = [inner]

        def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
            state = hidden[0] if isinstance(hidden, tuple) else hidden
            return self.whole[0](state, *args, **kwargs), "beside"

    model, sample = tiny_model("llama"), make_sample()
    layers: Any = model.model.layers
    last = layers[2]
    layers[0], layers[1] = Wrapped(layers[0]), Wrapped(layers[1])
    inner = last.forward
    last.forward = lambda hidden, *args, **kwargs: inner(hidden[0], *args, **kwargs)
    prefix, whole = record(model, lambda: answer_logits(model, sample))
    assert prefix.outputs[1][1] == "beside"
    with resumed(model, prefix, 2):
        assert torch.equal(answer_logits(model, sample), whole)


def test_the_model_is_as_before_after_an_error() -> None:
    model, sample = tiny_model("gemma2"), make_sample()
    before = answer_logits(model, sample)

    def fails() -> None:
        answer_logits(model, sample)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, fails)
    assert all(not module._forward_hooks for module in model.modules())
    prefix, _ = record(model, lambda: answer_logits(model, sample))

    def interrupted() -> None:
        with resumed(model, prefix, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all("forward" not in vars(module) for module in decoder_layers(model))
    other = make_sample(seed=1)
    assert not torch.equal(answer_logits(model, other), before)
    assert torch.equal(answer_logits(detach(model), sample), before)

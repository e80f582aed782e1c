"""Plans whose KV heads keep codes: training, compiled graphs, copies, padding and the routes of a decode step."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.cache.layer_blocks import LayerBlocks
from moacompress.runtime.decode import attention
from moacompress.runtime.decode.attention import attention_forward
from moacompress.runtime.decode.context import CONTEXT, LayerCall, LayerContext
from tests import oracle

MODULE: Any = types.SimpleNamespace(is_causal=True)
RULES = (Rule(4, 20, 0, "int8", "int4"), Rule(16, 0, 300, "native", "int8"), Rule(4, 0, 1024, "int4", "native"))
BACKENDS = (None, "reference", "counting", "triton")


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest, use_backend: Callable[[str], Any]) -> None:
    """What the machine has, and the others."""
    if request.param is not None:
        use_backend(request.param)


def attended(context: LayerContext, cache: Any, chunk: list[torch.Tensor], mask: Any = None) -> torch.Tensor:
    """Attention of a chunk's query, key and value as a layer has it, `[rows, tokens, heads, dim]`."""
    call: Any = {CONTEXT: LayerCall(context, cache)}
    return attention_forward(MODULE, chunk[0], chunk[1], chunk[2], mask, **call)[0]


def test_values_beyond_float16_are_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(attention, "_said", set())
    context = LayerContext.of(0, RULES, 16, None)
    chunk = [torch.randn(1, heads, 5, 8) for heads in (6, 3, 3)]
    wild = [chunk[0], chunk[1], chunk[2].clone()]
    wild[2][0, 2] *= 1e6  # a KV head whose values are native
    attended(context, None, chunk)
    attended(context, None, wild)
    wild[2][0, 0, 1] = torch.inf  # which codes keep, as NaN
    attended(context, None, wild)
    wild[2][0, 1, 3] = -30_000.0  # rotated one of them is -84,853
    attended(context, None, [part[:, :, 3:4] for part in wild])  # nothing is looked at in a step
    assert caplog.text == ""
    attended(context, None, wild)
    assert "values of layer 0, KV head 1, are beyond what the scales of int8 hold, float16 up to 65504" in caplog.text
    attended(context, None, wild)
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_pass_straight_through_the_rounding(padded: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, 70, 16, requires_grad=True) for heads in (6, 3, 3)]
    real = torch.ones(2, 70, dtype=torch.bool)
    if padded:
        real[1, 61:] = False
    context = LayerContext.of(0, RULES, 16, None)
    found = attended(context, None, tensors, real if padded else None)
    wanted = oracle.attend_under(RULES, 16, *tensors).transpose(1, 2).float()
    if padded:
        # a padded query sees nothing, but in the last column, which sees what the last real token does
        query = torch.cat((tensors[0][:, :, :60], tensors[0][:, :, -1:]), 2)
        ends = oracle.attend_under(RULES, 16, query, *(t[:, :, :61] for t in tensors[1:])).transpose(1, 2).float()
        wanted = torch.cat((wanted[1, :61], torch.zeros_like(wanted[1, :8]), ends[1, 60:]))[None]
        found = found[1:]
    assert (found - wanted).abs().max() < 1e-5
    weights = torch.randn_like(wanted)
    mine, theirs = (torch.autograd.grad((out * weights).sum(), tensors) for out in (found, wanted))
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() < 1e-5 * (1 + other.abs().max())
        assert other.abs().max() > 0


@pytest.mark.parametrize(
    ("dim", "dtype", "formats", "apart"),
    [
        (4, torch.float32, [("int4", "int4"), ("int4", "int8")], False),
        (4, torch.bfloat16, [("int4", "int4"), ("int4", "native")], False),
        (4, torch.bfloat16, [("int4", "int4"), ("int4", "int4")], True),
        (8, torch.bfloat16, [("int4", "int4"), ("int4", "native"), ("int4", "int8"), ("native", "int8")], True),
    ],
)
def test_a_compiled_step_needs_blocks_that_say_what_they_are(
    dim: int, dtype: torch.dtype, formats: list[tuple[str, str]], apart: bool
) -> None:
    """It takes any free block of as many bytes, which at four numbers a vector may be of other formats."""
    rules = RuleTable.of([Rule(4, 0, 1024, *each) for each in formats], 16)
    key = torch.randn(1, len(rules), 1, dim, dtype=dtype)
    held = LayerBlocks.none(rules, key, key)
    assert not held.has_memory_for(key)
    held.pool.reserve(np.bincount(held.pool.layout.of_head))
    assert held.has_memory_for(key) is apart
    assert not held.has_memory_for(key.double())

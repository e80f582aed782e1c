"""The profile's sums by Triton's interpreter, and its gradients by PyTorch's attention, beside its tiles in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moacompress.calibration.profile import influence
from moacompress.calibration.profile.collectors import BaselineSums, InfluenceSums
from moacompress.calibration.profile.influence import attend
from moacompress.calibration.profile.tiles import AttentionSpec
from moacompress.kernels import sdpa
from moacompress.kernels.arguments import Scores
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests.kernels.test_profile_kernel import SUMS, Case, Sizes, build, close


@pytest.fixture
def triton(use_backend: Callable[[str], Any]) -> Any:
    return use_backend("triton")


def dense(seed: int, dtype: torch.dtype, **fixed: Any) -> Case:
    """A random case without a plan, small enough for the interpreter."""
    return build(seed, dtype, planned=False, **{"n": 40 + 23 * seed % 110, "dim": (16, 33, 64)[seed % 3], **fixed})


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(5, 60))])
def test_sums(seed: int, triton: Any, use_backend: Callable[[str], Any]) -> None:
    """Groups, bounds, native windows and learned logits at random; cotangents that are 0 at many tokens too."""
    case = dense(seed, (torch.float32, torch.float32, torch.bfloat16)[seed % 3])
    found = InfluenceSums(*case.sizes)
    case.backward([found])
    use_backend("reference")
    wanted, sizes = InfluenceSums(*case.sizes), Sizes()
    case.exact().backward([wanted, sizes])
    rounding = SUMS if case.query.dtype == torch.float32 else 2e-2  # of the output, which D is told from
    close(found.squares, wanted.squares, 4 * rounding)
    close(found.total, wanted.total, 2 * rounding, torch.as_tensor(sizes.total, dtype=torch.float64).max())
    assert not found.squares[wanted.squares == 0].any()


def test_of_keys_in_several_tiles(triton: Any, use_backend: Callable[[str], Any]) -> None:
    """Windows that begin in every tile, sinks in two of them, and tiles that no rule looks into."""
    case = dense(3, torch.float32, n=290, dim=16, kv_heads=1, group=2, native=None, softcap=None, logits=True)
    rules = [Rule(sink, alpha, 0) for sink in (4, 70) for alpha in (16, 100, 200)] + [Rule(0, 0, 400)]
    case = replace(case, table=RuleTable.of([Rule.FULL, *rules], 16))
    found = InfluenceSums(*case.sizes)
    case.backward([found])
    use_backend("reference")
    wanted = InfluenceSums(*case.sizes)
    case.exact().backward([wanted])
    close(found.squares, wanted.squares, 4 * SUMS)


def test_what_needs_tiles_gets_them(triton: Any) -> None:
    """A collector that needs more than the sums has all of them made tile by tile."""
    case = dense(0, torch.float32, n=90)
    found, baselines = InfluenceSums(*case.sizes), BaselineSums(*case.sizes)
    case.backward([found, baselines])
    alone = InfluenceSums(*case.sizes)
    case.backward([alone])
    assert baselines.mass.any()
    close(alone.squares, found.squares, 4 * SUMS)


class _Called(TorchDispatchMode):
    """Notes operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Given(TorchFunctionMode):
    """Notes what `scaled_dot_product_attention` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((args, kwargs))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", [None, 9], ids=["", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_passes_are_pytorchs(
    dtype: torch.dtype, native: int | None, monkeypatch: pytest.MonkeyPatch, use_backend: Callable[[str], Any]
) -> None:
    """Forward and backward; one mask for a sliding window, and groups of heads where FlashAttention takes them."""
    use_backend("reference")
    case = build(1, dtype, planned=False, kv_heads=2, group=3, dim=16, n=40, native=native, softcap=None, logits=False)
    chunk, wanted = (case.query, case.key, case.value), case.exact().backward([])
    out = attend(case.query.double(), case.key.double(), case.value.double(), case.spec)
    monkeypatch.setattr(sdpa, "DEVICES", ("cpu",))
    with _Called() as called, _Given() as given:
        found = attend(*chunk, case.spec)
        gradients = case.backward([])
    error = 2e-5 if dtype == torch.float32 else 4e-2
    assert (found - out).abs().max() < error
    for mine, other in zip(gradients, wanted, strict=True):
        assert mine.dtype == dtype
        close(mine, other, error)
    groups = native is None and dtype == torch.bfloat16
    for args, kwargs in given.calls:
        assert kwargs["is_causal"] == (native is None)
        assert kwargs["enable_gqa"] == groups
        assert args[1].shape[1] == (2 if groups else 6)
        assert (args[3] is None) == (native is None)
    assert len(given.calls) == 2
    fused = [name for name in called.names if "flash_attention" in name]
    assert any(name.endswith("backward") for name in fused)
    assert "aten::_softmax" not in called.names


@pytest.mark.parametrize(
    ("spec", "logits"), [(AttentionSpec(0.25, softcap=30.0), None), (AttentionSpec(0.25), torch.zeros(2))]
)
def test_what_pytorchs_attention_cannot(spec: AttentionSpec, logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "DEVICES", ("cpu",))
    assert sdpa.suits(torch.zeros(1, 2, 3, 4), Scores(0.25))
    assert not sdpa.suits(torch.zeros(1, 2, 3, 4), spec.scores(logits))
    assert not sdpa.suits(torch.zeros(1, 2, 3, 4).double(), Scores(0.25))


@pytest.mark.parametrize(("softcap", "logits"), [(30.0, False), (None, True)], ids=["softcap", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_pytorchs_attention_has_not(
    dtype: torch.dtype,
    softcap: float | None,
    logits: bool,
    use_backend: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the kernels for prompts, beside the sums of theirs; nothing is done tile by tile in plain PyTorch."""
    case = dense(4, dtype, softcap=softcap, logits=logits, native=None)
    use_backend("reference")
    wanted = case.exact().backward([])
    use_backend("triton")
    monkeypatch.setattr(influence, "_views", None)
    collector = InfluenceSums(*case.sizes)
    error = 2e-5 if dtype == torch.float32 else 4e-2
    for mine, other in zip(case.backward([collector]), wanted, strict=True):
        assert mine.dtype == dtype
        close(mine, other, error)
    assert collector.squares.any()


def test_events() -> None:
    """Every window begins in an event of its tile of queries, and so does every tile with sinks that it sees."""
    from moacompress.kernels.triton.profile import outward

    rules = RuleTable.of([Rule.FULL, Rule(4, 0, 100), Rule(40, 30, 0), Rule(0, 90, 300)], 16, 150)
    plan = outward(rules, 333, 8, 32)
    for number, (events, count) in enumerate(zip(plan.events, plan.counts, strict=True)):
        mine = events[:count]
        rows = np.arange(8 * number, min(8 * number + 8, 333))
        begun = np.unique(plan.starts[:, rows] // 32)
        bottom, top = max(rows[0] - 149, 0) // 32, rows[-1] // 32
        assert set(mine) == {*begun[(begun >= bottom)], *range(bottom, min(2, top + 1))}
        assert (np.diff(mine) < 0).all()

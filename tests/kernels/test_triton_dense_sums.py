"""A dense layer's sums where some collectors need tiles and others do not, by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moacompress.calibration.profile.collectors import BaselineSums, InfluenceSums, TokenSums
from moacompress.calibration.profile.head_statistics import HeadSums
from moacompress.calibration.profile.tiles import TileView
from moacompress.kernels import sdpa
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests.kernels.test_profile_kernel import SUMS, Case, Sizes, build, close, with_gates


@pytest.fixture
def triton(use_backend: Callable[[str], Any]) -> Any:
    return use_backend("triton")


def dense(seed: int, **fixed: Any) -> Case:
    """A random case without a plan, small enough for the interpreter."""
    sizes = {"n": 40 + 23 * seed % 110, "dim": (16, 33, 64)[seed % 3]}
    return build(seed, torch.float32, planned=False, **{**sizes, **fixed})


def collectors(case: Case) -> list[Any]:
    """Influence, how heads attend, tokens as gates need them, and the estimators of others."""
    heads, rules = case.sizes
    return [
        InfluenceSums(heads, rules),
        HeadSums(heads),
        TokenSums(heads, case.key.shape[2], 5),
        BaselineSums(heads, rules),
    ]


@pytest.mark.parametrize("gates", [False, True], ids=["spans", "gates"])
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(4, 40))])
def test_every_collector_gets_its_own(seed: int, gates: bool, triton: Any, use_backend: Callable[[str], Any]) -> None:
    case = with_gates(dense(seed), seed) if gates else dense(seed)
    found = collectors(case)
    gradients = case.backward(found)
    use_backend("reference")
    wanted, sizes = collectors(case), Sizes()
    exact = case.exact().backward([*wanted, sizes])
    most = max(float(part.abs().max()) for part in exact)  # a window of one token leaves queries and keys no gradient
    for mine, other in zip(gradients, exact, strict=True):
        close(mine, other, 2e-5, most)
    largest = torch.as_tensor(sizes.total, dtype=torch.float64).max()
    close(found[0].squares, wanted[0].squares, 4 * SUMS)
    close(found[0].total, wanted[0].total, 2 * SUMS, largest)
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        for name, value in other.tensors().items():
            close(mine.tensors()[name], value, 1e-4)


def test_only_what_needs_tiles_has_them(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rules move, those that select too, is left to the kernels, and gradients to PyTorch, beside tiles for heads."""
    case = with_gates(dense(6, native=None, softcap=None, logits=False), 6)
    assert case.choices is not None
    assert (case.choices.of_rule >= 0).any()
    monkeypatch.setattr(TileView, "visible", None)
    monkeypatch.setattr(sdpa, "DEVICES", ("cpu",))
    given: list[Any] = []

    def gradients(*args: Any) -> tuple[int, int, int]:
        given.append(args)
        return 0, 0, 0

    monkeypatch.setattr(sdpa, "dense_gradients", gradients)
    influences, heads = InfluenceSums(*case.sizes), HeadSums(case.sizes[0])
    case.backward([influences, heads])
    assert influences.squares.any()
    assert heads.tensors()["entropy"].any()
    assert len(given) == 1


def test_selections_in_several_tiles(triton: Any, use_backend: Callable[[str], Any]) -> None:
    """Tokens that are evicted after many others, ties of scores, and sinks that reach into a second tile of keys."""
    case = dense(5, n=300, dim=16, kv_heads=2, group=2, native=None, softcap=None, logits=True, silent=False)
    rules = [Rule(sink, alpha, 0) for sink in (4, 70) for alpha in (16, 100)]
    case = with_gates(replace(case, table=RuleTable.of([Rule.FULL, *rules], 16)), 7)
    found = InfluenceSums(*case.sizes)
    case.backward([found])
    use_backend("reference")
    wanted = InfluenceSums(*case.sizes)
    case.exact().backward([wanted])
    assert case.choices is not None
    assert wanted.squares[:, case.choices.of_rule >= 0].any()
    close(found.squares, wanted.squares, 4 * SUMS)
    assert not found.squares[wanted.squares == 0].any()

"""Budgets of weights and cache together, on a tiny model: the bytes of what is exported, refusals, commands."""

from __future__ import annotations

import pytest

import moacompress.runtime.hf.loading  # noqa: F401
from moacompress.calibration.profile.profiler import profile
from moacompress.core.errors import BudgetError, InfeasibleBudgetError
from moacompress.models.source import load_source
from moacompress.models.weight_bytes import most_checkpoint_bytes
from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget
from moacompress.search.search_request import SearchRequest
from tests.cli.commands import answer, invoke, problem

LENGTH = 700


@pytest.fixture(scope="module")
def source(tiny_folder):
    return load_source(tiny_folder)


@pytest.fixture(scope="module")
def profiled(source, small_run, tmp_path_factory):
    recipe = Recipe.from_dict({**small_run, "budget": []}).override(search__trials=2)
    return profile(source, tmp_path_factory.mktemp("profile") / "profile", recipe)


def memory(size: int) -> str:
    return f"memory={size / 1024:.6f}KiB@{LENGTH}"


def test_what_cannot_fit_is_refused_with_the_numbers(source, profiled):
    weights = most_checkpoint_bytes(source.model, source.shape.dtype)
    whole = memory(weights + source.shape.dense_kv_bytes(LENGTH))
    request = SearchRequest.of(profiled, whole, profiled.recipe, model=source)
    cache = int(request.space().knapsack.sizes.min(axis=-1).sum())
    SearchRequest.of(profiled, memory(weights + cache + 1024), profiled.recipe, model=source)
    said = f"weights take {weights:,} as they are and the KV cache at least {cache:,} .*--weights int8 or int4"
    with pytest.raises(InfeasibleBudgetError, match=said):
        SearchRequest.of(profiled, memory(weights + cache - 1024), profiled.recipe, model=source)
    with pytest.raises(BudgetError, match="search. and .compress"):
        SearchRequest.of(profiled, whole, profiled.recipe)


@pytest.mark.parametrize("text", ["memory=50%@8k", "memory=1GiB", "memory=x@8k", "memory="])
def test_a_memory_that_is_none_is_refused(text):
    with pytest.raises(BudgetError, match="memory"):
        Budget.parse(text)


def test_commands(source, profiled, tmp_path):
    weights, plan = most_checkpoint_bytes(source.model, source.shape.dtype), tmp_path / "plan.json"

    def command(cache: int) -> list[str]:
        size = f"memory={(weights + cache) / 1024:.3f}KiB@{LENGTH}"
        return f"search {profiled.path} --budget {size} -o {plan} --trials 1 --formats native".split()

    def shown(*arguments: str) -> str:
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
        return " ".join(done.stdout.split())

    fits = command(source.shape.dense_kv_bytes(LENGTH) // 2)
    assert f"Weights take {weights:,} bytes as they are, which leaves" in shown(*fits, "--dry-run")
    assert not plan.exists()
    assert f"Memory at {LENGTH} tokens: weights" in shown(*fits)
    assert answer(*fits)["memory"][str(LENGTH)]["weights"] == weights
    assert f"Memory at {LENGTH} tokens: weights" in shown("inspect", str(plan))
    assert "as they are" in problem(*command(-1024))

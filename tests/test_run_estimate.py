"""What a run would take: steps add up, more work takes longer, and efforts are recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moacompress.efforts import effort_recipe
from moacompress.estimate.work import Kind
from moacompress.models.source import load_source
from moacompress.recipe import Recipe
from moacompress.run_estimate import estimate_run, measured_length
from moacompress.search.search_estimate import measurements, search_work
from tests.cli.commands import answer, invoke


@pytest.mark.parametrize("prose", [False, True])
def test_efforts_grow(prose: bool) -> None:
    quick, standard, thorough = (effort_recipe(name, prose=prose) for name in ("quick", "standard", "thorough"))
    for less, more in ((quick, standard), (standard, thorough)):
        assert less.calibration.samples < more.calibration.samples
        assert less.evaluation.prompts * len(less.evaluation.lengths) < more.evaluation.prompts * len(
            more.evaluation.lengths
        )
    for recipe in (quick, standard, thorough):
        assert recipe.calibration.sources
        assert recipe.evaluation.tasks
        assert any(source.haystack == "prose" for source in recipe.calibration.sources) == prose
        assert prose or recipe.calibration.text_samples == 0


def test_a_search_takes_what_its_steps_do() -> None:
    def measured(recipe: Recipe, validation: dict[int, int]) -> float:
        work = search_work(recipe, validation, recipe.calibration.answer_tokens)
        assert {part.kind for part in work} == {Kind.FORWARD}
        return sum(part.count * part.tokens for part in work)

    recipe = Recipe()
    more = recipe.override(search__trials=32)
    assert sum(measurements(more, 12).values()) > sum(measurements(recipe, 12).values())
    bare = recipe.override(search__trials=1, search__alternatives=False)
    # the dense model's own, a trial, and the plan that spends what is left of the budget
    assert measurements(bare, 12) == pytest.approx({"trials": 1.8, "leftover": 1.0})
    assert measured(bare, {100: 10, 500: 2, 900: 0}) == pytest.approx(2.8 * 2000)
    by_loss = bare.override(max_loss="1%")
    assert measured(by_loss, {100: 10}) == pytest.approx((8 * 1.8 + 2 * 2.8) * 1000)


def test_the_steps_of_a_run_add_up(tiny_folder: Path) -> None:
    data = {"lengths": [700, 800], "samples": 4, "validation_samples": 2}
    recipe = Recipe.from_dict({"model": str(tiny_folder), "budget": "50%", "calibration": data})
    found = estimate_run(recipe, load_source(tiny_folder))
    shown = found.to_dict()
    assert shown["total_seconds"] == pytest.approx(sum(shown["seconds"].values()), abs=0.3)
    assert set(shown["seconds"]) == {"profile", "search", "export", "eval"}
    assert "profile" in found.line()


def test_an_estimate_says_where_the_cache_is_measured(tiny_folder: Path) -> None:
    asked = {"calibration": {"lengths": [700]}, "evaluation": {"lengths": [1000]}}
    recipe = Recipe.from_dict({"budget": ["50%", "1GiB@64k"], **asked})
    assert measured_length(recipe) == 1000
    assert measured_length(recipe.override(budget=["50%@900"])) == 900
    assert measured_length(recipe.override(budget=["50%"])) == 700
    found = estimate_run(recipe, load_source(tiny_folder))
    assert found.to_dict()["measured_length"] == 1000
    assert (
        "the cache is measured at 1000 tokens, the most that this run reads, and not at 64k, where the budget"
        in found.line()
    )
    assert "measured at" not in estimate_run(recipe.override(budget=["50%@900"]), load_source(tiny_folder)).line()


def test_a_dry_run_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = "--budget 50% --effort quick --lengths 700 --dry-run"
    result = invoke("compress", tiny_folder, *asked.split(), "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "It would take about" in result.stdout
    assert not out.exists()


def test_search_and_eval_say_what_they_would_take(tiny_folder: Path, tmp_path: Path) -> None:
    profile, plan, model = tmp_path / "profile", tmp_path / "plan.json", tmp_path / "model"
    small = "--lengths 700 --samples 4 --validation-samples 2 --set profile.draws=1 --source needle"
    assert invoke("profile", tiny_folder, "-o", profile, *small.split()).exit_code == 0
    one, two = (answer("search", profile, "--budget", budget, "-o", plan, "--dry-run") for budget in ("50%", "50%,25%"))
    assert not plan.exists()
    assert (one["plans"], two["plans"]) == (1, 2)
    assert invoke("search", profile, "--budget", "50%", "-o", plan, "--trials", "1").exit_code == 0
    assert invoke("export", tiny_folder, plan, "-o", model).exit_code == 0
    ask = "--tasks needle-noise,key-value --lengths 700 --prompts 3 --dry-run --against dense,uniform"
    found = answer("eval", model, *ask.split())
    assert (found["models"], found["answers"]) == (5, 30)  # a uniform window is tried with each of three sinks
    assert found["seconds"] > 0

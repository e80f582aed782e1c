"""Checks of a whole run before anything is written or timed: of the request, its data, and the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moacompress.calibration.data.sample_sources import check_counts, check_data
from moacompress.calibration.profile.request import check_lengths, check_samples, rules_on_offer
from moacompress.core.errors import DataError, RecipeError, UsageError
from moacompress.evaluation.runner import check_request, task_names
from moacompress.evaluation.scoring.text import text_windows
from moacompress.evaluation.tasks.own_rows import answered_sources, own_tasks
from moacompress.evaluation.tasks.registry import Resources, find_task, make_cases
from moacompress.evaluation.tasks.task import TEXT
from moacompress.kernels.dispatch import check_formats
from moacompress.models.source import SourceModel
from moacompress.prompts.pools import Prose
from moacompress.recipe import Recipe
from moacompress.rules.asked_shares import AskedShares
from moacompress.rules.budget import Budget, any_memory
from moacompress.rules.candidates import in_formats
from moacompress.rules.limits import budget_limits, layer_floors
from moacompress.rules.loss import Loss, check_loss_samples
from moacompress.rules.model_shape import ModelShape
from moacompress.search.search_request import counted_weight_bytes, offered_formats


def check_recipe(recipe: Recipe) -> None:
    """Refuses a recipe that cannot be run, and data that cannot be used; no model is loaded.

    Raises:
        RecipeError: parts of it contradict each other.
        UsageError: an unknown task, or one that a run cannot have; or too few validation samples for a loss.
        UnsupportedError: a format of an installed package that the kernel does not keep.
        DataError: data missing, unreadable, empty, or without what is needed of it.
    """
    missing = [name for name in recipe.search.formats or () if name not in recipe.profile.formats]
    if missing:
        raise RecipeError(f"search.formats offers {missing[0]}, which profile.formats leaves out; add it there too")
    check_formats(offered_formats(recipe.profile.formats, recipe))
    if not AskedShares.parse(recipe.search.share).off and not recipe.profile.anchors:
        raise RecipeError("search.share needs to know what copies cost; add profile.anchors of 1 or more, such as 2")
    if recipe.max_loss is not None:
        check_loss_samples(Loss.parse(recipe.max_loss), recipe.calibration.validation_samples)
    names = task_names(recipe.evaluation.tasks)
    _refuse_squad(names)
    check_data(recipe)
    check_request(names, recipe.evaluation.lengths, recipe.evaluation.prompts, _resources(recipe))


def check_with_model(recipe: Recipe, source: SourceModel, profile: Path | None = None) -> None:
    """Refuses what only the loaded model tells: lengths, budgets, samples and prompts that cannot be.

    The model does not run. Samples of a profile in the folder `profile` may be used again.

    Raises:
        DataError: lengths that the model does not take, or samples or prompts that cannot be made.
        InfeasibleBudgetError: no plan fits.
        BudgetError: a floor for a layer that the model does not have.
    """
    evaluation = recipe.evaluation
    _check_prompts(recipe, source.context)
    _check_budgets(recipe, source.shape, source)
    check_samples(source, recipe, profile)
    mine = answered_sources(recipe.calibration.sources)
    resources = replace(_resources(recipe), own=own_tasks(mine, mine))
    for task in task_names((*resources.own, *evaluation.tasks), resources):
        for length in evaluation.lengths:
            if task != TEXT:
                make_cases(task, length, 1, recipe.seed, source.tokenizer, resources)
            elif resources.prose is not None:
                text_windows(resources.prose, source.tokenizer, length, evaluation.prompts, recipe.seed)


def check_with_shape(recipe: Recipe, shape: ModelShape, context: int) -> None:
    """Refuses what the shape of a model tells, where it has no weights; budgets of memory are left to `check_with_model`.

    The model's context is in tokens, 0 if it has none.

    Raises:
        DataError, InfeasibleBudgetError, BudgetError: as `check_with_model`.
    """
    _check_prompts(recipe, context)
    check_profiled(recipe, context)
    if not any_memory(recipe.budget):
        _check_budgets(recipe, shape, None)


def check_profiled(recipe: Recipe, context: int) -> None:
    """Refuses lengths that cannot be profiled, and fewer samples than lengths.

    Raises:
        DataError: says which.
    """
    asked = recipe.calibration
    check_lengths(context, recipe)
    check_counts(asked.lengths, asked.samples, context, "calibration")
    check_counts(asked.lengths, asked.validation_samples, context, "validation")


def _check_prompts(recipe: Recipe, context: int) -> None:
    longest = max(recipe.evaluation.lengths)
    if context and longest > context:
        raise DataError(
            f"the evaluation at the end asks for prompts of {longest:,} tokens, and the model takes at most "
            f"{context:,}; give --lengths, or evaluation.lengths in a recipe"
        )


def _check_budgets(recipe: Recipe, shape: ModelShape, source: SourceModel | None) -> None:
    """Where layers share, what that saves is known only by a profile."""
    floors = layer_floors(recipe.search.floors, shape)
    budgets = [Budget.parse(text) for text in recipe.budget]
    weights = counted_weight_bytes(budgets, rules_on_offer(recipe), shape, source)
    if not budgets or not AskedShares.parse(recipe.search.share).off:
        return
    spans = [rule for rule in rules_on_offer(recipe) if not rule.selects]
    rules = in_formats(spans, offered_formats(recipe.profile.formats, recipe))
    lengths, min_window = recipe.calibration.lengths, recipe.profile.min_window
    budget_limits(budgets, shape, lengths, rules, min_window, floors, weights=weights)


def _resources(recipe: Recipe) -> Resources:
    text = recipe.calibration.text
    return Resources(prose=Prose.load(text) if text is not None else None)


def _refuse_squad(tasks: Iterable[str]) -> None:
    asked = [name for name in tasks if name != TEXT and find_task(name).needs == "squad"]
    if asked:
        raise UsageError(
            f"task {asked[0]} needs SQuAD's questions, which a run does not take; leave it out, and measure it afterwards: "
            f"moacompress eval OUT --tasks {asked[0]} --squad FILE"
        )

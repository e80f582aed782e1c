"""What `compress` will take, all steps together, before any of them starts."""

from __future__ import annotations

import torch

from moacompress.calibration.profile.estimate import estimate_profile, profile_estimator, profile_work, sample_counts
from moacompress.core.progress import Progress
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.estimator import product_seconds
from moacompress.estimate.work import Kind, Work
from moacompress.evaluation.eval_estimate import eval_work
from moacompress.evaluation.tasks.registry import expand_tasks
from moacompress.exporter.exporting import export_seconds
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget, format_length, reference_length
from moacompress.rules.model_shape import ModelShape
from moacompress.search.search_estimate import search_work

COMPARED = ("dense", "best")
"""What `compress` evaluates beside the plan: dense, and the baseline that its search measured best."""


def asked_length(recipe: Recipe) -> int:
    """Returns the reference length of a run, tokens."""
    return reference_length([Budget.parse(text) for text in recipe.budget], recipe.calibration.lengths)


def measured_length(recipe: Recipe) -> int:
    """Returns the length at which a run measures the bytes of the cache, tokens.

    It is the reference length, or where that is beyond all else that the run reads, the longest of this.
    """
    return min(asked_length(recipe), max(*recipe.calibration.lengths, *recipe.evaluation.lengths))


def run_work(recipe: Recipe, shape: ModelShape, hidden: int, context: int) -> dict[str, list[Work]]:
    """Returns what the steps of a run that run the model do, by their names.

    `hidden` is how many numbers a token has between layers, `context` in tokens, 0 if the model has none.
    """
    counts, evaluation = sample_counts(recipe, context), recipe.evaluation
    prompts = {(task, n): evaluation.prompts for task in expand_tasks(evaluation.tasks) for n in evaluation.lengths}
    return {
        "profile": profile_work(recipe, counts, shape.layers, hidden),
        "search": search_work(
            recipe,
            {length: numbers.validation_samples for length, numbers in counts.items()},
            recipe.calibration.answer_tokens,
        ),
        "eval": eval_work(prompts, 1 + len(COMPARED)),
    }


def estimate_run(recipe: Recipe, source: SourceModel, progress: Progress | None = None) -> Estimate:
    """Estimates what `compress` would take. Nothing is written, and no data is read.

    Its facts are the `seconds` of every step, `total_seconds`, the estimate of its `profile`, and `measured_length`, where
    the cache is measured.

    Raises:
        ModelError: the model cannot be profiled.
        DataError: lengths that the model or the rules do not allow, or fewer samples than lengths.
    """
    estimator = profile_estimator(source, recipe)
    profile = estimate_profile(source, recipe, progress, estimator=estimator)
    asked, measured = asked_length(recipe), measured_length(recipe)
    hidden = source.model.config.get_text_config(decoder=True).hidden_size
    steps = {
        name: estimator.seconds(work) for name, work in run_work(recipe, source.shape, hidden, source.context).items()
    }
    steps["eval"] = (steps["eval"] + estimator.one(Kind.FORWARD, measured)) * _checkpoint_seconds(source)
    steps["export"] = export_seconds(profile.facts["weight_bytes"])
    steps = {name: steps[name] for name in ("profile", "search", "export", "eval")}
    total, peak = sum(steps.values()), profile.facts["peak_bytes"]
    parts = ", ".join(f"{name} {readable_seconds(taken)}" for name, taken in steps.items())
    return Estimate(
        seconds=total,
        text=(
            f"about {readable_seconds(total)} ({parts}), and about {readable_bytes(peak)} of memory; "
            f"estimated from short passes of the model{_elsewhere(asked, measured)}.",
        ),
        facts={
            "seconds": steps,
            "total_seconds": total,
            "peak_bytes": peak,
            "measured_length": measured,
            "profile": profile.to_dict(),
        },
        slowdown=estimator.watch.slowdown,
    )


def _checkpoint_seconds(source: SourceModel) -> float:
    """Returns what a pass in the checkpoint's dtype takes of one in the dtype that the model is profiled in."""
    model = source.model
    return product_seconds(model, getattr(torch, source.shape.dtype)) / product_seconds(model, model.dtype)


def _elsewhere(asked: int, measured: int) -> str:
    """Returns what is to be said of a budget at a length that the run has no time for."""
    if measured == asked:
        return ""
    return (
        f"; the cache is measured at {format_length(measured)} tokens, the most that this run reads, and not "
        f"at {format_length(asked)}, where the budget holds: its bytes there are computed"
    )

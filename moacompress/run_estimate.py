"""What `compress` will take, all steps together, before any of them starts."""

from __future__ import annotations

import torch

from moacompress.calibration.profile.estimate import dry_run as estimate_profile
from moacompress.core.progress import Progress
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.rates import product_seconds
from moacompress.evaluation.eval_estimate import eval_seconds
from moacompress.evaluation.tasks.registry import expand_tasks
from moacompress.exporter.export_estimate import export_seconds
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget, format_length, reference_length
from moacompress.runtime.ready_model import load_for
from moacompress.search.search_estimate import search_seconds

COMPARED = ("dense", "uniform", "best")
"""What `compress` evaluates beside the plan: dense, a uniform window, and the baseline that its search measured best."""


def asked_length(recipe: Recipe) -> int:
    """Returns the reference length of a run, tokens."""
    return reference_length([Budget.parse(text) for text in recipe.budget], recipe.calibration.lengths)


def measured_length(recipe: Recipe) -> int:
    """Returns the length at which a run measures the bytes of the cache, tokens.

    It is the reference length, or where that is beyond all else that the run reads, the longest of this.
    """
    return min(asked_length(recipe), max(*recipe.calibration.lengths, *recipe.evaluation.lengths))


def estimate_run(
    recipe: Recipe, model: str | SourceModel, progress: Progress | None = None, *, trust_remote_code: bool = False
) -> Estimate:
    """Estimates what `compress` would take. Nothing is written, and no data is read.

    Its facts are the `seconds` of every step, `total_seconds`, the estimate of its `profile`, and `measured_length`, where
    the cache is measured.

    Args:
        recipe: the run.
        model: MODEL, or the loaded model.
        progress: told of the timing.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.

    Raises:
        ModelError: the model cannot be loaded or profiled.
        DataError: lengths that the model or the rules do not allow, or fewer samples than lengths.
    """
    source = load_for(recipe, model, trust_remote_code=trust_remote_code)
    profile = estimate_profile(source, recipe, progress)
    assert profile.rates is not None
    asked, measured, evaluation = asked_length(recipe), measured_length(recipe), recipe.evaluation
    evaluated = eval_seconds(
        len(expand_tasks(evaluation.tasks)), evaluation.lengths, evaluation.prompts, 1 + len(COMPARED), profile.rates
    )
    evaluated += profile.rates.forward(measured)
    steps = {
        "profile": profile.seconds,
        "search": search_seconds(recipe, [(part.validation_samples, part.forward_seconds) for part in profile.lengths]),
        "export": export_seconds(profile.weight_bytes),
        "eval": evaluated * _checkpoint_seconds(source),
    }
    total = sum(steps.values())
    parts = ", ".join(f"{name} {readable_seconds(taken)}" for name, taken in steps.items())
    return Estimate(
        seconds=total,
        text=(
            f"about {readable_seconds(total)} ({parts}), and about {readable_bytes(profile.peak_bytes)} of memory; "
            f"estimated from short passes of the model{_elsewhere(asked, measured)}.",
        ),
        facts={
            "seconds": steps,
            "total_seconds": total,
            "peak_bytes": profile.peak_bytes,
            "measured_length": measured,
            "profile": profile.to_dict(),
        },
        slowdown=profile.slowdown,
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

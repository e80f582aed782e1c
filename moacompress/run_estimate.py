"""What `compress` will take, all steps together, before any of them starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moacompress.calibration.estimate import ProfileEstimate
from moacompress.calibration.estimate import dry_run as estimate_profile
from moacompress.core.progress import Progress
from moacompress.core.stopwatch import busy_note
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.evaluation.eval_estimate import eval_seconds
from moacompress.evaluation.tasks import expand_tasks
from moacompress.exporter.export_estimate import export_seconds
from moacompress.models.device import stopwatch_on
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget, format_length, reference_length
from moacompress.runtime.linear import weight_of
from moacompress.runtime.ready_model import load_for
from moacompress.search.search_estimate import search_seconds

EVALUATED = 3
"""Models that `compress` evaluates: the plan, dense, and a uniform window."""

ROWS, TURNS = 256, 3
"""Of the product that two dtypes are compared by, and how often it is timed."""


@dataclass(frozen=True)
class RunEstimate:
    """What a run will take.

    Attributes:
        profile: its first step.
        search_seconds: for the search.
        export_seconds: for writing the checkpoint and loading it.
        eval_seconds: for the evaluation, and for measuring the cache.
        reference_length: where the budget holds, tokens.
        measured_length: where the cache is measured.
    """

    profile: ProfileEstimate
    search_seconds: float
    export_seconds: float
    eval_seconds: float
    reference_length: int
    measured_length: int

    @property
    def seconds(self) -> float:
        """All of the time."""
        return self.profile.seconds + self.search_seconds + self.export_seconds + self.eval_seconds

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values: `seconds` of every step and in all, and the estimate of the profile."""
        steps = {
            "profile": self.profile.seconds,
            "search": self.search_seconds,
            "export": self.export_seconds,
            "eval": self.eval_seconds,
        }
        return {
            "estimate": True,
            "seconds": {name: round(seconds, 1) for name, seconds in steps.items()},
            "total_seconds": round(self.seconds, 1),
            "slowdown": round(self.profile.slowdown, 2),
            "peak_bytes": self.profile.peak_bytes,
            "measured_length": self.measured_length,
            "profile": self.profile.to_dict(),
        }

    def line(self) -> str:
        """Returns one sentence, without its end, and a second one where the machine is busy."""
        busy = busy_note(self.seconds, self.profile.slowdown)
        parts = ", ".join(f"{name} {readable_seconds(taken)}" for name, taken in self.to_dict()["seconds"].items())
        return (
            f"about {readable_seconds(self.seconds)} ({parts}), and about {readable_bytes(self.profile.peak_bytes)} of memory; "
            f"estimated from short passes of the model{self._elsewhere()}"
            + ("" if busy is None else f". {busy.removesuffix('.')}")
        )

    def _elsewhere(self) -> str:
        """Returns what is to be said of a budget at a length that the run has no time for."""
        if self.measured_length == self.reference_length:
            return ""
        return (
            f"; the cache is measured at {format_length(self.measured_length)} tokens, the most that this run reads, and not "
            f"at {format_length(self.reference_length)}, where the budget holds: its bytes there are computed"
        )


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
) -> RunEstimate:
    """Estimates what `compress` would take. Nothing is written, and no data is read.

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
    evaluation = recipe.evaluation
    tasks = expand_tasks(evaluation.tasks)
    faster = _products(source, getattr(torch, source.shape.dtype)) / _products(source, source.model.dtype)
    forward = _scaled(profile, "forward_seconds", faster, per_token=True)
    measured = measured_length(recipe)
    return RunEstimate(
        profile,
        search_seconds(recipe, [(part.validation_samples, part.forward_seconds) for part in profile.lengths]),
        export_seconds(profile.weight_bytes),
        eval_seconds(
            len(tasks),
            evaluation.lengths,
            evaluation.prompts,
            EVALUATED,
            forward,
            _scaled(profile, "decode_seconds", faster, per_token=False),
        )
        + forward(measured),
        asked_length(recipe),
        measured,
    )


def _products(source: SourceModel, dtype: torch.dtype) -> float:
    """Returns the seconds of one of the model's products of matrices in a dtype."""
    linear = max(
        (module for module in source.model.modules() if isinstance(module, torch.nn.Linear)),
        key=lambda module: min(module.in_features, module.out_features),
    )
    weight = weight_of(linear).detach().to(dtype)
    x = torch.ones(ROWS, weight.shape[1], dtype=dtype, device=weight.device)
    return stopwatch_on(weight.device).least(lambda: torch.nn.functional.linear(x, weight), TURNS)


def _scaled(profile: ProfileEstimate, name: str, faster: float, *, per_token: bool) -> Callable[[int], float]:
    """Returns a time by length, from the nearest length that was timed, times `faster`."""

    def seconds(length: int) -> float:
        part = min(profile.lengths, key=lambda part: abs(part.length - length))
        value: float = getattr(part, name) * faster
        return value * length / part.length if per_token else value

    return seconds

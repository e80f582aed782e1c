"""What a search will take, from what a forward pass takes: an estimate, for a person who wonders whether to wait.

Its unit is one measurement of a plan: a forward pass of every validation sample. How many each step takes follows from the
recipe; what pruned trials save is a mean over searches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moacompress.calibration.profile.estimate import profile_bytes, profile_estimator, sample_counts
from moacompress.calibration.profile.store import Profile
from moacompress.core.progress import SILENT, Progress
from moacompress.core.tables import readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.work import Kind, Work
from moacompress.recipe import Recipe
from moacompress.rules.budget import any_memory, bytes_at
from moacompress.runtime.ready_model import load_for
from moacompress.search.baselines.measured import CANDIDATES, CLOSE, FINALISTS, SCREENED
from moacompress.search.search_request import SearchRequest

PRUNED = 0.8
"""Share of a trial's samples that is measured, mean: one that is hopeless is pruned."""
LOST = 0.5
"""Share of the other samples that a finalist among baselines is measured on, mean: most have lost after a few."""
FAMILIES = 3
"""Families of plans that need no search, without the one of gates."""
SCOUTS = 8
"""Budgets between the smallest and all bytes at which a loss is tried by the surrogate's own plan, at most."""
SEARCHES = 2
"""Whole searches of a loss, at most: somewhat below the smallest budget at which the surrogate's own plan held, and there."""


def measurements(recipe: Recipe, samples: int) -> dict[str, float]:
    """Returns how many measurements each stage of a search takes, in their order."""
    search = recipe.search
    families = (FAMILIES + (recipe.profile.gates and search.gates)) if search.alternatives else 0
    screened = CANDIDATES * min(SCREENED, samples) / samples
    finals = LOST * (1 + (FINALISTS - 1) / CLOSE / 2)
    stages = {
        "trials": 1 + PRUNED * search.trials,  # and the dense model's own passes
        "leftover": 1.0,
        "baselines": families * (screened + finals),
        "class limit": float(search.classes is not None and search.alternatives),
    }
    return {name: count for name, count in stages.items() if count}


def search_work(recipe: Recipe, validation: Mapping[int, int], targets: int) -> list[Work]:
    """Returns what the search of a plan runs, of `validation[length]` samples with so many answer tokens (`targets`)."""
    count = sum(measurements(recipe, sum(validation.values())).values())
    if recipe.max_loss is not None:
        count = SCOUTS * (1 + PRUNED) + SEARCHES * count
    return [
        Work(Kind.FORWARD, length, samples * count, targets)
        for length, samples in validation.items()
        if samples * count
    ]


def estimate_search(
    profile: Profile,
    recipe: Recipe,
    asked: Sequence[Sequence[str]] = (),
    progress: Progress | None = None,
    *,
    trust_remote_code: bool = False,
) -> Estimate:
    """Returns what a search would take, of each plan alone; `asked` are the budgets of several plans.

    Raises:
        ModelError: the model cannot be loaded.
        BudgetError: a budget of memory that does not fit.
    """
    source, progress = load_for(recipe, profile.source, trust_remote_code=trust_remote_code), progress or SILENT
    plans = max(1, len(asked))
    memory = [
        memory_text(SearchRequest.of(profile, budgets, recipe, model=source))
        for budgets in asked or [recipe.budget]
        if any_memory(budgets)
    ]
    counts = sample_counts(profile.recipe, source.context)
    samples = {length: numbers.validation_samples for length, numbers in counts.items()}
    work = search_work(recipe, samples, profile.recipe.calibration.answer_tokens)
    progress.start("timing short passes", 2)
    peak = max(profile_bytes(source, profile.recipe, counts).values())
    progress.step("memory")
    estimator = profile_estimator(source, profile.recipe)
    seconds = plans * estimator.seconds(work)
    progress.step("time")
    progress.done()
    timeout, each = recipe.search.timeout, f" for {plans} plans" if plans > 1 else ""
    late = timeout is not None and seconds > timeout
    stop = f", and --timeout would stop it after {readable_seconds(timeout)}" if timeout is not None and late else ""
    return Estimate(
        seconds=seconds,
        text=(
            *memory,
            f"It would take about {readable_seconds(seconds)}{each}{stop}. Nothing was searched.",
        ),
        facts={"plans": plans, "peak_bytes": peak},
        slowdown=estimator.watch.slowdown,
    )


def memory_text(request: SearchRequest) -> str:
    """Returns what weights take of a budget of memory, and what that leaves to the cache."""
    assert request.weight_bytes is not None
    leaves = "; ".join(bytes_at(limit, n) for n, limit in request.limits.items())
    return f"Weights take {request.weight_bytes:,} bytes as they are, which leaves {leaves}."

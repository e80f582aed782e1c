"""What a search will take, from what a forward pass takes: an estimate, for a person who wonders whether to wait.

Its unit is one measurement of a plan: a forward pass of every validation sample. How many each step takes follows from the
recipe; what pruned trials save, and what changes that begin late in the model save, is a mean over searches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moacompress.calibration.profile.estimate import dry_run
from moacompress.calibration.profile.store import Profile
from moacompress.core.progress import Progress
from moacompress.core.tables import readable_seconds
from moacompress.estimate.devices import on_devices
from moacompress.estimate.estimate import Estimate
from moacompress.recipe import Recipe
from moacompress.rules.budget import any_memory, bytes_at
from moacompress.runtime.ready_model import load_for
from moacompress.search.baselines.measured import CANDIDATES, CLOSE, FINALISTS, SCREENED
from moacompress.search.search_request import SearchRequest

PRUNED = 0.8
"""Share of a trial's samples that is measured, mean: one that is hopeless is pruned."""
ABLATION = 0.15
"""What one KV head's ablation takes of a measurement, mean: few samples, and only the layers from its own on."""
MOVE = 0.5
"""What a move of one KV head takes of a measurement, mean."""
PASSES = 4.0
"""What profiling a sample around a plan takes of a forward pass."""
FAMILIES = 3
"""Families of plans that need no search, without the one of gates."""


SCOUTS = 8
"""Budgets between the smallest and all bytes at which a loss is tried by the surrogate's own plan, at most."""
SEARCHES = 2
"""Whole searches of a loss, at most: somewhat below the smallest budget at which the surrogate's own plan held, and there."""


def measurements(recipe: Recipe, samples: int) -> dict[str, float]:
    """Returns how many measurements each stage of a search takes, in their order; a profile around a plan counts as several.

    Args:
        recipe: of the search.
        samples: that plans are measured on.
    """
    search = recipe.search
    families = (FAMILIES + (recipe.profile.gates and search.gates)) if search.alternatives else 0
    screened = CANDIDATES * min(SCREENED, samples) / samples
    finals = 1 + (FINALISTS - 1) / CLOSE / 2
    around = search.round_samples * PASSES / samples
    stages = {
        "calibration": ABLATION * search.ablations,
        "baselines": families * (screened + finals),
        "trials": 1 + PRUNED * search.trials,  # and the dense model's own passes
        "rounds": search.rounds * (PRUNED * search.round_trials + around),
        "moves": MOVE * search.moves,
        "leftover": 1.0,
        "class limit": float(search.classes is not None and search.alternatives),
    }
    return {name: count for name, count in stages.items() if count}


def search_seconds(recipe: Recipe, forwards: Iterable[tuple[int, float]]) -> float:
    """Returns about how long a search takes, seconds.

    Args:
        recipe: of the search.
        forwards: numbers of validation samples, each with the seconds of a forward pass at their length.
    """
    counted = [(count, seconds) for count, seconds in forwards if count]
    samples = sum(count for count, _ in counted)
    whole = sum(count * seconds for count, seconds in counted)
    searched = sum(measurements(recipe, samples).values()) * whole
    return searched if recipe.max_loss is None else SCOUTS * (1 + PRUNED) * whole + SEARCHES * searched


def search_seconds_on(recipe: Recipe, forwards: Iterable[tuple[int, float]], devices: int) -> float:
    """Returns the same with a worker on each of several devices.

    Trial 0 is alone, and at the end of the trials, of each round and of the moves workers wait for the last plan that is
    measured: each of these takes one measurement that is not divided.

    Args:
        recipe: of the search.
        forwards: see `search_seconds`.
        devices: how many workers there are.
    """
    counted = list(forwards)
    alone, one = search_seconds(recipe, counted), sum(count * seconds for count, seconds in counted)
    waits = min((2 + recipe.search.rounds + (recipe.search.moves > 0)) * one, alone)
    return waits + (alone - waits) / devices


def estimate_search(
    profile: Profile,
    recipe: Recipe,
    asked: Sequence[Sequence[str]] = (),
    progress: Progress | None = None,
    *,
    devices: int = 1,
    trust_remote_code: bool = False,
) -> Estimate:
    """Returns what a search would take, of each plan alone.

    Args:
        profile: what is searched.
        recipe: of the search.
        asked: budgets of each of several plans; by default one, of the recipe's.
        progress: told of the timing.
        devices: workers that share it, each on a device as fast as this one.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.

    Raises:
        ModelError: the model cannot be loaded.
        BudgetError: a budget of memory that does not fit.
    """
    source = load_for(recipe, profile.source, trust_remote_code=trust_remote_code)
    plans = max(1, len(asked))
    memory = [
        memory_text(SearchRequest.of(profile, budgets, recipe, model=source))
        for budgets in asked or [recipe.budget]
        if any_memory(budgets)
    ]
    timed = dry_run(source, profile.recipe, progress)
    forwards = [(part.validation_samples, part.forward_seconds) for part in timed.lengths]
    seconds, timeout = plans * search_seconds(recipe, forwards), recipe.search.timeout
    each = f" for {plans} plans" if plans > 1 else ""
    late = timeout is not None and seconds > timeout
    stop = f", and --timeout would stop it after {readable_seconds(timeout)}" if timeout is not None and late else ""
    together = plans * search_seconds_on(recipe, forwards, devices)
    said, found = on_devices(seconds, together, devices, timed.peak_bytes) if devices > 1 else ("", {})
    return Estimate(
        seconds=seconds,
        text=(
            *memory,
            f"It would take about {readable_seconds(seconds)}{each}{stop}. Nothing was searched.",
            *([said] if said else []),
        ),
        facts={"plans": plans, "peak_bytes": timed.peak_bytes, **found},
        slowdown=timed.slowdown,
    )


def memory_text(request: SearchRequest) -> str:
    """Returns what weights take of a budget of memory, and what that leaves to the cache."""
    assert request.weight_bytes is not None
    leaves = "; ".join(bytes_at(limit, n) for n, limit in request.limits.items())
    return f"Weights take {request.weight_bytes:,} bytes as they are, which leaves {leaves}."

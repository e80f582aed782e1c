"""What a search will take, from what a forward pass takes: an estimate, for a person who wonders whether to wait.

Its unit is one measurement of a plan: a forward pass of every validation sample. How many each step takes follows from the
recipe; what is saved where a trial is given up half-way, or where a change begins late in the model, is a mean over searches.
"""

from __future__ import annotations

from collections.abc import Iterable

from moacompress.recipe import Recipe
from moacompress.search.alternatives import CANDIDATES, CLOSE, FINALISTS, SCREENED

PRUNED = 0.8
"""Share of a trial's samples that is measured, mean: one that is hopeless is given up."""
ABLATION = 0.15
"""What one KV head's ablation takes of a measurement, mean: few samples, and only the layers from its own on."""
MOVE = 0.5
"""What a move of one KV head takes of a measurement, mean."""
PASSES = 4.0
"""What profiling a sample around a plan takes of a forward pass."""
FAMILIES = 3
"""Families of plans that need no search, without the one of gates."""


def measurements(recipe: Recipe, samples: int) -> float:
    """Returns how many measurements a search takes, but for its rounds' profiles.

    Args:
        recipe: of the search.
        samples: that plans are measured on.
    """
    search = recipe.search
    families = (FAMILIES + (recipe.profile.gates and search.gates)) if search.alternatives else 0
    screened = CANDIDATES * min(SCREENED, samples) / samples
    finals = 1 + (FINALISTS - 1) / CLOSE / 2
    rounds = search.rounds * search.round_trials
    return (
        1
        + PRUNED * (search.trials + rounds)
        + ABLATION * search.ablations
        + MOVE * search.moves
        + families * (screened + finals)
    )


def search_seconds(recipe: Recipe, forwards: Iterable[tuple[int, float]]) -> float:
    """Returns about how long a search takes, seconds.

    Args:
        recipe: of the search.
        forwards: numbers of validation samples, each with the seconds of a forward pass at their length.
    """
    counted = [(count, seconds) for count, seconds in forwards if count]
    samples = sum(count for count, _ in counted)
    whole = sum(count * seconds for count, seconds in counted)
    rounds = recipe.search.rounds * recipe.search.round_samples * PASSES * whole / samples
    return measurements(recipe, samples) * whole + rounds

"""What a search is asked for, and the fingerprint that it is resumed by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from moacompress.calibration.samples import fingerprint_samples
from moacompress.calibration.statistics import OF_FORMATS
from moacompress.calibration.store import Profile
from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import UsageError
from moacompress.core.files import fingerprint
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget
from moacompress.rules.cost import budget_limits, layer_floors
from moacompress.search.knapsack import Knapsack, total_cost
from moacompress.search.knobs import Knobs
from moacompress.search.quadratic import Quadratic
from moacompress.search.surrogate import Surrogate

Knob: TypeAlias = Mapping[str, float]

MIN_ROWS = 32
"""Draws of all samples below which the quadratic form says nothing."""
SEARCH_VERSION = 5
"""Part of a study's name: raised when the same request would be searched in another way."""


def offered_formats(profiled: tuple[str, ...], recipe: Recipe) -> tuple[str, ...]:
    """Returns the formats of keys and values that a search offers beside the native one.

    They are those of the recipe, or else all that were profiled and that the estimator knows of.
    """
    asked = recipe.search.formats
    if asked is not None:
        return asked
    return profiled if recipe.profile.estimator in OF_FORMATS else ()


@dataclass(frozen=True)
class SearchRequest:
    """What is asked for, known before the model is loaded.

    Attributes:
        profile: the profile, with the formats on offer that the recipe asks for.
        recipe: the resolved recipe.
        asked: the budgets as given.
        limits: most KV bytes at every length that the budgets restrict.
        surrogate: not yet calibrated.
        starts: knobs that are tried right after the neutral ones.
        computes_in: the dtype that the model computes in, on which what it measures depends.
    """

    profile: Profile
    recipe: Recipe
    asked: tuple[str, ...]
    limits: dict[int, int]
    surrogate: Surrogate
    starts: tuple[Knob, ...]
    computes_in: str

    @staticmethod
    def of(
        profile: Profile,
        budget: str | Sequence[str] | None,
        recipe: Recipe,
        starts: Sequence[Knob] = (),
        model: SourceModel | None = None,
    ) -> SearchRequest:
        """Reads the budgets and the profile.

        Args:
            profile: finished.
            budget: as `find_plan` takes it.
            recipe: the run.
            starts: knobs that are tried right after the neutral ones.
            model: the model where it is loaded already; by default it will be as the recipe says.

        Raises:
            BudgetError: as `find_plan`.
            InfeasibleBudgetError: as `find_plan`.
            UsageError: a profile around a plan, or formats that it says nothing of.
        """
        profile = profile.offering(offered_formats(profile.profiled_formats, recipe))
        asked = recipe.budget if budget is None else (budget,) if isinstance(budget, str) else tuple(budget)
        budgets = [Budget.parse(text) for text in asked]
        floors = layer_floors(recipe.search.floors, profile.shape)
        limits = budget_limits(budgets, profile.shape, profile.lengths, profile.rules, profile.min_window, floors)
        if profile.around:
            raise UsageError(
                f"the profile in {profile.path} is of changes around a plan; search in one of the dense model"
            )
        influence = profile.blended(recipe.profile.estimator, recipe.search.text_weight)
        surrogate = Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths))
        loaded_in = profile.shape.dtype if recipe.dtype == "auto" else recipe.dtype
        computes_in = loaded_in if model is None else model.computes_in
        return SearchRequest(profile, recipe, asked, limits, surrogate, tuple(starts), computes_in)

    @cached_property
    def key(self) -> str:
        """Fingerprint of all that decides the result but for how long the search may take."""
        search = self.recipe.search
        in_other = self.computes_in != self.profile.shape.dtype
        return fingerprint(
            {
                "version": SEARCH_VERSION,
                "profile": self.profile.fingerprint,
                "validation": fingerprint_samples(self.profile.validation),
                "limits": [[n, limit] for n, limit in self.limits.items()],
                "estimator": self.recipe.profile.estimator,
                "text_weight": search.text_weight,
                "solver": search.solver,
                "ablations": search.ablations,
                "rounds": [search.rounds, *([search.round_samples, search.round_trials] if search.rounds else [])],
                "moves": search.moves,
                "floors": search.floors,
                "alternatives": search.alternatives,
                "starts": [dict(knobs) for knobs in self.starts],
                "moa": "moa" in self.profile.offering(()).estimators,
                "seed": self.recipe.seed,
                **({"formats": self.profile.formats} if self.profile.formats else {}),
                **({"computes_in": self.computes_in} if in_other else {}),
            }
        )

    @property
    def knobs(self) -> Knobs:
        """What the study tunes."""
        profile = self.profile
        return Knobs(profile.shape.layers, profile.lengths, self.quadratic is not None, bool(profile.formats))

    @cached_property
    def quadratic(self) -> Quadratic | None:
        """What KV heads do together, where the profile has enough samples to say it."""
        samples, draws = self.profile.statistics.arrays["total"].shape[:2]
        return Quadratic.of(self.profile, self.recipe.search.text_weight) if samples * draws >= MIN_ROWS else None

    def choice(self, surrogate: Surrogate, knapsack: Knapsack, knobs: Knob) -> Ints:
        """Returns the rule of every KV head that the solver chooses under some knobs, int64 `[layers, kv_heads]`.

        Args:
            surrogate: calibrated.
            knapsack: bytes and limits.
            knobs: values of `knobs`.
        """
        choice = knapsack.choose(self.knobs.bend(surrogate, knobs))
        share = knobs.get("coherence", 0.0)
        if self.quadratic is None or not share:
            return choice
        return self.quadratic.refined(choice, self.bent(surrogate, knobs, choice), share, knapsack)

    def bent(self, surrogate: Surrogate, knobs: Knob, choice: Ints) -> Floats:
        """Returns the bent costs in nats, `[layers, kv_heads, rules]`: of bending only ratios count, so they are scaled.

        Args:
            surrogate: calibrated.
            knobs: values of `knobs`.
            choice: the choice whose total is the surrogate's own.
        """
        bent = self.knobs.bend(surrogate, knobs)
        return bent * (total_cost(surrogate.raw(), choice) / max(total_cost(bent, choice), 1e-300))

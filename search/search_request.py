"""What a search is asked for, and the fingerprint that it is resumed by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch

from moacompress.calibration.data.samples import fingerprint_samples
from moacompress.calibration.profile.statistics import ROBUST
from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Ints
from moacompress.core.errors import UsageError
from moacompress.core.files import fingerprint
from moacompress.core.progress import Progress
from moacompress.kernels.dispatch import check_formats
from moacompress.models.source import SourceModel
from moacompress.models.weight_bytes import most_checkpoint_bytes
from moacompress.recipe import Recipe
from moacompress.repair.copies import repaired_copies
from moacompress.repair.plans import repair_samples
from moacompress.repair.projections import Weights
from moacompress.rules.budget import Budget, memory_budgets
from moacompress.rules.limits import Limits, budget_limits, layer_floors
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares
from moacompress.search.predict.search_parameters import SearchParameters
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.problem.knapsack import total_cost
from moacompress.search.problem.plan_space import PlanSpace
from moacompress.search.problem.quadratic import Quadratic
from moacompress.search.sharing.share_choice import ShareChoice

ParameterValues: TypeAlias = Mapping[str, float]

MIN_ROWS = 32
"""Draws of all samples below which the quadratic form says nothing."""
SEARCH_VERSION = 6
"""Part of a study's name: raised when the same request would be searched in another way."""


def offered_formats(profiled: tuple[str, ...], recipe: Recipe) -> tuple[str, ...]:
    """Returns the formats of keys and values that a search offers beside the native one.

    They are those of the recipe, or else all that were profiled.
    """
    return profiled if recipe.search.formats is None else recipe.search.formats


def offered(profile: Profile, recipe: Recipe) -> Profile:
    """Returns the profile with the rules that a search offers: formats, and whether gates select.

    Layers that share attention have no gates.
    """
    if not recipe.search.gates or recipe.search.share != "off":
        profile = profile.without_gates()
    return profile.offering(offered_formats(profile.profiled_formats, recipe))


def counted_weight_bytes(
    budgets: Iterable[Budget], rules: Iterable[Rule], shape: ModelShape, source: SourceModel | None
) -> int | None:
    """Returns the bytes of weights that budgets of memory count; None where there is no such budget, or no model is loaded.

    Gates of rules that select are weights too.
    """
    if source is None or not memory_budgets(budgets):
        return None
    gated = shape if any(rule.selects for rule in rules) else None
    return most_checkpoint_bytes(source.model, shape.dtype, gated)


def _check_classes(most: int | None, shape: ModelShape) -> None:
    """Refuses a limit of classes that no plan of the model can keep.

    Raises:
        UsageError: fewer classes than different sliding windows.
    """
    windows = [str(native or "none") for native in dict.fromkeys(shape.native_windows)]
    if most is not None and most < len(windows):
        raise UsageError(
            f"a plan of this model has at least {len(windows)} classes of KV heads: its layers have {len(windows)} kinds of "
            f"sliding windows of their own ({', '.join(windows)}); ask for --classes {len(windows)} or more"
        )


@dataclass(frozen=True)
class SearchRequest:
    """What is asked for, known before the model is loaded.

    Attributes:
        profile: the profile, with the formats on offer that the recipe asks for.
        recipe: the resolved recipe.
        asked: the budgets as given.
        limits: of the budgets.
        surrogate: what rules are predicted to cost.
        starts: parameters that are tried right after the neutral ones.
        computes_in: the dtype that the model computes in, on which what it measures depends.
        sharing: which layers may share attention, and what that is predicted to cost; None where none is to.
        weight_bytes: what the weights take, where a budget counts them.
    """

    profile: Profile
    recipe: Recipe
    asked: tuple[str, ...]
    limits: Limits
    surrogate: Surrogate
    starts: tuple[ParameterValues, ...]
    computes_in: str
    sharing: ShareChoice | None = None
    weight_bytes: int | None = None

    @staticmethod
    def of(
        profile: Profile,
        budget: str | Sequence[str] | None,
        recipe: Recipe,
        starts: Sequence[ParameterValues] = (),
        model: SourceModel | None = None,
    ) -> SearchRequest:
        """Reads the budgets and the profile.

        The model is given where it is loaded already; by default it will be as the recipe says. Budgets of memory need it.

        Raises:
            BudgetError: as `find_plan`; or a budget of memory, and no model.
            InfeasibleBudgetError: as `find_plan`.
            UsageError: formats or copies that the profile says nothing of, or fewer classes than the model
                has kinds of sliding windows.
            PlanError: layers that cannot share.
            UnsupportedError: a format of an installed package that the kernel does not keep.
        """
        profile = offered(profile, recipe)
        check_formats({name for rule in profile.rules for name in (rule.key_format, rule.value_format)})
        asked = recipe.budget if budget is None else (budget,) if isinstance(budget, str) else tuple(budget)
        budgets = [Budget.parse(text) for text in asked]
        _check_classes(recipe.search.classes, profile.shape)
        weight_bytes = counted_weight_bytes(budgets, profile.rules, profile.shape, model)
        sharing = ShareChoice.of(profile, recipe)
        shares = () if sharing is None else sharing.fixed
        limits = budget_limits(
            budgets,
            profile.shape,
            profile.lengths,
            profile.rules,
            profile.min_window,
            layer_floors(recipe.search.floors, profile.shape),
            shares,
            weight_bytes,
        )
        influence = profile.blended(ROBUST)
        surrogate = Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths))
        loaded_in = profile.shape.dtype if recipe.dtype == "auto" else recipe.dtype
        computes_in = loaded_in if model is None else model.computes_in
        return SearchRequest(
            profile,
            recipe,
            asked,
            limits,
            surrogate,
            tuple(starts),
            computes_in,
            sharing,
            weight_bytes,
        )

    @cached_property
    def lengths(self) -> list[int]:
        """The lengths that the budgets restrict, tokens, ascending."""
        return list(self.limits)

    @property
    def measures_moa(self) -> bool:
        """Whether MoA's estimator is a baseline: it was asked for, and the profile has it, which an audit may have added."""
        return self.recipe.profile.baselines and "moa" in self.profile.offering(()).estimators

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
                "limits": [list(limit) for limit in self.limits.items()],
                "floors": search.floors,
                "alternatives": search.alternatives,
                "starts": [],  # what is tried first decides which trials there are, and a search that goes on has some already
                "moa": self.measures_moa,
                "seed": self.recipe.seed,
                **({"formats": self.profile.formats} if self.profile.formats else {}),
                **({"computes_in": self.computes_in} if in_other else {}),
                **(
                    {"share": [search.share, self.sharing.costs.anchors, search.assume_repaired]}
                    if self.sharing
                    else {}
                ),
                **({"classes": search.classes} if search.classes is not None else {}),
                **({"gates": self.profile.gates_fingerprint} if self.profile.gates_fingerprint else {}),
            }
        )

    @property
    def parameters(self) -> SearchParameters:
        """What the study tunes."""
        profile, coherent = self.profile, self.quadratic is not None
        return SearchParameters(
            profile.shape.layers, profile.lengths, coherent, bool(profile.formats), self.most_shared
        )

    @cached_property
    def most_shared(self) -> int:
        """Most layers that a trial may let share; 0 where trials do not choose."""
        if self.sharing is None or not self.sharing.asked.auto:
            return 0
        single = self.surrogate.costs()

        def kl(shares: LayerShares) -> float:
            space = self.space(shares)
            costs = space.costs(single)
            return total_cost(costs, space.knapsack.choose(costs))

        alone = kl(())
        return self.sharing.most(lambda shares: alone - kl(shares))

    def shares(self, parameters: ParameterValues) -> LayerShares:
        """Returns which layers share under some search parameters."""
        if self.sharing is None:
            return ()
        return (
            self.sharing.shares(round(parameters.get("sharing", 0.0)))
            if self.sharing.asked.auto
            else self.sharing.fixed
        )

    def space(self, shares: LayerShares = ()) -> PlanSpace:
        """Returns the plans whose layers share so, within the limits."""
        return PlanSpace.of(self, shares, self.recipe.search.classes)

    def of_any_classes(self) -> SearchRequest:
        """Returns the request without its limit of different rules."""
        search = self.recipe.search.model_copy(update={"classes": None})
        return replace(self, recipe=self.recipe.model_copy(update={"search": search}))

    def predicted(self, plan: Plan) -> float | None:
        """Returns the predicted KL of a plan with its copies, nats; None where a rule of it is no candidate."""
        found = self.surrogate.predicted(plan)
        if found is None or self.sharing is None:
            return found
        return found + self.sharing.costs.cost(plan.shares)

    def repaired(self, source: SourceModel, progress: Progress) -> SearchRequest:
        """Returns the request with copies repaired, and so priced, where that is asked for."""
        if self.sharing is None or not self.recipe.search.assume_repaired or self.sharing.repairs:
            return self
        copies = self.sharing.copies()
        samples = repair_samples(self.profile, self.profile.shape)
        dtype = getattr(torch, self.profile.shape.dtype)
        repairs = repaired_copies(source.model, self.profile.shape, copies, samples, dtype, progress)
        return replace(self, sharing=self.sharing.repaired(copies, repairs))

    def weights_of(self, plan: Plan) -> Weights:
        """Returns the weights that a plan is measured with in place of the model's own."""
        return {} if self.sharing is None else self.sharing.weights(plan.shares)

    @cached_property
    def quadratic(self) -> Quadratic | None:
        """What KV heads do together, where the profile has enough samples to say it."""
        samples, draws = self.profile.statistics.arrays["total"].shape[:2]
        return Quadratic.of(self.profile) if samples * draws >= MIN_ROWS else None

    def choice(self, space: PlanSpace, parameters: ParameterValues) -> Ints:
        """Returns the rule of every row of the knapsack that the solver chooses under some search parameters, int64."""
        bent = space.costs(self.parameters.bend(self.surrogate, parameters))
        choice = space.knapsack.choose(bent)
        share = parameters.get("coherence", 0.0)
        if self.quadratic is None or not share:
            return choice
        # of bending only ratios count, so the costs are scaled to be nats again
        nats = bent * (total_cost(space.costs(self.surrogate.costs()), choice) / max(total_cost(bent, choice), 1e-300))
        return space.form(self.quadratic).refined(choice, nats, share, space.knapsack)

    def plan(self, parameters: ParameterValues) -> Plan:
        """Returns the plan that the solver makes of the bent surrogate, within the request's limits."""
        space = self.space(self.shares(parameters))
        return space.plan(self.choice(space, parameters))

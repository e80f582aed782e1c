"""Several plans of one profile: one for each budget, or the smallest that is good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import explanation_file, front_file, of_search, plan_named, scouts_folder
from moacompress.core.errors import ArtefactError, InfeasibleBudgetError, PlanError
from moacompress.core.files import check_no_link, finite_json, read_json, remove, write_json
from moacompress.core.progress import Progress
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.budget import any_memory, label
from moacompress.rules.limits import layer_floors, smallest_kv_bytes
from moacompress.rules.loss import Loss, check_loss_samples
from moacompress.rules.plan import Plan
from moacompress.runtime.ready_model import load_for
from moacompress.search.baselines.measured import check_baselines
from moacompress.search.deadline import Deadline, TimeUp
from moacompress.search.plan_place import PlanPlace, plan_place
from moacompress.search.result.search_result import SearchResult, check_ours
from moacompress.search.search_request import ParameterValues, SearchRequest, offered
from moacompress.search.sharing.share_choice import ShareChoice
from moacompress.search.study import find_plan

LOWER = 0.9
"""A whole search is tried at this share of the smallest budget that the surrogate's own plans hold at."""


def find_plans(
    profile: Profile,
    budgets: Sequence[Sequence[str]],
    *,
    recipe: Recipe,
    out: Path,
    overwrite: bool = False,
    model: SourceModel | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> list[SearchResult]:
    """Finds a plan for each of several budgets; the search parameters that won at one are tried first at the next.

    Each of `budgets` are those that one plan must hold. With `out` as `plan.json` plans go to `plan-25.json`, `plan-12.5.json`
    and so on, and the front to `plan.front.json`. Every search gets an equal part of what those before it left of the time, by
    default of `recipe.search.timeout`. All budgets are looked at before anything runs.

    Raises:
        MoaCompressError: as `find_plan`, for the first budget that fails; budgets are all looked at before anything runs.
    """
    deadline = deadline or Deadline(recipe.search.timeout)
    if model is None and any(any_memory(asked) for asked in budgets):
        model = load_for(recipe, profile.source, trust_remote_code=trust_remote_code)
    for asked in budgets:
        SearchRequest.of(profile, list(asked), recipe, model=model)
    source = model or load_for(recipe, profile.source, trust_remote_code=trust_remote_code)
    found: list[SearchResult] = []
    starts: list[ParameterValues] = []
    with plan_place(front_file(out), recipe.search.storage is not None) as place:
        if overwrite and place.out is not None:
            remove([place.out])
        for number, asked in enumerate(budgets):
            resolved, part = recipe.override(budget=list(asked)), deadline.part(len(budgets) - number)
            result = find_plan(
                profile,
                None,
                recipe=resolved,
                out=plan_named(out, label(asked)),
                overwrite=overwrite,
                model=source,
                starts=starts,
                progress=progress,
                deadline=part,
            )
            parameters = result.plan.provenance["knobs"]
            starts = [parameters] if any(parameters.values()) else []
            found.append(result)
            deadline.stopped = deadline.stopped or part.stopped
        write_front(place, found, deadline)
    return found


def write_front(place: PlanPlace, results: Sequence[SearchResult], deadline: Deadline) -> None:
    """Writes `plan.front.json` beside the plans, bytes and KL of every plan, the smallest first; one worker does.

    A worker whose time was up has not found what the others will find.
    """
    points = [
        {
            "plan": result.path.name if result.path else None,
            "budget": result.plan.budget["asked"],
            "kv_bytes": result.kv_bytes,
            "kv_share": {n: row["plan"] / row["dense"] for n, row in result.kv_bytes.items()},
            "harm": result.harm,
        }
        for result in results
    ]
    points.sort(key=lambda point: max(point["kv_share"].values()))
    front = {"format": "moacompress-front", "points": points}
    place.settle(lambda: _holds(place.path, front), deadline)
    if place.out is not None:
        write_json(place.out, front)


def _holds(file: Path | None, value: Any) -> bool:
    """Returns whether a JSON file holds a value."""
    try:
        return file is not None and read_json(file, file.name) == finite_json(value)
    except ArtefactError:  # it is not there, or no JSON
        return False


def find_asked(profile: Profile, *, recipe: Recipe, **options: Any) -> SearchResult:
    """Finds the plan that a recipe asks for: within its budgets, or of the smallest budget for its loss."""
    if recipe.max_loss is not None:
        return find_smallest(profile, Loss.parse(recipe.max_loss), recipe=recipe, **options)
    return find_plan(profile, None, recipe=recipe, **options)


def find_smallest(
    profile: Profile,
    loss: Loss,
    *,
    recipe: Recipe,
    out: Path,
    overwrite: bool = False,
    model: SourceModel | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> SearchResult:
    """Finds the plan of the smallest budget, a share of the dense bytes, whose KL is within a loss with 95% confidence.

    The mean KL of a few samples is below a limit by chance half of the time where the true one lies on it, so that the
    one-sided bound of `core.statistics.upper_bound` has to be within the loss. It is of each plan by itself, not of the lowest
    of many: where 30 trials truly cost the same, the one that is returned cost more than its bound in .06 to .08 of simulated
    searches instead of .05.

    Bisection to a percent with the surrogate's own plans, which take a minute each; then a whole search somewhat below the
    budget at which they hold, and where its plan does not hold, one at that budget. When the time is up, by default
    `recipe.search.timeout`, the smallest measured plan that holds is returned. The other plans are in a folder beside `out`,
    `plan.scouts`.

    Raises:
        UsageError: the profile has too few validation samples for a bound.
        InfeasibleBudgetError: a plan that keeps next to everything does not hold.
        OutOfTimeError: the time is up before one that holds is measured.
        MoaCompressError: as `find_plan`.
    """
    check_loss_samples(loss, len(profile.validation))
    deadline = deadline or Deadline(recipe.search.timeout)
    shared = recipe.search.storage is not None
    with plan_place(out, shared) as place:
        if place.ours:
            if overwrite and not out.is_dir():
                check_baselines(out)
                remove(of_search(out))
            if out.exists():
                asked = loss.text, profile.fingerprint
                check_ours(out, lambda plan: (plan.budget.get("max_loss"), plan.provenance.get("profile")) == asked)
        source = model or load_for(recipe, profile.source, trust_remote_code=trust_remote_code)
        found = _smallest(profile, loss, recipe, out, overwrite, source, progress, deadline)
        noted = {"max_loss": loss.text, "max_harm": loss.kl}
        plan = found.plan.with_notes(budget={**found.plan.budget, **noted})
        place.settle(lambda: _is_same(out, plan), deadline)
        if place.ours:
            if found.explanation:
                write_json(explanation_file(out), found.explanation)
            plan.save(out)
        return SearchResult.of(plan, out, found.seconds, found.explanation, written=place.ours)


def _is_same(out: Path, plan: Plan) -> bool:
    """Returns whether another worker has written a plan."""
    try:
        return out.exists() and Plan.load(out) == plan
    except PlanError:
        return False


def _smallest(
    profile: Profile,
    loss: Loss,
    recipe: Recipe,
    out: Path,
    overwrite: bool,
    source: SourceModel,
    progress: Progress | None,
    deadline: Deadline,
) -> SearchResult:
    """Finds the plan that `find_smallest` returns."""
    folder, holding = scouts_folder(out), list[SearchResult]()
    check_no_link(folder)

    def holds(share: int, name: str, **settings: Any) -> bool:
        """Searches within a percentage of the bytes; returns whether there is a plan that holds the loss, and keeps it."""
        try:
            found = find_plan(
                profile,
                None,
                recipe=recipe.override(budget=[f"{share}%"], max_loss="", **settings),
                out=folder / f"{name}.json",
                overwrite=overwrite,
                model=source,
                progress=progress,
                deadline=deadline,
            )
        except InfeasibleBudgetError:  # KV heads that are to have one rule may take more than `smallest`
            return False
        bound = found.plan.quality.get("harm_upper95")
        if bound is None:
            raise TimeUp
        if bound <= loss.kl:
            holding.append(found)
        return bool(bound <= loss.kl)

    def scout_holds(share: int) -> bool:
        """Tries the surrogate's own plan."""
        quick = {"trials": 1, "alternatives": False}
        return holds(share, f"{share}", **{f"search__{name}": value for name, value in quick.items()})

    smallest = math.ceil(100 * smallest_share(offered(profile, recipe), recipe))
    bad, good = smallest - 1, 99
    SearchRequest.of(profile, f"{good}%", recipe)  # or nothing fits
    try:
        if not scout_holds(good):
            raise InfeasibleBudgetError(
                f"no plan holds a loss of {loss.text} (KL {loss.kl:.2g} nats) with 95% confidence on "
                f"{len(profile.validation)} samples: even {good}% of the bytes may cost more; allow more loss, or profile with "
                "more --validation-samples"
            )
        while good - bad > 1:
            middle = (bad + good) // 2
            bad, good = (bad, middle) if scout_holds(middle) else (middle, good)
        for share in sorted({max(smallest, int(good * LOWER)), good}):
            if holds(share, f"whole-{share}"):
                break
        return holding[-1]  # where no whole search's plan holds, the surrogate's own does
    except TimeUp:
        if not holding:
            raise deadline.too_short() from None
        return min(holding, key=lambda result: max(result.plan.kv_share(n) for n in profile.lengths))


def smallest_share(profile: Profile, recipe: Recipe) -> float:
    """Returns the share of the dense bytes that the smallest plan takes, at the length where that is most.

    It respects the recipe's floors, and layers that are to share whatever the plan.
    """
    shape, sharing = profile.shape, ShareChoice.of(profile, recipe)
    floors, shares = layer_floors(recipe.search.floors, shape), () if sharing is None else sharing.fixed
    smallest = smallest_kv_bytes(shape, profile.rules, profile.min_window, list(profile.lengths), floors, shares)
    return max(smallest[n] / shape.dense_kv_bytes(n) for n in profile.lengths)

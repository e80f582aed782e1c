"""Finding a plan: a solver inside every trial, Optuna around it, and the real model as the judge.

A trial's search parameters bend the surrogate, the solver turns it into a plan within the budget, and the plan's KL is measured
on validation samples. What the sampler is told is the mean log-ratio to trial 0, the plan of the unbent surrogate, sample by
sample, so that a pruned trial has a value on the same scale. A trial is better where its mean KL is lower beyond doubt (see
`kl_difference`): the best of many noisy numbers looks better than it is. Plans of the same bytes that need no search are
measured beside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import of_search, study_journal
from moacompress.core.files import check_no_link, remove, sweep_files, sweep_folders
from moacompress.core.progress import SILENT, Progress
from moacompress.models.processes import check_alike
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.budget import any_memory
from moacompress.runtime.ready_model import load_for
from moacompress.search.baselines.measured import check_baselines
from moacompress.search.deadline import Deadline, TimeUp
from moacompress.search.measure.claims import open_claims
from moacompress.search.measure.objective import Objective
from moacompress.search.measure.plan_evaluator import PlanEvaluator
from moacompress.search.measure.storages import is_journal, quiet_optuna
from moacompress.search.measure.study_storage import StudyStorage
from moacompress.search.plan_place import plan_place
from moacompress.search.predict.search_parameters import distributions
from moacompress.search.result.found_plan import stopped_at_once, write_first, write_found
from moacompress.search.result.search_result import SearchResult, found_before
from moacompress.search.search_context import SearchContext, Step
from moacompress.search.search_estimate import measurements
from moacompress.search.search_request import ParameterValues, SearchRequest
from moacompress.search.steps.baselines import measure_baselines
from moacompress.search.steps.class_cost import measure_class_cost
from moacompress.search.steps.leftover import spend_leftover
from moacompress.search.steps.parameter_study import tune_parameters

__all__ = ["SearchResult", "find_plan"]

STEPS: tuple[Step, ...] = (
    tune_parameters,
    spend_leftover,
    measure_baselines,
    measure_class_cost,
)
"""Each is given what the one before it returned; the first one the surrogate's own plan, which it measures."""
STAGES: dict[Step, str] = {
    tune_parameters: "trials",
    spend_leftover: "leftover",
    measure_baselines: "baselines",
    measure_class_cost: "class limit",
}
"""Names of steps that take time, as `measurements` has them."""


def find_plan(
    profile: Profile | str | Path,
    budget: str | Sequence[str] | None = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    model: SourceModel | None = None,
    starts: Sequence[ParameterValues] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> SearchResult:
    """Finds the plan of lowest measured KL within a budget.

    The same call continues where a killed one stopped: everything measured is kept in `recipe.search.storage`, by
    default a journal beside `out` (`plan.study.journal` for `plan.json`), or in memory without `out`. A plan is at `out` before
    anything is measured. The best plan of every baseline is kept in `plan.baselines`, and why the plan is as it is in
    `plan.explain.json`.

    Args:
        profile: a finished profile, or its folder.
        budget: one budget or several that must all hold, such as "25%"; by default the recipe's.
        recipe: by default the profile's own.
        out: where the best plan so far is always kept, and the result in the end.
        overwrite: start from scratch: the plan at `out`, what is beside it and what is in the storage is removed.
        model: the profile's model where it is loaded already; by default it is loaded.
        starts: parameters that are tried right after the surrogate's own plan, such as those that won at another budget.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.
        progress: told of every measurement.
        deadline: when to stop; by default `recipe.search.timeout` seconds from now. The search ends within the measurement of
            one sample after it, with the best plan so far: where none is measured yet, with the surrogate's own, whose KL
            is then None.

    Returns:
        The plan with its numbers. It is a baseline's if that measured better.

    Raises:
        BudgetError: the budget does not parse, or there is none.
        InfeasibleBudgetError: no plan fits; says the smallest budget that works.
        ArtefactError: the profile, `out` or the storage cannot be used, or another process is searching there.
        ModelError: the model cannot be loaded, or is not the one that was profiled.
    """
    started, progress = time.monotonic(), progress or SILENT
    if isinstance(profile, str | Path):
        profile = Profile.load(profile)
    recipe = recipe or profile.recipe
    asked = recipe.budget if budget is None else (budget,) if isinstance(budget, str) else budget
    if model is None and any_memory(asked):  # what the weights take is a part of the request
        model = load_for(recipe, profile.source, trust_remote_code=trust_remote_code)
    request = SearchRequest.of(profile, budget, recipe, starts, model)
    path = None if out is None else Path(out)
    trials = request.recipe.search.trials
    with plan_place(path, request.recipe.search.storage is not None) as place:
        if place.out is not None:
            for left in of_search(place.out):  # half-written by killed searches
                sweep_files(left)
                sweep_folders(left)
        if path is not None:
            plan = found_before(path, request.key, trials, overwrite)
            if plan is not None:
                return SearchResult.of(plan, path, time.monotonic() - started, written=False)
        if place.out is not None:
            check_baselines(place.out)
        if model is None:
            model = load_for(request.recipe, profile.source, trust_remote_code=trust_remote_code)
        profile.check_model(model, "search")
        deadline = deadline or Deadline(request.recipe.search.timeout, started)
        progress.plan(measurements(request.recipe, len(request.profile.validation)))
        try:
            with opened(request, place.out, overwrite, model, progress, deadline) as context:
                incumbent = context.start()
                with suppress(TimeUp):
                    for step in STEPS:
                        progress.stage(STAGES.get(step, ""))
                        incumbent = step(incumbent, context)
                progress.done()
                if path is not None:
                    place.settle(lambda: found_before(path, request.key, trials, False) is not None, deadline)
                context.out = place.out
                plan, explanation = write_found(incumbent, context)
        except TimeUp:
            progress.done()
            plan, explanation = stopped_at_once(request, place.out)
    return SearchResult.of(plan, path, time.monotonic() - started, explanation, written=place.ours)


@contextmanager
def opened(
    request: SearchRequest,
    out: Path | None,
    from_scratch: bool,
    source: SourceModel,
    progress: Progress,
    deadline: Deadline,
) -> Iterator[SearchContext]:
    """Makes this process a worker of a search as long as the block runs, the only one unless the storage is of its own.

    Yields what the steps work with. `out`, where the plan will be, is owned by this process. `from_scratch` forgets what was
    measured, and removes what is at `out`.

    Raises:
        TimeUp: the time is up, and copies are not repaired yet.
        InUseError: other workers are alive, and are not to be.
        ArtefactError: the storage cannot be used.
    """
    check_alike({"profile or recipe": request.key})
    profile, name = request.profile, f"moacompress-{request.key}"
    storage = request.recipe.search.storage
    alone, trials = storage is None, request.recipe.search.trials
    if alone and out is not None:
        check_no_link(study_journal(out))
        storage = str(study_journal(out))
        if from_scratch:  # nothing is left that can be wrong with the request
            remove(of_search(out))
    with (
        quiet_optuna(),
        open_claims(storage, name, alone=alone, from_scratch=from_scratch, trials=trials, progress=progress) as claims,
    ):
        if out is not None:
            if from_scratch and not alone:
                remove([path for path in of_search(out) if not is_journal(storage, path)])
            write_first(request, out)
        request = request.repaired(source, deadline.within(progress))
        study_storage = StudyStorage(
            claims,
            name,
            distributions(request.parameters.ranges),
            request.recipe.seed,
            [
                request.parameters.neutral,
                *map(request.parameters.within, request.starts),
                *request.parameters.starts,
            ],
        )
        objective = Objective(source.model, profile.validation, request.weights_of)
        evaluator = PlanEvaluator.of(study_storage, objective, request.recipe.seed, deadline, progress)
        objective.order = evaluator.order
        yield SearchContext(
            request=request,
            evaluator=evaluator,
            out=out,
            deadline=deadline,
            progress=progress,
        )

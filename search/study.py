"""Finding a plan: a solver inside every trial, Optuna around it, the real model as the judge; then rounds and moves.

A trial's search parameters bend the surrogate, the solver turns it into a plan within the budget, and the plan's KL is measured
on validation samples. A trial's value is its mean log-ratio to trial 0, the plan of the unbent surrogate, sample by
sample, so that a trial that is pruned half-way has a value on the same scale. A trial is better only beyond doubt: the best
of many noisy numbers looks better than it is. The best plan is then improved by profiling around it, and by measuring single KV
heads near the threshold. Plans of the same bytes that need no search are measured beside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from moacompress.calibration.profile.manifest import sweep_samples
from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import holders_of_studies, of_search, rounds_folder, study_journal
from moacompress.core.files import remove, sweep_files, sweep_folders
from moacompress.core.lock_holders import own_file, release_dead
from moacompress.core.progress import SILENT, Progress
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.runtime.ready_model import load_for
from moacompress.search.baselines.measured import check_baselines
from moacompress.search.measure.deadline import Deadline, TimeUp
from moacompress.search.opened_search import opened
from moacompress.search.problem.search_request import ParameterValues, SearchRequest
from moacompress.search.result.found_plan import stopped_at_once, write_found
from moacompress.search.result.search_result import SearchResult, found_before
from moacompress.search.search_context import Step
from moacompress.search.steps.baselines import measure_baselines
from moacompress.search.steps.calibrated_start import calibrate
from moacompress.search.steps.leftover import spend_leftover
from moacompress.search.steps.moves import make_moves
from moacompress.search.steps.parameter_study import tune_parameters
from moacompress.search.steps.rounds import make_rounds

__all__ = ["SearchResult", "find_plan"]

STEPS: tuple[Step, ...] = (calibrate, measure_baselines, tune_parameters, make_rounds, make_moves, spend_leftover)
"""Each is given what the one before it returned; the first one the surrogate's own plan, which the third one measures."""


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
    anything is measured. What was profiled
    around plans is kept in a folder beside `out` (`plan.rounds`), the best plan of every baseline in `plan.baselines`, and why
    the plan is as it is in `plan.explain.json`.

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
    request = SearchRequest.of(profile, budget, recipe or profile.recipe, starts, model)
    path = None if out is None else Path(out)
    with nullcontext() if path is None else own_file(path):
        if path is not None:
            _sweep(path)
            plan = found_before(path, request.key, request.recipe.search.trials, overwrite)
            if plan is not None:
                return SearchResult.of(plan, path, time.monotonic() - started)
            check_baselines(path)
        if model is None:
            model = load_for(request.recipe, profile.source, trust_remote_code=trust_remote_code)
        profile.check_model(model, "search")
        if path is not None and overwrite:  # nothing is left that can be wrong with the request
            remove(of_search(path))
        deadline = deadline or Deadline(request.recipe.search.timeout, started)
        try:
            with opened(request, path, overwrite, model, progress, deadline) as context:
                incumbent = context.start()
                with suppress(TimeUp):
                    for step in STEPS:
                        incumbent = step(incumbent, context)
                progress.done()
                plan, explanation = write_found(incumbent, context)
        except TimeUp:
            progress.done()
            plan, explanation = stopped_at_once(request, path)
    return SearchResult.of(plan, path, time.monotonic() - started, explanation)


def _sweep(out: Path) -> None:
    """Removes what killed searches left half-written at a plan that this process owns, and beside it."""
    for holder in holders_of_studies(study_journal(out)):
        release_dead(holder)
    for path in of_search(out):
        sweep_files(path)
        sweep_folders(path)
    for folder in rounds_folder(out).glob("*"):
        sweep_samples(folder)

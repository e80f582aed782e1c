"""The front of KL and bytes: one study with two objectives, in which the budget is a search parameter like the others."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import front_file, front_journal, of_front, plan_named, plans_of_front
from moacompress.core.errors import ArtefactError, BudgetError, PlanError
from moacompress.core.files import check_no_link, fingerprint, read_json, remove
from moacompress.core.progress import SILENT, Progress
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget
from moacompress.rules.plan import Plan
from moacompress.runtime.ready_model import load_for
from moacompress.search.deadline import Deadline, TimeUp
from moacompress.search.measure.claims import open_claims
from moacompress.search.measure.objective import Objective
from moacompress.search.measure.packed_plan import pack, unpack
from moacompress.search.measure.plan_evaluator import PlanEvaluator
from moacompress.search.measure.storages import quiet_optuna
from moacompress.search.measure.study_storage import FinishedTrial, StartedTrial, StudyStorage
from moacompress.search.plan_place import plan_place
from moacompress.search.plan_sets import write_front
from moacompress.search.predict.search_parameters import distributions
from moacompress.search.result.search_result import SearchResult, budget_notes, check_ours, class_quality, provenance
from moacompress.search.search_request import SearchRequest

SHARE = "log_share"
"""Name of the search parameter that is the logarithm of the budget, a share of the dense bytes."""
STARTS = 4
"""Budgets, evenly spread on a logarithmic scale, at which the surrogate's own plan is tried first."""


def find_front(
    profile: Profile,
    budgets: Sequence[str],
    *,
    recipe: Recipe,
    out: Path,
    overwrite: bool = False,
    model: SourceModel | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> list[SearchResult]:
    """Finds plans between two budgets of which none is beaten in both bytes and measured KL; returns the smallest first.

    Of the budgets, shares of the dense bytes, the smallest and the largest count. `search.trials` trials are measured. With
    `out` as `plan.json` plans go to `plan-front-1.json` and so on, the list of all to `plan.front.json`. `overwrite` removes
    the plans of a front that are there, and what was measured for them. The deadline is by default `recipe.search.timeout`
    seconds from now.

    Raises:
        BudgetError: not two different shares.
        OutOfTimeError: the time is up before one plan is measured.
        MoaCompressError: as `find_plan`.
    """
    started, progress = time.monotonic(), progress or SILENT
    deadline = deadline or Deadline(recipe.search.timeout, started)
    low, high = _shares(budgets)
    request = SearchRequest.of(profile, f"{low:.6f}", recipe, model=model)
    key = fingerprint(["front", request.key, low, high])
    storage = recipe.search.storage or str(front_journal(out))
    name, trials, alone = f"moacompress-{key}", recipe.search.trials, recipe.search.storage is None
    with plan_place(front_file(out), not alone) as place, quiet_optuna(), ExitStack() as joined:
        source = model or load_for(recipe, profile.source, trust_remote_code=trust_remote_code)
        profile.check_model(source, "search")
        if place.ours:
            if overwrite:
                remove(of_front(out))
            for path in plans_of_front(out):
                check_ours(path, lambda plan: plan.provenance.get("search") == key)
        if alone:
            check_no_link(front_journal(out))
        claims = joined.enter_context(
            open_claims(storage, name, alone=alone, from_scratch=overwrite, trials=trials, progress=progress)
        )
        try:
            request = request.repaired(source, deadline.within(progress))
        except TimeUp:
            raise deadline.too_short() from None
        searched = distributions({**request.parameters.ranges, SHARE: (math.log(low), math.log(high))})
        starts = [
            {**request.parameters.neutral, SHARE: float(at)} for at in np.linspace(np.log(low), np.log(high), STARTS)
        ]
        study_storage = StudyStorage(claims, name, searched, recipe.seed, starts, objectives=2)
        measure = Objective(source.model, profile.validation, request.weights_of)
        evaluator = PlanEvaluator.of(study_storage, measure, recipe.seed, deadline)
        with suppress(TimeUp):
            _search_front(request, evaluator, trials, progress)
        progress.done()
        if not study_storage.finished():
            raise deadline.too_short()
        place.settle(lambda: _is_there(out, key, trials), deadline)
        finished = study_storage.finished()
        if place.ours:
            remove(plans_of_front(out))  # there may be fewer than before
        results = []
        for number, trial in enumerate(_front(finished), start=1):
            plan = _noted(request, key, trial, len(finished))
            path = plan_named(out, f"front-{number}")
            if place.ours:
                plan.save(path)
            results.append(SearchResult.of(plan, path, time.monotonic() - started, {}, written=place.ours))
        write_front(place, results, deadline)
    return results


def _search_front(request: SearchRequest, evaluator: PlanEvaluator, trials: int, progress: Progress) -> None:
    """Runs the trials of a front that are missing, beside other workers.

    Raises:
        TimeUp: the time is up before all have run.
    """
    profile, study_storage, deadline = request.profile, evaluator.study_storage, evaluator.deadline

    def run(started: StartedTrial) -> None:
        budget = Budget(SHARE, float(np.exp(started.parameters[SHARE])), None, None)
        limits = budget.limits(profile.shape, profile.lengths)
        parameters = {name: at for name, at in started.parameters.items() if name != SHARE}
        plan = request.plan(parameters, limits)
        kl = float(np.mean(evaluator.together([evaluator.job("front", plan, evaluator.order)])))
        kept = max(plan.kv_share(n) for n in profile.lengths)
        study_storage.tell(started, [kl, kept], plan=pack(plan))

    progress.start("searching the front", trials)
    seen = 0
    while True:
        finished = study_storage.finished()[:trials]
        for trial in finished[seen:]:
            progress.step(f"{trial.values[1]:.1%} of the bytes: {trial.values[0]:.3g} nats")
        seen = len(finished)
        if seen == trials:
            return
        deadline.check()
        study_storage.run_next(trials, deadline, run)


def _is_there(out: Path, key: str, trials: int) -> bool:
    """Returns whether a front is there that another worker of the same search has written, with all of its trials."""
    try:
        listed = [point["plan"] for point in read_json(front_file(out), "front")["points"]]
        made = Plan.load(plan_named(out, "front-1")).provenance
    except (ArtefactError, PlanError, KeyError, TypeError):
        return False
    ours = made.get("search") == key and made.get("trials", 0) >= trials
    return ours and sorted(listed) == sorted(path.name for path in plans_of_front(out))


def _front(trials: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """Returns the trials that no other beats in both KL and share of the bytes, the smallest first."""
    found: list[FinishedTrial] = []
    for trial in sorted(trials, key=lambda trial: trial.values[::-1]):
        if not found or trial.values[0] < found[-1].values[0]:
            found.append(trial)
    return found


def _shares(budgets: Sequence[str]) -> tuple[float, float]:
    parsed = [Budget.parse(text) for text in budgets]
    shares = {budget.share for budget in parsed if budget.share is not None and budget.length is None}
    if len(shares) < 2 or any(budget.share is None or budget.length is not None for budget in parsed):
        raise BudgetError(
            f"a front lies between two shares of the dense bytes; {', '.join(budgets) or 'nothing'} was given: write "
            "--budget 50%,12.5%"
        )
    return min(shares), max(shares)


def _noted(request: SearchRequest, key: str, trial: FinishedTrial, trials: int) -> Plan:
    kl, share = trial.values
    plan = replace(unpack(trial.notes["plan"], request.profile), seen=request.profile.shingles)
    return plan.with_notes(
        budget=budget_notes(request, plan, [f"{math.ceil(1000 * share) / 10:g}%"]),
        quality={
            "measured_harm": {"plan": kl},
            "samples": len(request.profile.validation),
            **class_quality(request.recipe.search.classes, plan),
        },
        provenance=provenance(request, key, {"trials": trials, "measured_plans": trials, "best_trial": trial.index}),
    )

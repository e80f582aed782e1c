"""The plan that a search found, as it is written: with its notes, and beside it why it is as it is and the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.calibration.profile.rounding_loss import rounding_of
from moacompress.core.artefact_names import explanation_file
from moacompress.core.errors import PlanError
from moacompress.core.files import write_json
from moacompress.core.statistics import upper_bound
from moacompress.rules.plan import Plan
from moacompress.search.baselines.families import FAMILIES
from moacompress.search.baselines.measured import write_baselines
from moacompress.search.measure.plan_evaluator import MeasuredPlan
from moacompress.search.measure.trials import TrialResult, best_trial
from moacompress.search.result.beside_baselines import BesideBaseline
from moacompress.search.result.explain import explain
from moacompress.search.result.search_result import (
    baseline_note,
    budget_notes,
    class_quality,
    memory_note,
    provenance,
    read_explanation,
)
from moacompress.search.search_context import Incumbent, SearchContext
from moacompress.search.search_request import SearchRequest

UNMEASURED = "surrogate"
"""Stage of a plan that nothing has been measured of."""


def write_first(request: SearchRequest, out: Path) -> None:
    """Writes the surrogate's own plan before anything is measured, unless a measured one of this search is there.

    So a search that is killed at once leaves a plan.
    """
    if _measured_before(request, out) is None:
        first_plan(request).save(out)


def first_plan(request: SearchRequest) -> Plan:
    """Returns the surrogate's own plan before anything is measured; its notes say that of it."""
    plan = request.plan(request.parameters.neutral)
    measured = {"samples": 0, **class_quality(request.recipe.search.classes, plan)}
    return _with_notes(request, plan, _unmeasured({}), measured, _made([], UNMEASURED, False))


def write_so_far(incumbent: Incumbent, context: SearchContext) -> None:
    """Writes the best plan so far, be it of an earlier run, so that a search that is killed leaves it."""
    plan, _ = _noted(_better_of_earlier(incumbent, context), context, finished=False)
    if context.out is not None:
        plan.save(context.out)


def write_found(incumbent: Incumbent, context: SearchContext) -> tuple[Plan, dict[str, Any]]:
    """Writes what a search ends with, and returns the plan with its notes, and why it is as it is.

    It is a baseline's where that measured better. Where the time was up before the incumbent was measured, a measured plan
    that an earlier run left stays.
    """
    if not incumbent.kls:
        earlier = None if context.out is None else _measured_before(context.request, context.out)
        if earlier is not None and context.out is not None:
            return earlier, read_explanation(context.out)
    elif context.deadline.stopped:
        incumbent = _better_of_earlier(incumbent, context)
    plan, kls = _noted(incumbent, context, finished=True)
    explanation = explain(
        context.request,
        plan,
        context.tried,
        context.evaluator.study_storage.importances(),
        context.stages,
        kls,
    )
    if context.out is not None:
        write_json(explanation_file(context.out), explanation)
        write_baselines(context.out, context.request, context.measured_baselines)
        plan.save(context.out)
    return plan, explanation


def stopped_at_once(request: SearchRequest, out: Path | None) -> tuple[Plan, dict[str, Any]]:
    """Returns what a search hands back whose time was up before its study began: what it wrote first, or left there."""
    return (first_plan(request), {}) if out is None else (Plan.load(out), read_explanation(out))


def _measured_before(request: SearchRequest, out: Path) -> Plan | None:
    """Returns the plan that an earlier run of a search left where its plan will be, if that is measured."""
    if not out.exists():
        return None
    try:
        plan = Plan.load(out)
    except PlanError:  # something else, which is to be replaced
        return None
    ours = plan.provenance.get("search") == request.key
    return plan if ours and plan.quality["measured_harm"]["plan"] is not None else None


def _better_of_earlier(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Returns the better of a plan and what an earlier run improved: a run that stops sooner takes nothing back."""
    plan = None if context.out is None else _measured_before(context.request, context.out)
    kls = None if plan is None else context.evaluator.known("improved", plan)
    if plan is None or kls is None:
        return incumbent
    earlier = Incumbent(plan.with_notes(budget={}, quality={}, provenance={}), kls, plan.provenance["stage"])
    return min(incumbent, earlier, key=lambda one: one.kl)


def _noted(incumbent: Incumbent, context: SearchContext, *, finished: bool) -> tuple[Plan, list[float]]:
    """Returns the plan with all notes, and its KLs, nats: those of a baseline where that is better, or as good and smaller.

    Where the incumbent is not measured its plan is returned: no baseline is known to be better.
    """
    request, baselines, most = context.request, context.measured_baselines, context.request.recipe.search.classes
    best: MeasuredPlan = incumbent
    kl, beside = _unmeasured(baselines), None
    if incumbent.kls:
        beside = BesideBaseline.of(incumbent, baselines, max(request.lengths), most, context.candidates)
        if beside is not None and beside.saved:
            best = beside.baseline
        kl |= {"plan": best.kl, "trial0": float(np.mean(context.tried[0].kls))}
    lengths = {*request.profile.lengths, *request.lengths}
    measured = {
        "baselines": {family: baseline_note(other, lengths) for family, other in baselines.items()},
        "best_baseline": None if beside is None else beside.to_dict(),
        "samples": len(best.kls),
        "harm_upper95": upper_bound(best.kls) if best.kls else None,
        **class_quality(most, best.plan, context.class_cost),
    }
    stage = incumbent.stage if incumbent.kls else UNMEASURED
    made = _made(context.tried, stage, finished and not context.deadline.stopped)
    return _with_notes(request, best.plan, kl, measured, made), best.kls


def _made(tried: Sequence[TrialResult], stage: str, finished: bool) -> dict[str, Any]:
    """Returns what a plan's notes say of how far its search has come; `best_trial` is None where there is no trial yet."""
    best = best_trial(tried) if tried else None
    return {
        "finished": finished,
        "trials": len(tried),
        "measured_plans": len({trial.key for trial in tried}),
        "best_trial": None if best is None else best.index,
        "knobs": {} if best is None else best.parameters,
        "stage": stage,
    }


def _with_notes(
    request: SearchRequest,
    plan: Plan,
    kl: Mapping[str, float | None],
    measured: Mapping[str, Any],
    made: Mapping[str, Any],
) -> Plan:
    """Returns a plan with all notes: its measured KL by name, nats, what else was measured, and how far its search has come."""
    profile = request.profile
    rounding = rounding_of(profile.path, profile.shape.weights_fingerprint) or {}
    rounded = {name: number for name, number in rounding.items() if name != "weights_fingerprint"}
    notes = provenance(request, request.key, made)
    notes["recipe"]["budget"] = list(request.asked)
    noted = plan.with_notes(
        budget={**budget_notes(request, plan, request.asked), **memory_note(request, plan)},
        quality={
            **({"rounded_weights": rounded} if rounded else {}),
            "predicted_harm": request.predicted(plan),
            "measured_harm": dict(kl),
            **measured,
            **({"assumed_repaired": True} if any(plan.shares) and request.recipe.search.assume_repaired else {}),
        },
        provenance=notes,
    )
    return replace(noted, seen=profile.shingles)


def _unmeasured(baselines: Mapping[str, MeasuredPlan]) -> dict[str, float | None]:
    """Returns the KL of a plan that is not measured, beside that of the baselines that are."""
    of_families = {family: baselines[family].kl if family in baselines else None for family in FAMILIES}
    return {"plan": None, "trial0": None, **of_families}

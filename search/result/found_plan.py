"""The plan that a search found, as it is written: with its notes, and beside it why it is as it is and the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.calibration.profile.rounding_loss import rounding_of
from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import explanation_file
from moacompress.core.errors import PlanError
from moacompress.core.files import write_json
from moacompress.core.statistics import upper_bound
from moacompress.recipe import shared_name
from moacompress.rules.plan import Plan
from moacompress.rules.worst_share import WorstShare
from moacompress.search.baselines.families import FAMILIES
from moacompress.search.baselines.measured import MeasuredBaseline, write_baselines
from moacompress.search.measure.trials import TrialResult, best_trial
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.result.beside_baselines import BesideBaseline
from moacompress.search.result.class_notes import class_quality
from moacompress.search.result.explain import explain
from moacompress.search.result.search_result import (
    baseline_note,
    memory_note,
    read_explanation,
    versions,
)
from moacompress.search.search_context import Incumbent, SearchContext
from moacompress.search.search_request import SearchRequest

UNMEASURED = "surrogate"
"""Stage of a plan that nothing has been measured of."""


def write_first(request: SearchRequest, out: Path) -> None:
    """Writes the surrogate's own plan before anything is measured, so that a search that is killed at once leaves one.

    Args:
        request: what is asked for.
        out: where the plan will be; a measured one of this search stays.
    """
    if _measured_before(request, out) is None:
        first_plan(request).save(out)


def first_plan(request: SearchRequest) -> Plan:
    """Returns the surrogate's own plan before anything is measured; its notes say that of it."""
    plan = request.plan(request.surrogate, request.parameters.neutral)
    measured = {"samples": 0, **class_quality(request.recipe.search.classes, plan)}
    return _with_notes(request, request.surrogate, plan, _unmeasured(), measured, _made([], UNMEASURED, False))


def write_so_far(incumbent: Incumbent, context: SearchContext) -> None:
    """Writes the best plan so far, so that a search that is killed leaves it.

    Args:
        incumbent: the plan; what an earlier run left is written again if it is better.
        context: says where, and what was done.
    """
    plan, _ = _noted(_better_of_earlier(incumbent, context), context, finished=False)
    if context.out is not None:
        plan.save(context.out)


def write_found(incumbent: Incumbent, context: SearchContext) -> tuple[Plan, dict[str, Any]]:
    """Writes what a search ends with.

    Args:
        incumbent: the plan that the last step returned; where the time was up before it was measured, a measured one that an
            earlier run left stays.
        context: says where, and what was done.

    Returns:
        The plan with its notes, which is a baseline's where that measured better; and why it is as it is.
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
        context.surrogate,
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
    return min(incumbent, _earlier(context) or incumbent, key=lambda one: one.kl)


def _earlier(context: SearchContext) -> Incumbent | None:
    """Returns what an earlier run of this search improved, if that is where the plan will be."""
    plan = None if context.out is None else _measured_before(context.request, context.out)
    kls = None if plan is None else context.evaluator.known("improved", plan)
    if plan is None or kls is None:
        return None
    bare = plan.with_notes(budget={}, quality={}, provenance={})
    return Incumbent(bare, kls, plan.provenance["stage"])


def _noted(incumbent: Incumbent, context: SearchContext, *, finished: bool) -> tuple[Plan, list[float]]:
    """Returns the plan with all notes, and its KLs, nats: those of a baseline where that is better, or as good and smaller.

    Where the incumbent is not measured its plan is returned: no baseline is known to be better.
    """
    request, baselines = context.request, context.measured_baselines
    lengths, plan, kls, most = _noted_lengths(request), incumbent.plan, incumbent.kls, request.recipe.search.classes
    kl, beside = _unmeasured(baselines), None
    if kls:
        beside = BesideBaseline.of(incumbent, baselines, max(request.lengths), most, context.candidates)
        if beside is not None:
            plan, kls = beside.plan, beside.kls
        kl |= {"plan": float(np.mean(kls)), "trial0": float(np.mean(context.reference))}
    measured = {
        "baselines": {family: baseline_note(other.plan, other.kl, lengths) for family, other in baselines.items()},
        "best_baseline": None if beside is None else beside.to_dict(),
        "samples": len(kls),
        "harm_upper95": upper_bound(kls) if kls else None,
        **class_quality(most, plan, context.class_cost),
    }
    stage = incumbent.stage if incumbent.kls else UNMEASURED
    made = _made(context.tried, stage, finished and not context.deadline.stopped)
    return _with_notes(request, context.surrogate, plan, kl, measured, made), kls


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


def _noted_lengths(request: SearchRequest) -> set[int]:
    return {*request.profile.lengths, *request.lengths}


def _with_notes(
    request: SearchRequest,
    surrogate: Surrogate,
    plan: Plan,
    kl: Mapping[str, float | None],
    measured: Mapping[str, Any],
    made: Mapping[str, Any],
) -> Plan:
    """Returns a plan with all notes.

    Args:
        request: what was asked for.
        surrogate: predicts the plan's KL.
        plan: the plan.
        kl: measured, nats, by name.
        measured: what else was.
        made: how far its search has come.
    """
    profile, recipe = request.profile, request.recipe
    shared = recipe.of_profile(profile.recipe).shared(profile.source)
    shared["budget"] = list(request.asked)
    noted = plan.with_notes(
        budget={
            "asked": list(request.asked),
            "bytes": plan.kv_bytes_by_length(sorted(_noted_lengths(request))),
            "worst_share": WorstShare.of(plan, profile.lengths).to_dict(),
            **memory_note(request, plan),
        },
        quality={
            **_rounding(profile),
            "predicted_harm": request.predicted(surrogate, plan),
            "measured_harm": dict(kl),
            **measured,
            **({"assumed_repaired": True} if any(plan.shares) and request.recipe.search.assume_repaired else {}),
        },
        provenance={
            "source": shared_name(profile.source),
            "profile": profile.fingerprint,
            "calibration": profile.calibration_fingerprint,
            "lengths": list(profile.lengths),
            "seed": recipe.seed,
            "search": request.key,
            **made,
            "surrogate": dict(surrogate.calibration.__dict__),
            "versions": versions(),
            "recipe": shared,
        },
    )
    return replace(noted, seen=profile.shingles)


def _unmeasured(measured_baselines: Mapping[str, MeasuredBaseline] | None = None) -> dict[str, float | None]:
    """Returns the KL of a plan that is not measured, beside that of the baselines that are."""
    found = measured_baselines or {}
    return {
        "plan": None,
        "trial0": None,
        **{family: found[family].kl if family in found else None for family in FAMILIES},
    }


def _rounding(profile: Profile) -> dict[str, Any]:
    """Returns the note of what weights that were rounded lose by themselves; none of a model whose weights were not."""
    found = rounding_of(profile.path, profile.shape.weights_fingerprint)
    if found is None:
        return {}
    return {"rounded_weights": {name: found[name] for name in found if name != "weights_fingerprint"}}

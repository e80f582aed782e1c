"""The plan that a search found, as it is written: with its notes, and beside it why it is as it is and the baselines."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.core.artefact_names import explanation_file
from moacompress.core.errors import PlanError
from moacompress.core.files import write_json
from moacompress.recipe import shared_name
from moacompress.rules.plan import Plan
from moacompress.search.alternatives import Alternative, write_baselines
from moacompress.search.baselines import FAMILIES
from moacompress.search.explain import explain
from moacompress.search.search_context import SearchContext
from moacompress.search.search_request import SearchRequest
from moacompress.search.search_result import baseline_note, bytes_note, read_explanation, versions
from moacompress.search.standing import Standing
from moacompress.search.surrogate import Surrogate
from moacompress.search.trials import Tried, best_trial, log_ratio

logger = logging.getLogger(__name__)


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
    plan = request.plan(request.surrogate, request.knobs.neutral)
    return _with_notes(request, request.surrogate, plan, _unmeasured(), {"samples": 0}, _made([], UNMEASURED, False))


def write_so_far(standing: Standing, context: SearchContext) -> None:
    """Writes the best plan so far, so that a search that is killed leaves it.

    Args:
        standing: the plan; what an earlier run left is written again if it is better.
        context: says where, and what was done.
    """
    plan = _noted(_better_of_earlier(standing, context), context, finished=False)
    if context.out is not None:
        plan.save(context.out)


def write_found(standing: Standing, context: SearchContext) -> tuple[Plan, dict[str, Any]]:
    """Writes what a search ends with.

    Args:
        standing: the plan that the last step returned; where the time was up before it was measured, a measured one that an
            earlier run left stays.
        context: says where, and what was done.

    Returns:
        The plan with its notes, which is a baseline's where that measured better; and why it is as it is.
    """
    if not standing.harms:
        earlier = None if context.out is None else _measured_before(context.request, context.out)
        if earlier is not None and context.out is not None:
            return earlier, read_explanation(context.out)
    elif context.deadline.stopped:
        standing = _better_of_earlier(standing, context)
    plan = _noted(standing, context, finished=True)
    explanation = explain(
        context.request,
        context.surrogate,
        plan,
        context.tried,
        context.meter.ledger.importances(),
        context.stages,
        plan.quality["measured_harm"],
    )
    if context.out is not None:
        write_json(explanation_file(context.out), explanation)
        write_baselines(context.out, context.request, context.alternatives)
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


def _better_of_earlier(standing: Standing, context: SearchContext) -> Standing:
    """Returns the better of a plan and what an earlier run improved: a run that stops sooner takes nothing back."""
    return min(standing, _earlier(context) or standing, key=lambda one: one.value)


def _earlier(context: SearchContext) -> Standing | None:
    """Returns what an earlier run of this search improved, if that is where the plan will be."""
    plan = None if context.out is None else _measured_before(context.request, context.out)
    harms = None if plan is None else context.meter.known("improved", plan)
    if plan is None or harms is None:
        return None
    bare = plan.with_notes(budget={}, quality={}, provenance={})
    return Standing(bare, harms, log_ratio(harms, context.reference), plan.provenance["stage"])


def _noted(standing: Standing, context: SearchContext, *, finished: bool) -> Plan:
    """Returns the plan, or that of a baseline that measured better, with all notes."""
    plan, harm = _least(standing, context, said=finished)
    lengths = _noted_lengths(context.request)
    measured = {
        "baselines": {
            family: baseline_note(other.plan, other.harm, lengths) for family, other in context.alternatives.items()
        },
        "samples": len(standing.harms),
    }
    stage = standing.stage if standing.harms else UNMEASURED
    made = _made(context.tried, stage, finished and not context.deadline.stopped)
    return _with_notes(context.request, context.surrogate, plan, harm, measured, made)


def _made(tried: Sequence[Tried], stage: str, finished: bool) -> dict[str, Any]:
    """Returns what a plan's notes say of how far its search has come; `best_trial` is None where there is no trial yet."""
    best = best_trial(tried) if tried else None
    return {
        "finished": finished,
        "trials": len(tried),
        "measured_plans": sum(trial.measured for trial in tried),
        "best_trial": None if best is None else best.index,
        "knobs": {} if best is None else best.knobs,
        "stage": stage,
    }


def _noted_lengths(request: SearchRequest) -> set[int]:
    return {*request.profile.lengths, *request.limits}


def _with_notes(
    request: SearchRequest,
    surrogate: Surrogate,
    plan: Plan,
    harm: Mapping[str, float | None],
    measured: Mapping[str, Any],
    made: Mapping[str, Any],
) -> Plan:
    """Returns a plan with all notes.

    Args:
        request: what was asked for.
        surrogate: predicts the plan's harm.
        plan: the plan.
        harm: measured, nats, by name.
        measured: what else was.
        made: how far its search has come.
    """
    profile, recipe = request.profile, request.recipe
    shared = recipe.shared(profile.source)
    shared["budget"] = list(request.asked)
    return plan.with_notes(
        budget={"asked": list(request.asked), "bytes": bytes_note(plan, _noted_lengths(request))},
        quality={
            "predicted_harm": request.predicted(surrogate, plan),
            "measured_harm": dict(harm),
            **measured,
            **_assumed(request, plan, harm["plan"]),
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


def _unmeasured(alternatives: Mapping[str, Alternative] | None = None) -> dict[str, float | None]:
    """Returns the harm of a plan that is not measured, beside that of the baselines that are."""
    found = alternatives or {}
    return {
        "plan": None,
        "trial0": None,
        **{family: found[family].harm if family in found else None for family in FAMILIES},
    }


def _least(standing: Standing, context: SearchContext, *, said: bool) -> tuple[Plan, dict[str, float | None]]:
    """Returns the plan of least harm, of the standing and the baselines, and the harm of each of them, nats.

    Args:
        standing: the best plan found.
        context: its `alternatives` are the baselines.
        said: whether a baseline that wins is warned of.

    Returns:
        The standing's plan, and None for its harm, where that is not measured: then no baseline is known to be better.
    """
    alternatives = context.alternatives
    if not standing.harms:
        return standing.plan, _unmeasured(alternatives)
    plan, least = standing.plan, standing.harm
    for family, other in alternatives.items():
        if other.harm < least:
            plan, least = other.plan, other.harm
            if said:
                logger.warning(
                    "nothing that was found beats the baseline %s: it measures %.3g nats, the best plan %.3g; its plan is "
                    "returned",
                    family,
                    other.harm,
                    standing.harm,
                )
    return plan, {**_unmeasured(alternatives), "plan": least, "trial0": float(np.mean(context.reference))}


def _assumed(request: SearchRequest, plan: Plan, harm: float | None) -> dict[str, Any]:
    """Returns what a plan's notes say that its harm assumes: a repair; the share that healing leaves, and the harm before."""
    if not any(plan.shares):
        return {}
    found: dict[str, Any] = {}
    if request.recipe.search.assume_repaired:
        found["assumed_repaired"] = True
    left = request.left(plan)
    if left < 1 and harm is not None:
        found["assumed_healed"] = {"left": request.recipe.search.assume_healed, "measured_unhealed": harm / left}
    return found

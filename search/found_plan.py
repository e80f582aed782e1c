"""The plan that a search found, as it is written: with its notes, and beside it why it is as it is and the baselines."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from moacompress.core.artefact_names import explanation_file
from moacompress.core.errors import PlanError
from moacompress.core.files import write_json
from moacompress.recipe import shared_name
from moacompress.rules.plan import Plan
from moacompress.search.alternatives import write_baselines
from moacompress.search.baselines import FAMILIES
from moacompress.search.explain import explain
from moacompress.search.search_context import SearchContext
from moacompress.search.search_request import SearchRequest
from moacompress.search.search_result import baseline_note, bytes_note, versions
from moacompress.search.standing import Standing
from moacompress.search.trials import best_trial, log_ratio

logger = logging.getLogger(__name__)


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
        standing: the plan that the last step returned.
        context: says where, and what was done.

    Returns:
        The plan with its notes, which is a baseline's where that measured better; and why it is as it is.
    """
    if context.deadline.stopped:
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


def _better_of_earlier(standing: Standing, context: SearchContext) -> Standing:
    """Returns the better of a plan and what an earlier run improved: a run that stops sooner takes nothing back."""
    return min(standing, _earlier(context) or standing, key=lambda one: one.value)


def _earlier(context: SearchContext) -> Standing | None:
    """Returns what an earlier run of this search improved, if that is where the plan will be."""
    if context.out is None or not context.out.exists():
        return None
    try:
        plan = Plan.load(context.out)
    except PlanError:  # something else, which is to be replaced
        return None
    harms = context.meter.known("improved", plan)
    if harms is None or plan.provenance.get("search") != context.request.key:
        return None
    bare = plan.with_notes(budget={}, quality={}, provenance={})
    return Standing(bare, harms, log_ratio(harms, context.reference), plan.provenance["stage"])


def _noted(standing: Standing, context: SearchContext, *, finished: bool) -> Plan:
    """Returns the plan, or that of a baseline that measured better, with all notes."""
    request, profile, recipe = context.request, context.request.profile, context.request.recipe
    plan, harm = _least(standing, context, said=finished)
    lengths = {*profile.lengths, *request.limits}
    best = best_trial(context.tried)
    shared = recipe.shared(profile.source)
    shared["budget"] = list(request.asked)
    return plan.with_notes(
        budget={"asked": list(request.asked), "bytes": bytes_note(plan, lengths)},
        quality={
            "predicted_harm": request.predicted(context.surrogate, plan),
            "measured_harm": harm,
            "baselines": {
                family: baseline_note(other.plan, other.harm, lengths) for family, other in context.alternatives.items()
            },
            "samples": context.meter.measure.size,
            **_assumed(request, plan, harm["plan"]),
        },
        provenance={
            "source": shared_name(profile.source),
            "profile": profile.fingerprint,
            "calibration": profile.calibration_fingerprint,
            "lengths": list(profile.lengths),
            "seed": recipe.seed,
            "search": request.key,
            "finished": finished and not context.deadline.stopped,
            "trials": len(context.tried),
            "measured_plans": sum(trial.measured for trial in context.tried),
            "best_trial": best.index,
            "knobs": best.knobs,
            "stage": standing.stage,
            "surrogate": dict(context.surrogate.calibration.__dict__),
            "versions": versions(),
            "recipe": shared,
        },
    )


def _least(standing: Standing, context: SearchContext, *, said: bool) -> tuple[Plan, dict[str, float | None]]:
    """Returns the plan of least harm, of the standing and the baselines, and the harm of each of them, nats.

    Args:
        standing: the best plan found.
        context: its `alternatives` are the baselines.
        said: whether a baseline that wins is warned of.
    """
    alternatives = context.alternatives
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
    families = {family: alternatives[family].harm if family in alternatives else None for family in FAMILIES}
    return plan, {"plan": least, "trial0": float(np.mean(context.reference)), **families}


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

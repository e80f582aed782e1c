"""The study: Optuna chooses knobs that bend the surrogate, the solver makes a plan of it, and the model measures the plan."""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.rules.plan import Plan
from moacompress.search.deadline import TimeUp
from moacompress.search.found_plan import write_so_far
from moacompress.search.search_context import SearchContext
from moacompress.search.search_request import Knob
from moacompress.search.standing import Standing
from moacompress.search.trials import CAUTION, Trials, Tried, best_trial, least_trial


def tune_knobs(standing: Standing, context: SearchContext) -> Standing:
    """Runs the trials that are missing, and returns the plan of the best one; a best trial's plan is written at once.

    Args:
        standing: the surrogate's own plan, which trial 0 measures.
        context: its `tried` are filled with the trials.

    Raises:
        TimeUp: the time was up before trial 0 was measured.
    """
    request, meter = context.request, context.meter
    neutral = request.knobs.neutral

    def plan_of(knobs: Knob) -> Plan:
        return standing.plan if knobs == neutral else context.plan_of(knobs)

    def after(tried: Sequence[Tried]) -> str:
        context.tried = list(tried)
        trial = best_trial(tried)
        best = Standing.of(trial, request.profile)
        if trial.index == len(tried) - 1:
            write_so_far(best, context)
        return _note(best, context)

    trials = Trials(meter.ledger, meter.measure, meter.order, plan_of, context.deadline)
    tried = context.tried = trials.completed("searching", request.recipe.search.trials, context.progress, after)
    if not tried:
        raise TimeUp
    best, least, first = (
        Standing.of(trial, request.profile) for trial in (best_trial(tried), least_trial(tried), tried[0])
    )
    context.add_stage("surrogate", first, True)
    context.add_stage("study", best if best.value < 0 else least, best.value < 0, first.harms, CAUTION)
    return best


def _note(best: Standing, context: SearchContext) -> str:
    """Returns the best harm so far, beside that of the best baseline."""
    note = f"best {best.harm:.3g} nats ({best.stage})"
    if not context.alternatives:
        return note
    family, other = min(context.alternatives.items(), key=lambda item: item[1].harm)
    return f"{note}, {family} {other.harm:.3g}"

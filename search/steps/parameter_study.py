"""The study: Optuna chooses parameters that bend the surrogate, the solver makes a plan, the model measures it."""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.rules.plan import Plan
from moacompress.search.deadline import TimeUp
from moacompress.search.measure.trials import TrialResult, Trials, best_trial, lowest_trial
from moacompress.search.result.explain import STUDY
from moacompress.search.result.found_plan import write_so_far
from moacompress.search.search_context import Incumbent, SearchContext
from moacompress.search.search_request import ParameterValues


def tune_parameters(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Runs the trials that are missing, and returns the plan of the best one; a best trial's plan is written at once.

    Trial 0 measures the incumbent, the surrogate's own plan. The context's `tried` are filled with the trials.

    Raises:
        TimeUp: the time was up before trial 0 was measured.
    """
    request, evaluator = context.request, context.evaluator
    neutral = request.parameters.neutral

    def plan_of(parameters: ParameterValues) -> Plan:
        return incumbent.plan if parameters == neutral else request.plan(parameters)

    def after(tried: Sequence[TrialResult]) -> str:
        context.tried = list(tried)
        trial = best_trial(tried)
        best = Incumbent.of(trial, request.profile)
        if trial.index == len(tried) - 1:
            write_so_far(best, context)
        return f"best {best.kl:.3g} nats ({best.stage})"

    kls = evaluator.shown("trial0", incumbent.plan, "measuring trial 0")
    trials = Trials(evaluator.study_storage, evaluator, plan_of, incumbent.plan, kls, context.progress)
    tried = context.tried = trials.completed("searching", request.recipe.search.trials, after)
    if not tried:
        raise TimeUp
    best, first = best_trial(tried), Incumbent.of(tried[0], request.profile)
    context.add_stage("surrogate", first, True)
    shown = Incumbent.of(best if best.index else lowest_trial(tried), request.profile)
    context.add_stage(STUDY, shown, best.index > 0, first.kls, tried)
    return Incumbent.of(best, request.profile)

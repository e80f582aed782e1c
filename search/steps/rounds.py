"""Rounds: profile again under the plan at hand, and move some of its bytes to where they are worth more.

Around the plan the change of every rule has a sign. The changes of many heads must not be added up, though: what gains alone
can be the same gain, and a few samples around the plan tell less than the many of the profile. So both are joined in one
quadratic form, which is minimised near the plan. How near, how far its pairs are believed, and whether it is of the mean KL
or of its mean logarithm, is a small study of its own, in every round.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.rules.plan import Plan
from moacompress.search.deadline import TimeUp
from moacompress.search.measure.trials import Trials, best_trial, least_trial
from moacompress.search.predict.around import Forms
from moacompress.search.problem.knapsack import Knapsack
from moacompress.search.problem.quadratic import Quadratic
from moacompress.search.result.found_plan import write_so_far
from moacompress.search.search_context import Incumbent, SearchContext
from moacompress.search.search_request import ParameterValues

logger = logging.getLogger(__name__)

RANGES = {"moved": (0.0, 0.2), "coherence": (0.1, 0.9), "relative": (0.0, 1.0)}
"""Each search parameter of a round, its smallest and its largest value.

`moved`: share of the budget that changes hands; at 0 the plan is what it was.
`coherence`: share of the quadratic form, beside what it says of single KV heads.
`relative`: see `Quadratic.of`.
"""
NEUTRAL = {"moved": 0.0, "coherence": 0.5, "relative": 1.0}
"""Search parameters that leave the plan as it is: trial 0 of every round."""
STARTS = (
    {"moved": 0.1, "coherence": 0.5, "relative": 1.0},
    {"moved": 0.1, "coherence": 0.9, "relative": 0.0},
    {"moved": 0.025, "coherence": 0.9, "relative": 0.0},
)
"""What is tried right after it."""
ROUND_CAUTION = 1.0
"""Standard errors by which a plan of a round must be better: it is aimed at one plan, and gains more than a trial does."""


def make_rounds(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Profiles around the best plan and moves bytes, as long as that helps; a plan that is better is written at once.

    Plans whose layers share attention are not profiled around: the best trial without sharing is improved instead, where there
    is one, and the better of the two is kept. The result has the form of what was profiled last.
    """
    if not incumbent.plan.shares:
        return _rounds(incumbent, context, incumbent)
    own = [trial for trial in context.tried if "shares" not in trial.plan]
    if not context.request.recipe.search.rounds or context.around is None:
        return incumbent
    if not own:
        logger.warning("rounds know nothing of layers that share attention: none is made")
        return incumbent
    logger.info(
        "rounds know nothing of layers that share attention: they improve the best plan without, to be compared"
    )
    alone = _rounds(Incumbent.of(best_trial(own), context.request.profile), context, incumbent)
    return min(incumbent, alone, key=lambda one: one.kl)


def _rounds(incumbent: Incumbent, context: SearchContext, reference: Incumbent) -> Incumbent:
    """Makes the rounds on a plan without sharing; what is written is the better of it and a reference."""
    forms: Forms | None = None
    for number in range(1, context.request.recipe.search.rounds + 1):
        if context.around is None or context.deadline.over():
            break
        try:
            around = context.around(incumbent.plan, context.progress)
        except TimeUp:
            break
        forms = _joined(around, context.request.quadratic)
        better = _round(number, incumbent, forms, context)
        if better is None:
            break
        incumbent = better
        write_so_far(min(incumbent, reference, key=lambda one: one.kl), context)
    return incumbent if forms is None else replace(incumbent, form=forms(NEUTRAL["relative"]))


def _joined(around: Forms, profiled: Quadratic | None) -> Forms:
    """Returns the forms around a plan with what the profile of the dense model says of KV heads together."""
    return around if profiled is None else lambda relative: profiled.joined(around(relative))


def _round(number: int, incumbent: Incumbent, forms: Forms, context: SearchContext) -> Incumbent | None:
    """Returns the better plan that moving some of the bytes gives, or None.

    A small study of how to move them: trial 0 is the plan as it is, and one that beats it by a standard error is better.
    """
    profile, evaluator, space = context.request.profile, context.evaluator, context.request.space()
    choice = space.choice(incumbent.plan)

    def plan_of(parameters: ParameterValues) -> Plan:
        return space.plan(moved(space.knapsack, forms(parameters["relative"]), parameters, choice))

    study_storage = context.study_storage_of(incumbent.plan.key(), RANGES, [NEUTRAL, *STARTS])
    trials = Trials(study_storage, evaluator, plan_of, incumbent.plan, incumbent.kls, context.progress)
    tried = trials.completed(
        f"round {number}",
        1 + context.request.recipe.search.round_trials,
        lambda done: f"{done[-1].parameters['moved']:.0%} moved: {done[-1].kl:.3g} nats",
    )
    if not tried:
        return None
    won = best_trial(tried, ROUND_CAUTION)
    others = [trial for trial in tried[1:] if not trial.pruned]
    shown = least_trial(others) if others and not won.index else won
    plan = Incumbent.of(shown, profile).plan
    found = replace(incumbent, plan=plan, kls=shown.kls, stage=f"round {number}")
    name = f"round {number}, {shown.parameters['moved']:.1%} moved"
    context.add_stage(name, found, won.index > 0, incumbent.kls, tried)
    if not won.index:
        return None
    evaluator.keep("improved", found.plan, found.kls)
    return found


def moved(knapsack: Knapsack, form: Quadratic, parameters: Mapping[str, float], choice: Ints) -> Ints:
    """Returns the choice of lowest predicted KL within reach of the present one, both int64 `[layers, kv_heads]`.

    Of the search parameters `moved` is the share of the last limit, of bytes that of the longest length, that may change
    hands; `coherence` the weight of the form beside the sum of what it says of single KV heads.
    """
    if not parameters["moved"]:
        return choice
    here = np.take_along_axis(knapsack.sizes, choice[None, ..., None], axis=-1)
    distance = np.abs(knapsack.sizes - here)[-1:]
    limit = int(2 * parameters["moved"] * knapsack.limits[-1])  # what goes from one head to another counts twice
    near = replace(knapsack, sizes=np.concatenate([knapsack.sizes, distance]), limits=np.append(knapsack.limits, limit))
    return form.refined(choice, form.changes(choice), parameters["coherence"], near)

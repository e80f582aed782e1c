"""What sharing gives at a budget: for several numbers of copying layers what is predicted, and what trials measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moacompress.core.errors import InfeasibleBudgetError
from moacompress.rules.plan import Plan
from moacompress.rules.share import LayerShares
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.trials import TrialResult
from moacompress.search.predict.surrogate import Surrogate

if TYPE_CHECKING:
    from moacompress.search.search_request import SearchRequest


def sharing_notes(
    request: SearchRequest, surrogate: Surrogate, plan: Plan, tried: Sequence[TrialResult]
) -> dict[str, Any]:
    """Returns what is known of sharing, as JSON values.

    Returns:
        `asked`; `repaired`, of each copy that was repaired its `layer`, its `anchor` and what is `left` of the change of the
        layer's attention output, and so of its KL as it is counted here;
        `most`, layers that a trial could let share, or None; `shared`, layers of the plan that share; `counts`: for no copy,
        one, and every number that was tried or asked for, `layers`; `pairs` of a layer and its anchor, as chosen for this
        number; `copies`, their predicted KL; `predicted`, that of the solver's plan with them, None where none fits; and of
        the best trial that shared so many, `harm` and the `difference` to trial 0, None where none was measured on all samples.
        KLs in nats.
    """
    choice = request.sharing
    assert choice is not None
    best: dict[int, TrialResult] = {}
    for trial in tried:
        count = sum(share is not None for share in trial.plan.get("shares", ()))
        if count not in best or (trial.pruned, trial.kl) < (best[count].pruned, best[count].kl):
            best[count] = trial
    known: dict[int, LayerShares] = {0: ()}
    for count in {1, *best} if choice.asked.auto else ():
        known[count] = choice.shares(count)
    if choice.fixed:
        known[sum(share is not None for share in choice.fixed)] = choice.fixed
    rows = []
    for count, shares in sorted(known.items()):
        space = request.space(shares)
        try:
            made = space.plan(space.knapsack.choose(space.costs(surrogate.costs())))
        except InfeasibleBudgetError:  # only what shares more fits
            made = None
        found = best.get(count)
        measured: dict[str, Any] = {"harm": None, "difference": None}
        if found is not None and not found.pruned:
            measured = {"harm": found.kl, "difference": KlDifference.of(found.kls, tried[0].kls).to_dict()}
        rows.append(
            {
                "layers": count,
                "pairs": [[layer, share.anchor] for layer, share in enumerate(shares) if share is not None],
                "copies": choice.costs.cost(shares, surrogate.calibration),
                "predicted": None if made is None else request.predicted(surrogate, made),
                **measured,
            }
        )
    return {
        "asked": choice.asked.text,
        "repaired": [
            {"layer": layer, "anchor": anchor, "left": one.left} for (layer, anchor), one in choice.repairs.items()
        ],
        "most": request.most_shared or None,
        "shared": sum(share is not None for share in plan.shares),
        "counts": rows,
    }

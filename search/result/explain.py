"""Why a plan is as it is: which KV heads stay long, which search parameters mattered, what each step gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.calibration.profile.statistics import ROBUST
from moacompress.core.errors import InfeasibleBudgetError
from moacompress.rules.cost import format_rows, kept_bits
from moacompress.rules.kv_bytes import candidate_kv_bytes
from moacompress.rules.plan import Plan
from moacompress.rules.share import LayerShares
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.packed_plan import unpack
from moacompress.search.measure.trials import TrialResult, best_trial
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.sharing.copy_costs import CopyCosts

if TYPE_CHECKING:
    from moacompress.search.search_request import SearchRequest

STUDY = "study"
"""Name of the step that runs the trials."""


@dataclass(frozen=True)
class Stage:
    """A step of the search.

    Attributes:
        name: what it was.
        kls: of its plan, nats, in the order of the shuffled samples.
        kept: whether its plan became the best one.
        plan: its plan's rules, as `packed_plan.pack` packs them.
        difference: to the plan that it had to beat; None for the first one.
    """

    name: str
    kls: list[float]
    kept: bool
    plan: dict[str, Any]
    difference: KlDifference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as the explanation has it, where the mean KL is called `harm`."""
        return {
            "name": self.name,
            "harm": float(np.mean(self.kls)),
            "difference": None if self.difference is None else self.difference.to_dict(),
            "kept": self.kept,
            "plan": self.plan,
        }


def explain(
    request: SearchRequest,
    plan: Plan,
    tried: Sequence[TrialResult],
    importances: Mapping[str, float],
    stages: Sequence[Stage],
    kls: Sequence[float],
) -> dict[str, Any]:
    """Returns what a search can say about its plan, as JSON values.

    The plan is the one that is returned; its KLs are in nats, in the order of the shuffled samples, and empty where it is not
    measured.

    Returns:
        `heads`: of every KV head its rule, the tokens that it keeps at the longest limited length, and `saves`: predicted
        KL in nats of giving it the budget's average share instead, less that of its own rule; those that save most first.
        `formats`: `bits` of keys and values, mean over the kept tokens, and for every pair of formats its KV heads and bytes;
        at the longest limited length.
        `knobs`: share of the variation between trials that goes with each search parameter.
        `predicted`: predicted and measured KL of the trials, and their Spearman correlation.
        `kinds`: predicted KL of the plan on each kind of samples that was profiled; None where a rule is no candidate.
        `sharing`: see `sharing_notes`; where it was asked for.
        `trials`: of every trial its number, its KL on the samples that it was measured on, whether it was pruned and whether
        it was the best, and its `difference` to trial 0 on these samples.
        `refused`: the plan of lowest mean KL, where it is another one.
        `best_baseline`: see `BesideBaseline.to_dict`; None where none was measured.
        `classes`: see `class_quality`; where their number had a limit.
        `stages`, `harm`: mean KLs by name.
    """
    n = max(request.lengths)
    return {
        "format": "moacompress-explanation",
        "plan": plan.key(),
        "budget": list(request.asked),
        "harm": dict(plan.quality["measured_harm"]),
        "best_baseline": plan.quality.get("best_baseline"),
        "refused": refused(plan, kls, tried, stages),
        "stages": [stage.to_dict() for stage in stages],
        "knobs": dict(sorted(importances.items(), key=lambda item: -item[1])),
        "predicted": _predicted(request, tried),
        "kinds": _by_kind(request, plan),
        "formats": {
            "bits": kept_bits(plan, n),
            "pairs": format_rows(plan, n),
        },
        "heads": head_rows(request, plan),
        "trials": [
            {
                "trial": trial.index,
                "harm": trial.kl if trial.kls else None,
                "pruned": trial.pruned,
                "kept": trial.index == best_trial(tried).index,
                "difference": KlDifference.of(trial.kls, tried[0].kls).to_dict(),
            }
            for trial in tried
        ],
        **({"classes": plan.quality["classes"]} if "classes" in plan.quality else {}),
        **({"sharing": sharing_notes(request, plan, tried)} if request.sharing else {}),
    }


def refused(
    plan: Plan, kls: Sequence[float], tried: Sequence[TrialResult], stages: Sequence[Stage]
) -> dict[str, Any] | None:
    """Returns the plan of lowest mean KL that was measured on all samples, where it is not the one that is returned.

    It has the `name` of the step or trial, its `harm`, and its `difference` to the returned plan.
    """
    measured = [(f"trial {trial.index}", trial.kls) for trial in tried if not trial.pruned and trial.key != plan.key()]
    measured += [(stage.name, stage.kls) for stage in stages if not stage.kept and stage.name != STUDY]
    if not kls or not measured:
        return None
    name, least = min(measured, key=lambda item: float(np.mean(item[1])))
    difference = KlDifference.of(least, kls, [other for _, other in measured])
    if difference.value >= 0:
        return None
    return {"name": name, "harm": float(np.mean(least)), "difference": difference.to_dict()}


def head_rows(request: SearchRequest, plan: Plan) -> list[dict[str, Any]]:
    """Returns a row of every KV head, those first whose bytes are worth most; see `explain`."""
    profile, shape = request.profile, request.profile.shape
    n = max(request.limits)
    average = request.limits[n] // (shape.layers * shape.kv_heads)
    (sizes_of,) = candidate_kv_bytes(shape, request.surrogate.rules, profile.min_window, [n])
    costs = request.surrogate.costs()
    number = {rule: index for index, rule in enumerate(request.surrogate.rules)}
    rows = []
    for layer, rules in enumerate(plan.rules):
        native = shape.native_windows[layer]
        for head, rule in enumerate(rules):
            sizes = sizes_of[layer, head]
            fits = sizes <= max(average, int(sizes.min()))
            at_average = float(costs[layer, head][fits].min())
            own = float(costs[layer, head, number[rule]]) if rule in number else None
            rows.append(
                {
                    "layer": layer,
                    "kv_head": head,
                    "rule": "full" if rule.is_full else asdict(rule),
                    "kept": int(rule.kept(n, profile.min_window, native)),
                    "of": n if native is None else min(n, native),
                    "harm": own,
                    "saves": None if own is None else at_average - own,
                }
            )
    return sorted(rows, key=lambda row: -(row["saves"] or 0.0))


def _by_kind(request: SearchRequest, plan: Plan) -> dict[str, float | None]:
    """Returns the predicted KL of a plan on each kind of samples, nats."""
    profile, found = request.profile, {}
    for kind in sorted(set(profile.sample_kinds)):
        influence = profile.influence(ROBUST, kind)
        alone = Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths))
        kl = alone.predicted(plan)
        if kl is not None and plan.shares:
            kl += CopyCosts.of_kind(profile, kind).cost(plan.shares)
        found[kind] = kl
    return found


def _predicted(request: SearchRequest, tried: Sequence[TrialResult]) -> dict[str, Any]:
    """Returns predicted and measured KL of the distinct plans that were measured on all samples."""
    from scipy.stats import spearmanr

    profile = request.profile
    distinct: dict[str, TrialResult] = {}
    for trial in tried:
        distinct.setdefault(trial.key, trial)
    pairs = [
        [request.predicted(unpack(trial.plan, profile)), trial.kl] for trial in distinct.values() if not trial.pruned
    ]
    predicted, measured = zip(*pairs, strict=True) if pairs else ((), ())
    varied = min(len(set(predicted)), len(set(measured))) > 2
    return {"pairs": pairs, "spearman": float(spearmanr(predicted, measured).statistic) if varied else None}


def sharing_notes(request: SearchRequest, plan: Plan, tried: Sequence[TrialResult]) -> dict[str, Any]:
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
            made = space.plan(space.knapsack.choose(space.costs(request.surrogate.costs())))
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
                "copies": choice.costs.cost(shares),
                "predicted": None if made is None else request.predicted(made),
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

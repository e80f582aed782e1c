"""Why a plan is as it is: which KV heads stay long, which search parameters mattered, what each step gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.rules.cost import format_rows, kept_bits
from moacompress.rules.plan import Plan
from moacompress.search.measure.packed_plan import unpack
from moacompress.search.measure.trials import CAUTION, Tried, best_trial, noise
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.sharing.copy_costs import CopyCosts
from moacompress.search.sharing.notes import sharing_notes

if TYPE_CHECKING:
    from moacompress.search.search_request import SearchRequest


@dataclass(frozen=True)
class Stage:
    """A step of the search.

    Attributes:
        name: what it was.
        kl: of its plan, nats.
        log_ratio: mean paired log-ratio of that KL to the surrogate's own plan.
        kept: whether its plan became the best one.
        plan: its plan's rules, as `packed_plan.pack` packs them.
        gain: mean paired log-ratio to the plan that it had to beat, below 0 where it is better; None for the first one.
        noise: what the gain had to be beyond: some standard errors of it.
    """

    name: str
    kl: float
    log_ratio: float
    kept: bool
    plan: dict[str, Any]
    gain: float | None = None
    noise: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as the explanation has it, where the KL is called `harm`."""
        return {"harm" if name == "kl" else name: value for name, value in asdict(self).items()}


def explain(
    request: SearchRequest,
    surrogate: Surrogate,
    plan: Plan,
    tried: Sequence[Tried],
    importances: Mapping[str, float],
    stages: Sequence[Stage],
    kl: Mapping[str, float | None],
) -> dict[str, Any]:
    """Returns what a search can say about its plan, as JSON values.

    Args:
        request: what was asked for.
        surrogate: calibrated.
        plan: the plan that is returned.
        tried: the finished trials.
        importances: share of the variation between trials that goes with each search parameter.
        stages: steps of the search.
        kl: measured, by name.

    Returns:
        `heads`: of every KV head its rule, the tokens that it keeps at the longest limited length, and `saves`: predicted
        KL in nats of giving it the budget's average share instead, less that of its own rule; those that save most first.
        `formats`: `bits` of keys and values, mean over the kept tokens, and for every pair of formats its KV heads and bytes;
        at the longest limited length.
        `knobs`: the importances. `predicted`: predicted and measured KL of the trials, and their Spearman correlation.
        `kinds`: predicted KL of the plan on each kind of samples that was profiled; None where a rule is no candidate.
        `sharing`: see `sharing_notes`; where it was asked for.
        `trials`: of every trial its number, its KL on the samples that it was measured on, whether it was given up and
        whether it was the best, and its `gain` over trial 0 with the `noise` that this had to be beyond.
        `classes`: see `class_quality`; where their number had a limit.
        `stages`, `harm`.
    """
    n = max(request.lengths)
    return {
        "format": "moacompress-explanation",
        "plan": plan.key(),
        "budget": list(request.asked),
        "harm": dict(kl),
        "stages": [stage.to_dict() for stage in stages],
        "knobs": dict(sorted(importances.items(), key=lambda item: -item[1])),
        "predicted": _predicted(request, surrogate, tried),
        "kinds": _by_kind(request, surrogate, plan),
        "formats": {
            "bits": kept_bits(plan, n),
            "pairs": format_rows(plan, n),
        },
        "heads": head_rows(request, surrogate, plan),
        "trials": [
            {
                "trial": trial.index,
                "harm": float(np.mean(trial.kls)) if trial.kls else None,
                "pruned": trial.pruned,
                "kept": trial.index == best_trial(tried).index,
                "gain": trial.value,
                "noise": noise(trial.kls, tried[0].kls, CAUTION),
            }
            for trial in tried
        ],
        **({"classes": plan.quality["classes"]} if "classes" in plan.quality else {}),
        **({"sharing": sharing_notes(request, surrogate, plan, tried)} if request.sharing else {}),
    }


def head_rows(request: SearchRequest, surrogate: Surrogate, plan: Plan) -> list[dict[str, Any]]:
    """Returns a row of every KV head, those first whose bytes are worth most; see `explain`."""
    profile, shape = request.profile, request.profile.shape
    constraint = request.constraints[-1]
    n, average = constraint.cost.length, constraint.limit // (shape.layers * shape.kv_heads)
    sizes_of = constraint.cost.table(shape, surrogate.rules, profile.min_window)
    costs = surrogate.costs()
    number = {rule: index for index, rule in enumerate(surrogate.rules)}
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


def _by_kind(request: SearchRequest, surrogate: Surrogate, plan: Plan) -> dict[str, float | None]:
    """Returns the predicted KL of a plan on each kind of samples, nats."""
    profile, found = request.profile, {}
    for kind in sorted(set(profile.sample_kinds)):
        influence = profile.influence(request.recipe.profile.estimator, kind)
        alone = Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths))
        kl = alone.calibrated(surrogate.calibration).predicted(plan)
        if kl is not None and plan.shares:
            copies = CopyCosts.of_kind(profile, request.recipe.profile.estimator, kind)
            kl += copies.cost(plan.shares, surrogate.calibration)
        found[kind] = kl
    return found


def _predicted(request: SearchRequest, surrogate: Surrogate, tried: Sequence[Tried]) -> dict[str, Any]:
    """Returns predicted and measured KL of the distinct plans that were measured on all samples."""
    from scipy.stats import spearmanr

    profile = request.profile
    pairs = []
    for trial in tried:
        if trial.measured and not trial.pruned:
            plan = unpack(trial.plan, profile)
            pairs.append([request.predicted(surrogate, plan), float(np.mean(trial.kls))])
    predicted, measured = zip(*pairs, strict=True) if pairs else ((), ())
    varied = min(len(set(predicted)), len(set(measured))) > 2
    return {"pairs": pairs, "spearman": float(spearmanr(predicted, measured).statistic) if varied else None}

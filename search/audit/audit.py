"""The audit of a profile: is predicted KL close to measured KL, in rank and in magnitude?

Measured are ablations of single KV heads and whole plans of equal bytes, on held-out samples, and every estimator that
the profile holds is judged by the same measurements. The reference is the model under the full plan: the dense model,
computed by the same attention as the plans, so that a difference is the plan's alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.calibration.data.samples import Sample, fingerprint_ordered
from moacompress.calibration.profile.statistics import ROBUST
from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats
from moacompress.core.artefact_names import AUDIT_FILE, audit_records_file, of_audit
from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.files import fingerprint, finite_json, read_json, remove, write_json
from moacompress.core.lock_holders import own_file
from moacompress.core.progress import SILENT, Progress
from moacompress.core.shown import Shown
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe, shared_name
from moacompress.rules.budget import Budget
from moacompress.rules.candidates import candidate_rules, in_formats
from moacompress.rules.limits import budget_limits
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import SINKS
from moacompress.runtime.ready_model import load_for
from moacompress.search.audit.precision import assess_formats, choose_format_picks, format_plans
from moacompress.search.audit.sharing import assess_copies, audit_repairs, choose_copy_picks, copy_costs, copy_plans
from moacompress.search.audit.split_half import split_half
from moacompress.search.audit.statistics import assess
from moacompress.search.audit.subjects import check_counts, choose_ablations, equal_byte_choices, masking_rules
from moacompress.search.measure.measuring import measured_kls
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.problem.knapsack import ablation, chosen_plan
from moacompress.search.problem.plan_space import PlanSpace
from moacompress.search.search_request import SearchRequest, offered_formats

logger = logging.getLogger(__name__)

FORMAT = "moacompress-audit"
VERSION = 1


@dataclass(frozen=True)
class Audit(Shown):
    """What an audit found.

    Attributes:
        request: fingerprint of what was asked for.
        data: `model`, `profile` (fingerprint), `samples`, `budget`, `estimator` (the search's), and the results:
            `audit`: for each estimator `spearman, ci95, ratio, ratio_range, n`, of the ablations;
            `audit_plans`: the same of the plans, and `regret`;
            `audit_precision`, `precision_points`: of single KV heads in other formats, see `audit_precision`; where the search
            offers formats;
            `audit_sharing`, `sharing_points`: of single layers that copy an earlier one's attention, see `audit_sharing`, and
            `audit_repair`, `repair_points` of some of them once repaired; where the profile has copies;
            `chosen_minus_moa`: difference of Spearman's, `value, ci95`, where the profile has moa;
            `split_half`: see `split_half`;
            `points`: each ablation, `layer, kv_head, rule, measured`, and for each estimator the KL `predicted`;
            `plans`: each plan, `key, noise, kv_bytes, measured`, and for each estimator the KL `predicted`.
            KLs are in nats per answer token.
    """

    request: str
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"format": FORMAT, "version": VERSION, "request": self.request, **self.data}

    @staticmethod
    def load(path: Path) -> Audit:
        """Reads an audit.

        Raises:
            ArtefactError: unreadable, or not an audit of this version.
        """
        data = read_json(path, "audit")
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ArtefactError(f"{path} is not an audit that this moacompress reads; choose another file")
        return Audit(str(data.get("request")), {key: data[key] for key in data if key not in _HEAD})


_HEAD = ("format", "version", "request")


def check_audit(shape: ModelShape, recipe: Recipe, count: int, plans: int, budget: str) -> None:
    """Refuses an audit that cannot be, before anything is profiled.

    Raises:
        UsageError: no ablation, or more than there are; fewer than no plans; a budget that does not parse.
        InfeasibleBudgetError: no plan fits the budget.
    """
    lengths, chosen = recipe.calibration.lengths, recipe.profile
    spans = candidate_rules(max(lengths), SINKS, chosen.min_window)
    check_counts(shape, masking_rules(shape, spans, chosen.min_window, lengths), count, plans)
    rules = in_formats(spans, offered_formats(chosen.formats, recipe))
    budget_limits([Budget.parse(budget)], shape, lengths, rules, chosen.min_window)


def audit(
    profile: Profile,
    model: str | Path | SourceModel,
    count: int,
    plans: int = 40,
    budget: str = "25%",
    samples: Sequence[Sample] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Audit:
    """Measures ablations and plans and compares every estimator of a profile with them.

    Where the recipe's search offers formats, as many ablations of single formats are measured beside those of spans, and the
    plans mix both; estimators that say nothing of formats predict what the spans cost. Where the profile has copies, as many of
    single layers are measured too, as far as there are.

    The same call continues where a killed one stopped: every KL is kept in records beside `out`.

    Args:
        profile: of the dense model.
        model: MODEL that was profiled, or the model itself, loaded.
        count: ablations of single KV heads.
        plans: plans of equal bytes.
        budget: of the plans.
        samples: held-out samples; by default the profile's validation samples of the lengths that it predicts.
        seed: of all that is drawn.
        out: the file of the result; by default `audit.json` in the profile's folder.
        progress: told of every measurement.
        overwrite: start from scratch: the audit at `out` is removed, and what was measured for it.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.

    Raises:
        UsageError: counts that there cannot be, or a budget that does not parse.
        InfeasibleBudgetError: no plan fits the budget.
        DataError: no samples.
        ModelError: another model than the profile's, or logits that are not finite.
        ArtefactError: `out` is something else, cannot be written, or another process is at work on it.
    """
    model = load_for(profile.recipe, model, trust_remote_code=trust_remote_code)
    profile.check_model(model, "audit")
    if samples is None:
        samples = [sample for sample in profile.validation if sample.length in profile.lengths]
    samples = list(samples)
    if not samples:
        raise DataError("there are no held-out samples to measure on; profile with validation samples")
    request = SearchRequest.of(profile, budget, profile.recipe, model=model)
    masking = masking_rules(
        profile.shape, request.profile.spans, profile.min_window, [len(sample.input_ids) for sample in samples]
    )
    check_counts(profile.shape, masking, count, plans)
    path = profile.path / AUDIT_FILE if out is None else Path(out)
    key = _key(request, samples, count, plans, seed)
    with own_file(path):
        found = _found(path, key, overwrite)
        if found is None:
            made = _run(request, model, samples, masking, count, plans, seed, path, progress or SILENT)
            found = Audit(key, finite_json(made))
            write_json(path, found.to_dict())
        return found


def _key(request: SearchRequest, samples: Sequence[Sample], count: int, plans: int, seed: int) -> str:
    profile = request.profile
    copies = profile.statistics.arrays.get("copy_squares")
    return fingerprint(
        {
            "version": VERSION,
            "profile": profile.fingerprint,
            "estimators": list(profile.offering(()).estimators),
            "search": request.key,
            "samples": fingerprint_ordered(samples),
            "counts": [count, plans],
            **({"copies": copies.shape[2]} if copies is not None else {}),
            "seed": seed,
        }
    )


def _found(path: Path, key: str, overwrite: bool) -> Audit | None:
    """Returns the audit of the same request at `path`; None if it is to be made."""
    if overwrite and not path.is_dir():
        remove(of_audit(path))
    if not path.exists():
        return None
    found = Audit.load(path)
    if found.request == key:
        return found
    raise ArtefactError(
        f"{path} holds the audit of another request ({found.request}, this one is {key}); remove it, choose another file "
        "or pass --overwrite"
    )


def _run(
    request: SearchRequest,
    model: SourceModel,
    samples: Sequence[Sample],
    masking: Sequence[Sequence[int]],
    count: int,
    plans: int,
    seed: int,
    path: Path,
    progress: Progress,
) -> dict[str, Any]:
    profile = request.profile
    picks = choose_ablations(profile.shape, masking, count, seed)
    chosen = equal_byte_choices(request.surrogate.costs(), PlanSpace.of(request).knapsack, plans, seed)
    if len(chosen) < plans:
        logger.warning("only %d different plans of %d were found at %s", len(chosen), plans, request.asked[0])
    whole_plans = [chosen_plan(profile, choice) for _, choice in chosen]
    rounded = choose_format_picks(profile, count, seed)
    if rounded and profile.shape.dtype != "float32":
        logger.warning(
            "in %s the KL of a single format is mostly noise; audit with --dtype float32", profile.shape.dtype
        )
    costs = copy_costs(profile, samples)
    copied = [] if costs is None else choose_copy_picks(costs, count, seed)
    groups = [
        [ablation(profile, pick) for pick in picks],
        whole_plans,
        format_plans(profile, rounded),
        copy_plans(profile, copied),
    ]
    records = audit_records_file(path)
    kls = measured_kls(model, samples, list(chain(*groups)), records, progress).mean(axis=1)
    of_picks, of_plans, of_formats, of_copies = np.split(kls, np.cumsum([len(group) for group in groups])[:-1])
    repaired = (
        audit_repairs(profile, model, costs, copied, samples, records, seed, progress) if costs is not None else {}
    )
    influence = predicted_influence(profile, samples)
    results = assess(influence, picks, of_picks, [choice for _, choice in chosen], of_plans, seed)
    correlations = results.correlations
    differences = {}
    if "moa" in correlations:
        difference = correlations[ROBUST] - correlations["moa"]
        differences["chosen_minus_moa"] = {"value": difference.value, "ci95": difference.ci95}
    for point in results.points:
        rule = profile.rules[point["rule"]]
        point["rule"] = asdict(rule)
    for row, (noise, _), plan in zip(results.plan_points, chosen, whole_plans, strict=True):
        row |= {"key": plan.key(), "noise": noise, "kv_bytes": {str(n): plan.kv_bytes(n) for n in request.lengths}}
    return {
        "model": shared_name(model.source),
        "profile": profile.fingerprint,
        "samples": len(samples),
        "budget": request.asked[0],
        "estimator": ROBUST,
        "audit": results.ablations,
        "audit_plans": results.plans,
        **differences,
        **(assess_formats(profile, influence, rounded, of_formats, seed) if rounded else {}),
        **(assess_copies(profile, costs, copied, of_copies, seed) if costs is not None and copied else {}),
        **repaired,
        "split_half": split_half(request, seed),
        "points": results.points,
        "plans": results.plan_points,
    }


def predicted_influence(profile: Profile, samples: Sequence[Sample]) -> dict[str, Floats]:
    """Returns what every estimator predicts on samples like these, by estimator: [layers, kv_heads, rules], monotone.

    Each sample counts with the influence at the profiled length nearest to its own, of its kind. What says nothing of formats
    predicts what the span of a rule costs. The profile offers the formats.
    """
    groups = Counter(
        (sample.kind, int(np.abs(np.array(profile.lengths) - sample.length).argmin())) for sample in samples
    )
    found, spans = {}, profile.offering(())
    for estimator in spans.estimators:
        knows = profile if estimator == ROBUST else spans
        pairs = len(profile.rules) // len(knows.rules)
        of_kind = {
            kind: np.tile(knows.influence(estimator, kind), (1, 1, 1, pairs)) for kind in {kind for kind, _ in groups}
        }
        influence = np.stack([of_kind[kind][length] for kind, length in groups])
        surrogate = Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths))
        found[estimator] = surrogate.costs(list(groups.values()))
    return found

"""What a search hands back: the result, and the notes that its plan carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.artefact_names import explanation_file
from moacompress.core.errors import ArtefactError, PlanError
from moacompress.core.files import read_json
from moacompress.core.shown import Shown
from moacompress.recipe import shared_name
from moacompress.rules.budget import Budget, memory_budgets
from moacompress.rules.formats import NATIVE
from moacompress.rules.plan import Plan
from moacompress.rules.rule_classes import classes_of
from moacompress.rules.worst_share import WorstShare

if TYPE_CHECKING:
    from moacompress.search.measure.plan_evaluator import MeasuredPlan
    from moacompress.search.search_request import SearchRequest

PACKAGES = ("moacompress", "torch", "transformers", "optuna", "numpy", "scipy")


@dataclass(frozen=True)
class SearchResult(Shown):
    """A found plan and how it was found.

    Attributes:
        plan: the plan, with its numbers in it.
        path: where it was written, None if nowhere.
        trials: finished trials of the study, those of earlier runs included.
        measured_plans: distinct plans that trials measured.
        best_trial: index of the best trial; None where no trial has ended.
        harm: mean KL in nats of "plan", "trial0", and of each family of `baselines.FAMILIES` (None where it has no
            candidate within the budget, the profile lacks what it is made from, or the time was up before it was measured).
        kv_bytes: at each length, `{"dense": bytes, "plan": bytes}`.
        seconds: time that this run took; close to 0 when an earlier run had found it.
        explanation: see `explain.explain`; empty where there is none beside the plan.
        written: whether this process wrote it; False where it was there, or another worker of the search writes it.
        classes: see `class_quality`; None where the search had no limit of them.
    """

    plan: Plan
    path: Path | None
    trials: int
    measured_plans: int
    best_trial: int | None
    harm: dict[str, float | None]
    kv_bytes: dict[str, dict[str, int]]
    seconds: float
    explanation: dict[str, Any]
    written: bool = True
    classes: dict[str, Any] | None = None

    def __str__(self) -> str:
        """Returns the plan and its measured KL in a line."""
        kl = self.harm.get("plan")
        found = "not measured" if kl is None else f"KL {kl:.3g} nats a token, {self.measured_plans} plans measured"
        return f"{self.plan}; {found}"

    @staticmethod
    def of(
        plan: Plan,
        path: Path | None,
        seconds: float,
        explanation: dict[str, Any] | None = None,
        *,
        written: bool = True,
    ) -> SearchResult:
        """Reads the result off the notes of a plan that a search made, and off what is beside it."""
        made = plan.provenance
        if explanation is None:
            explanation = {} if path is None else read_explanation(path)
        return SearchResult(
            plan=plan,
            path=path,
            trials=made["trials"],
            measured_plans=made["measured_plans"],
            best_trial=made["best_trial"],
            harm=dict(plan.quality["measured_harm"]),
            kv_bytes={n: dict(numbers) for n, numbers in plan.budget["bytes"].items()},
            seconds=seconds,
            explanation=explanation,
            written=written,
            classes=plan.quality.get("classes"),
        )


def read_explanation(out: Path) -> dict[str, Any]:
    """Returns the explanation beside a plan, see `explain.explain`; empty where there is none."""
    beside = explanation_file(out)
    return dict(read_json(beside, "explanation")) if beside.exists() else {}


def check_ours(path: Path, is_ours: Callable[[Plan], bool]) -> None:
    """Refuses a file that is not a plan of an earlier run of the same request.

    Raises:
        ArtefactError: it is something else.
    """
    with suppress(PlanError):
        if is_ours(Plan.load(path)):
            return
    raise ArtefactError(f"{path} exists already and is of another search; choose another file or pass --overwrite")


def found_before(out: Path, search: str, trials: int, overwrite: bool) -> Plan | None:
    """Returns the plan at the place of a search's if that search has finished, with at least as many trials; or None.

    With `overwrite` whatever is there does not count.

    Raises:
        ArtefactError: something else is there and `overwrite` is False; or a folder.
    """
    if not out.exists() or (overwrite and not out.is_dir()):
        return None
    try:
        plan = Plan.load(out)
        made = plan.provenance
        if made.get("search") == search:
            return plan if made.get("finished") and made["trials"] >= trials else None
        what = "is a plan of another search"
    except (PlanError, KeyError, TypeError):
        what = "is not a plan"
    raise ArtefactError(f"{out} exists already and {what}; choose another file or pass --overwrite")


def budget_notes(request: SearchRequest, plan: Plan, asked: Sequence[str]) -> dict[str, Any]:
    """Returns what a plan says of the budget that was asked for, and of what it takes of it."""
    profile = request.profile
    return {
        "asked": list(asked),
        "bytes": plan.kv_bytes_by_length(sorted({*profile.lengths, *request.lengths})),
        "worst_share": WorstShare.of(plan, profile.lengths).to_dict(),
    }


def provenance(request: SearchRequest, search: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a plan says of the search that it comes from: its fingerprint, and how far it has come (`made`)."""
    profile = request.profile
    return {
        "source": shared_name(profile.source),
        "profile": profile.fingerprint,
        "calibration": profile.calibration_fingerprint,
        "lengths": list(profile.lengths),
        "seed": request.recipe.seed,
        "search": search,
        **made,
        "versions": versions(),
        "recipe": request.recipe.of_profile(profile.recipe).shared(profile.source),
    }


def memory_note(request: SearchRequest, plan: Plan) -> dict[str, Any]:
    """Returns what a plan's budget says of memory: at each length that is restricted the limit, and what takes it, bytes.

    It is empty where no budget counts weights.
    """
    if request.weight_bytes is None:
        return {}
    found: dict[str, dict[str, int]] = {}
    for budget in memory_budgets(map(Budget.parse, request.asked)):
        n, limit = budget.length or 0, budget.bytes or 0
        before = found.get(str(n), {"limit": limit})
        taken = {"weights": request.weight_bytes, "kv_bytes": plan.kv_bytes(n)}
        found[str(n)] = {"limit": min(limit, before["limit"]), **taken}
    return {"memory": found}


def baseline_note(measured: MeasuredPlan, lengths: Iterable[int]) -> dict[str, Any]:
    """Returns what a plan says about a baseline that it was measured beside.

    That is its KL, nats, on how many samples, and its bytes at some lengths.

    `sink` is there where all KV heads share one that do not keep everything, `formats`, of keys and values, where all share a
    pair that is not native.
    """
    plan = measured.plan
    rules = {rule for row in plan.rules for rule in row if not rule.sees_all}
    pairs = {(rule.key_format, rule.value_format) for row in plan.rules for rule in row}
    sinks = {rule.sink for rule in rules}
    note: dict[str, Any] = {
        "key": plan.key(),
        "harm": measured.kl,
        "samples": len(measured.kls),
        "kv_bytes": {str(n): plan.kv_bytes(n) for n in sorted(set(lengths))},
    }
    if len(pairs) == 1 and pairs != {(NATIVE, NATIVE)}:
        note["formats"] = list(pairs.pop())
    if len(sinks) == 1:
        note["sink"] = sinks.pop()
    if len(rules) == 1 and not any(rule.sees_all for row in plan.rules for rule in row):
        (rule,) = rules
        note |= {"alpha": rule.alpha, "beta_q": rule.beta_q}
    return note


def class_quality(most: int | None, plan: Plan, cost: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns what a plan's notes on quality say of its classes of KV heads; nothing where their number had no limit.

    `classes`: `most`, and the number that the `plan` has. Where the limit's cost was measured (`class_cost`), also `trial`,
    and of the plans with its search parameters, `limited` and `unlimited`, their `classes`, `predicted_harm` and measured
    `harm`, nats; and the paired `difference` of the limited plan's measured KL to the other's.
    """
    if most is None:
        return {}
    return {"classes": {"most": most, "plan": len(classes_of(plan)), **(cost or {})}}


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide a search."""
    return {package: _version(package) for package in PACKAGES}


@cache  # reading a package's description takes a millisecond, and every plan of a search notes them
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

"""Finding a plan: a solver inside every trial, Optuna around it, the real model as the judge.

A trial's knobs bend the surrogate, the solver turns it into a plan within the budget, and the plan's harm is measured
on validation samples. A trial's value is its mean log-ratio to trial 0, the plan of the unbent surrogate, sample by
sample, so that a trial that is pruned half-way has a value on the same scale. Plans of the same bytes that need no
search are measured beside.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.calibration.store import Profile
from moacompress.models import SourceModel, load_for
from moacompress.plan import Plan
from moacompress.progress import SILENT, Progress
from moacompress.recipe import Recipe
from moacompress.search.alternatives import Alternative, measure_alternatives
from moacompress.search.baselines import FAMILIES
from moacompress.search.knapsack import Knapsack, ablation, chosen_plan
from moacompress.search.ledger import Ledger, quiet_optuna
from moacompress.search.objective import Measure, Objective
from moacompress.search.outcome import (
    SearchResult,
    baseline_note,
    bytes_note,
    found_before,
    pack,
    unpack,
    versions,
)
from moacompress.search.request import Request
from moacompress.search.surrogate import Surrogate, fit, pick_ablations

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["SearchResult", "find_plan"]

logger = logging.getLogger(__name__)

EPSILON = 1e-3
"""Nats added to a harm before its logarithm: differences far below it do not matter."""
ABLATION_SAMPLES = 3


def find_plan(
    profile: Profile | str | Path,
    budget: str | Sequence[str] | None = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    model: SourceModel | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Finds the plan of least measured harm within a budget.

    The same call continues where a killed one stopped: everything measured is kept in `recipe.search.storage`, by
    default a journal beside `out` (`plan.study.journal` for `plan.json`), or in memory without `out`.

    Args:
        profile: a finished profile, or its folder.
        budget: one budget or several that must all hold, such as "25%"; by default the recipe's.
        recipe: by default the profile's own.
        out: where the best plan so far is always kept, and the result in the end.
        overwrite: replace a plan of another search at `out`.
        model: the profile's model where it is loaded already; by default it is loaded.
        progress: told of every measurement.

    Returns:
        The plan with its numbers. It is a baseline's if that measured better.

    Raises:
        BudgetError: the budget does not parse, or there is none.
        InfeasibleBudgetError: no plan fits; says the smallest budget that works.
        ArtefactError: the profile, `out` or the storage can not be used.
        ModelError: the model can not be loaded, or is not the one that was profiled.
    """
    started = time.monotonic()
    if isinstance(profile, str | Path):
        profile = Profile.load(profile)
    request = Request.of(profile, budget, recipe or profile.recipe)
    path = None if out is None else Path(out)
    if path is not None:
        plan = found_before(path, request.key, request.recipe.search.trials, overwrite)
        if plan is not None:
            return SearchResult.of(plan, path, time.monotonic() - started)
    storage = request.recipe.search.storage
    if storage is None and path is not None:
        storage = str(path.with_suffix(".study.journal"))
    with quiet_optuna():
        ledger = Ledger(
            storage,
            f"moacompress-{request.key}",
            profile.fingerprint,
            request.knobs.distributions(),
            request.knobs.neutral,
            request.recipe.seed,
        )
        source = load_for(request.recipe, profile.source) if model is None else model
        profile.check_model(source, "search")
        measure = Objective(source.model, profile.validation)
        search = Search(request, ledger, measure, path, progress or SILENT, started)
        plan = search.run()
    return SearchResult.of(plan, path, time.monotonic() - started)


@dataclass(frozen=True)
class Tried:
    """A finished trial.

    Attributes:
        index: its place among the finished trials; 0 is the surrogate's own plan.
        key: of its plan.
        plan: its rules, packed.
        harms: nats, in the order of the shuffled samples; fewer than all where it was pruned.
        value: mean log-ratio to trial 0.
        pruned: whether it was given up half-way.
        measured: whether it was measured, and not known from an earlier trial of the same plan.
    """

    index: int
    key: str
    plan: dict[str, Any]
    harms: list[float]
    value: float
    pruned: bool
    measured: bool


class Search:
    """One run of a search over a ledger.

    Args:
        request: what is asked for.
        ledger: what is measured already.
        measure: the model.
        out: where the best plan is written, or None.
        progress: told of every measurement.
        started: `time.monotonic()` from which the timeout counts.
    """

    def __init__(
        self, request: Request, ledger: Ledger, measure: Measure, out: Path | None, progress: Progress, started: float
    ) -> None:
        self.request, self.ledger, self.measure = request, ledger, measure
        self.out, self.progress, self.started = out, progress, started
        self.order: list[int] = np.random.default_rng(request.recipe.seed).permutation(measure.size).tolist()
        self.knapsack = Knapsack.of(request)
        self.surrogate = request.surrogate
        self.alternatives: dict[str, Alternative] = {}

    def run(self) -> Plan:
        """Measures what is missing and returns the better of the best trial and the best alternative."""
        self.surrogate = self._calibrate()
        self.alternatives = measure_alternatives(self.request, self.order, self._harms, self.progress)
        tried = self._tried()
        limit, timeout = self.request.recipe.search.trials, self.request.recipe.search.timeout
        self.progress.start("searching", limit)
        for _ in tried[:limit]:
            self.progress.step()
        while len(tried) < limit:
            if tried and timeout is not None and time.monotonic() - self.started > timeout:
                logger.info("the search stops after %d of %d trials: %g seconds are over", len(tried), limit, timeout)
                break
            self._try(tried)
            tried = self._tried()
            best = _best(tried)
            if best.index == len(tried) - 1:
                self._write(tried, finished=False)
            self.progress.step(self._standing(best))
        self.progress.done()
        return self._write(tried, finished=True)

    def _calibrate(self) -> Surrogate:
        """Fits the surrogate to measured ablations of single KV heads, at the shortest length (the cheapest)."""
        recipe, profile = self.request.recipe, self.request.profile
        shortest = Surrogate(self.surrogate.rules, self.surrogate.influence[:1], self.surrogate.supersets)
        influence = shortest.raw()
        picks = pick_ablations(influence, recipe.search.ablations, recipe.seed)
        nearest = sorted(self.order, key=lambda number: profile.validation[number].length)
        numbers = nearest[:ABLATION_SAMPLES]
        self.progress.start("calibrating", len(picks))
        measured = []
        for pick in picks:
            measured.append(float(np.mean(self._harms("ablation", ablation(profile, pick), numbers))))
            layer, head, rule = pick
            self.progress.step(f"layer {layer} KV head {head}, {profile.rules[rule]}: {measured[-1]:.2g} nats")
        self.progress.done()
        return self.surrogate.calibrated(fit([influence[pick] for pick in picks], measured))

    def _harms(self, kind: str, plan: Plan, numbers: Sequence[int]) -> list[float]:
        """Returns the harm of each numbered sample, measured at most once in the life of the study."""
        name = f"{kind}:{plan.key()}"
        known = self.ledger.recall(name)
        if known is not None:
            return [float(value) for value in known]
        with self.measure.under(plan) as harm:
            harms = [harm(number) for number in numbers]
        self.ledger.remember(name, harms)
        return harms

    def _tried(self) -> list[Tried]:
        trials = self.ledger.finished()
        return [Tried(index, value=trial.value or 0.0, **trial.user_attrs) for index, trial in enumerate(trials)]

    def _try(self, tried: Sequence[Tried]) -> None:
        """Runs the next trial."""
        trial = self.ledger.ask()
        plan = self._plan(trial.params)
        key = plan.key()
        twin = next((old for old in tried if old.key == key), None)
        if twin is not None:
            for step, ratio in enumerate(_log_ratios(twin.harms, tried[0].harms)):
                self.ledger.report(trial, ratio, step)
            harms, pruned = twin.harms, twin.pruned
        else:
            harms, pruned = self._race(trial, plan, tried[0].harms if tried else None)
        value = float(np.mean(_log_ratios(harms, tried[0].harms if tried else harms)))
        self.ledger.tell(
            trial, value, key=key, plan=pack(plan), harms=list(harms), pruned=pruned, measured=twin is None
        )

    def _plan(self, knobs: dict[str, Any]) -> Plan:
        """Returns the plan that the solver makes of the bent surrogate; it is within the limits."""
        costs = self.request.knobs.bend(self.surrogate, knobs)
        return chosen_plan(self.request.profile, self.knapsack.choose(costs))

    def _race(self, trial: Trial, plan: Plan, reference: list[float] | None) -> tuple[list[float], bool]:
        """Measures a plan sample by sample until it is done or clearly worse than the best; trial 0 is never pruned."""
        harms: list[float] = []
        with self.measure.under(plan) as harm:
            for step, number in enumerate(self.order):
                harms.append(harm(number))
                ratio = _log_ratios(harms[-1:], (reference or harms)[step : step + 1])[0]
                hopeless = self.ledger.report(trial, ratio, step)
                if hopeless and reference is not None and step + 1 < len(self.order):
                    return harms, True
        return harms, False

    def _standing(self, best: Tried) -> str:
        note = f"best {np.mean(best.harms):.3g} nats (trial {best.index})"
        if not self.alternatives:
            return note
        family, other = min(self.alternatives.items(), key=lambda item: item[1].harm)
        return f"{note}, {family} {other.harm:.3g}"

    def _write(self, tried: Sequence[Tried], *, finished: bool) -> Plan:
        """Returns the best plan with its notes, and writes it to `out`."""
        best = _best(tried)
        profile, recipe = self.request.profile, self.request.recipe
        plan = Plan(profile.shape, profile.min_window, unpack(best.plan))
        harm: dict[str, float | None] = {
            "plan": float(np.mean(best.harms)),
            "trial0": float(np.mean(tried[0].harms)),
            **{family: self.alternatives[family].harm if family in self.alternatives else None for family in FAMILIES},
        }
        lengths = {*profile.lengths, *self.request.limits}
        baselines = {
            family: baseline_note(other.plan, other.harm, lengths) for family, other in self.alternatives.items()
        }
        for family, other in self.alternatives.items():
            if other.harm < float(harm["plan"] or 0.0):
                if finished:
                    logger.warning(
                        "no trial beats the baseline %s: it measures %.3g nats, the best trial %.3g; its plan is returned",
                        family,
                        other.harm,
                        np.mean(best.harms),
                    )
                plan, harm["plan"] = other.plan, other.harm
        resolved = recipe.resolved()
        resolved["budget"] = list(self.request.asked)
        resolved["search"]["storage"] = None  # a place, maybe with a password, and no choice about the plan
        plan = plan.with_notes(
            budget={"asked": list(self.request.asked), "bytes": bytes_note(plan, lengths)},
            quality={
                "predicted_harm": self.surrogate.predicted(plan),
                "measured_harm": harm,
                "baselines": baselines,
                "samples": self.measure.size,
            },
            provenance={
                "source": profile.source,
                "profile": profile.fingerprint,
                "calibration": profile.calibration_fingerprint,
                "lengths": list(profile.lengths),
                "seed": recipe.seed,
                "search": self.request.key,
                "finished": finished,
                "trials": len(tried),
                "measured_plans": sum(trial.measured for trial in tried),
                "best_trial": best.index,
                "surrogate": dict(self.surrogate.calibration.__dict__),
                "versions": versions(),
                "recipe": resolved,
            },
        )
        if self.out is not None:
            plan.save(self.out)
        return plan


def _best(tried: Sequence[Tried]) -> Tried:
    """Returns the trial of least value among those measured on all samples; trial 0 always is."""
    return min((trial for trial in tried if not trial.pruned), key=lambda trial: (trial.value, trial.index))


def _log_ratios(harms: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Returns `log((harm + eps) / (reference + eps))` for each sample; the shorter list decides how many."""
    return [float(np.log((harm + EPSILON) / (base + EPSILON))) for harm, base in zip(harms, reference, strict=False)]

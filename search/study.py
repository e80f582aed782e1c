"""Finding a plan: a solver inside every trial, Optuna around it, the real model as the judge; then rounds and moves.

A trial's knobs bend the surrogate, the solver turns it into a plan within the budget, and the plan's harm is measured
on validation samples. A trial's value is its mean log-ratio to trial 0, the plan of the unbent surrogate, sample by
sample, so that a trial that is pruned half-way has a value on the same scale. A trial is better only beyond doubt: the best
of many noisy numbers looks better than it is. The best plan is then improved by profiling around it, and by measuring single KV
heads near the threshold. Plans of the same bytes that need no search are measured beside.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.calibration.manifest import sweep_samples
from moacompress.calibration.store import Profile
from moacompress.core.arrays import Floats, Ints
from moacompress.core.artefact_names import (
    explanation_file,
    of_search,
    owners_of_studies,
    rounds_folder,
    study_journal,
)
from moacompress.core.errors import PlanError
from moacompress.core.files import remove, sweep_files, sweep_folders, write_json
from moacompress.core.owners import own_file, release_dead
from moacompress.core.progress import SILENT, Progress
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe, shared_name
from moacompress.rules.plan import Plan
from moacompress.runtime.ready_model import load_for
from moacompress.search.alternatives import Alternative, measure_alternatives, write_baselines
from moacompress.search.around import Around, Forms, ProfileAround, spread_samples
from moacompress.search.baselines import FAMILIES
from moacompress.search.explain import Stage, explain
from moacompress.search.harm_meter import HarmMeter
from moacompress.search.knapsack import Knapsack, choice_of, chosen_plan
from moacompress.search.knobs import distributions
from moacompress.search.ledger import Ledger, own_study, quiet_optuna
from moacompress.search.moves import combined, marginal_moves
from moacompress.search.objective import Measure, Objective
from moacompress.search.rounds import NEUTRAL, RANGES, STARTS, moved
from moacompress.search.search_request import Knob, SearchRequest
from moacompress.search.search_result import SearchResult, baseline_note, bytes_note, found_before, unpack, versions
from moacompress.search.trials import (
    Trials,
    Tried,
    best_trial,
    least_trial,
    log_ratio,
    log_ratios,
    standard_error,
)

__all__ = ["SearchResult", "find_plan"]

logger = logging.getLogger(__name__)

ROUND_CAUTION = 1.0
"""Standard errors by which a plan of a round must be better: it is aimed at one plan, and gains more than a trial does."""
CAUTIONS = (1.0, 0.0)
"""Standard errors that a move must pay for; the later ones are tried where the earlier ones do not help."""
MOVE_SAMPLES = 12
"""Calibration samples on which single moves are measured."""


def find_plan(
    profile: Profile | str | Path,
    budget: str | Sequence[str] | None = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    model: SourceModel | None = None,
    starts: Sequence[Knob] = (),
    progress: Progress | None = None,
) -> SearchResult:
    """Finds the plan of least measured harm within a budget.

    The same call continues where a killed one stopped: everything measured is kept in `recipe.search.storage`, by
    default a journal beside `out` (`plan.study.journal` for `plan.json`), or in memory without `out`. What was profiled
    around plans is kept in a folder beside `out` (`plan.rounds`), the best plan of every baseline in `plan.baselines`, and why
    the plan is as it is in `plan.explain.json`.

    Args:
        profile: a finished profile, or its folder.
        budget: one budget or several that must all hold, such as "25%"; by default the recipe's.
        recipe: by default the profile's own.
        out: where the best plan so far is always kept, and the result in the end.
        overwrite: start anew: the plan at `out`, what is beside it and what is in the storage is removed.
        model: the profile's model where it is loaded already; by default it is loaded.
        starts: knobs that are tried right after the surrogate's own plan, such as those that won at another budget.
        progress: told of every measurement.

    Returns:
        The plan with its numbers. It is a baseline's if that measured better.

    Raises:
        BudgetError: the budget does not parse, or there is none.
        InfeasibleBudgetError: no plan fits; says the smallest budget that works.
        ArtefactError: the profile, `out` or the storage cannot be used, or another process is searching there.
        ModelError: the model cannot be loaded, or is not the one that was profiled.
    """
    started = time.monotonic()
    if isinstance(profile, str | Path):
        profile = Profile.load(profile)
    request = SearchRequest.of(profile, budget, recipe or profile.recipe, starts)
    path = None if out is None else Path(out)
    with nullcontext() if path is None else own_file(path):
        if path is not None:
            _sweep(path)
            plan = found_before(path, request.key, request.recipe.search.trials, overwrite)
            if plan is not None:
                return SearchResult.of(plan, path, time.monotonic() - started)
            if overwrite:
                remove(of_search(path))
        plan, explanation = _searched(request, path, overwrite, model, progress or SILENT, started)
    return SearchResult.of(plan, path, time.monotonic() - started, explanation)


def _sweep(out: Path) -> None:
    """Removes what killed searches left half-written at a plan that this process owns, and beside it."""
    for owner in owners_of_studies(study_journal(out)):
        release_dead(owner)
    for path in of_search(out):
        sweep_files(path)
        sweep_folders(path)
    for folder in rounds_folder(out).glob("*"):
        sweep_samples(folder)


def _searched(
    request: SearchRequest, path: Path | None, anew: bool, model: SourceModel | None, progress: Progress, started: float
) -> tuple[Plan, dict[str, Any]]:
    """Returns the plan that a search finds, and why it is as it is."""
    profile, settings, name = request.profile, request.recipe.search, f"moacompress-{request.key}"
    storage = settings.storage
    if storage is None and path is not None:
        storage = str(study_journal(path))
    with quiet_optuna(), own_study(storage, name, anew=anew):
        ledger = Ledger(
            storage,
            name,
            profile.fingerprint,
            request.knobs.distributions(),
            request.knobs.neutral,
            request.recipe.seed,
            [*request.starts, *request.knobs.starts],
        )
        source = load_for(request.recipe, profile.source) if model is None else model
        profile.check_model(source, "search")
        measure = Objective(source.model, profile.validation)
        around = trainer = None

        def round_ledger(plan: Plan) -> Ledger:
            return Ledger(
                storage,
                f"{name}-{plan.key()}",
                profile.fingerprint,
                distributions(RANGES),
                NEUTRAL,
                request.recipe.seed,
                STARTS,
            )

        if settings.rounds or settings.moves:
            samples = profile.calibration_samples()
            around = _around(request, source, samples, None if path is None else rounds_folder(path))
            answers = [sample for sample in samples if sample.kind == "answer"] or samples
            trainer = Objective(source.model, spread_samples(answers, MOVE_SAMPLES))
        search = Search(request, ledger, round_ledger, measure, around, trainer, path, progress, started)
        return search.run(), search.explanation


def _around(request: SearchRequest, source: SourceModel, samples: Any, folder: Path | None) -> Around:
    chosen = spread_samples(samples, request.recipe.search.round_samples)
    return ProfileAround(request.profile, request.recipe, source, chosen, folder)


@dataclass(frozen=True)
class Standing:
    """The best plan so far.

    Attributes:
        plan: the plan, without notes.
        harms: nats, in the order of the shuffled samples.
        value: mean log-ratio to trial 0.
        stage: what it comes from.
    """

    plan: Plan
    harms: list[float]
    value: float
    stage: str

    @property
    def harm(self) -> float:
        """Mean harm, nats."""
        return float(np.mean(self.harms))


class Search:
    """One run of a search over a ledger.

    Args:
        request: what is asked for.
        ledger: what is measured already.
        round_ledger: returns that of the round around a plan.
        measure: the model on validation samples.
        around: profiles around a plan; None where neither rounds nor moves are wanted.
        trainer: the model on calibration samples, for moves; None likewise.
        out: where the best plan is written, or None.
        progress: told of every measurement.
        started: `time.monotonic()` from which the timeout counts.

    Attributes:
        explanation: why the plan is as it is; empty until `run` has returned.
    """

    def __init__(
        self,
        request: SearchRequest,
        ledger: Ledger,
        round_ledger: Callable[[Plan], Ledger],
        measure: Measure,
        around: Around | None,
        trainer: Measure | None,
        out: Path | None,
        progress: Progress,
        started: float,
    ) -> None:
        self.request, self.ledger, self.round_ledger = request, ledger, round_ledger
        self.meter = HarmMeter.of(ledger, measure, request.recipe.seed)
        self.around, self.trainer = around, trainer
        self.out, self.progress, self.started = out, progress, started
        self.knapsack = Knapsack.of(request)
        self.surrogate = request.surrogate
        self.alternatives: dict[str, Alternative] = {}
        self.trials = Trials(ledger, measure, self.meter.order, self._plan)
        self.stages: list[Stage] = []
        self.explanation: dict[str, Any] = {}
        self.stopped = False

    def run(self) -> Plan:
        """Measures what is missing and returns the better of the best plan found and the best alternative."""
        self.surrogate = self.meter.calibrated(self.request, self.progress)
        if self.request.recipe.search.alternatives:
            self.alternatives = measure_alternatives(self.request, self.meter, self.progress)
        tried = self._study()
        best, least, first = (_standing(self.request, of) for of in (best_trial(tried), least_trial(tried), tried[0]))
        self.stages += [Stage.of("surrogate", first.plan, first.harms, 0.0, True)]
        shown = best if best.value < 0 else least
        self.stages += [Stage.of("study", shown.plan, shown.harms, shown.value, best.value < 0)]
        best, change = self._rounds(tried, best)
        best = self._moves(tried, best, change)
        best = self._rest(tried, best)
        return self._write(tried, best, finished=True)

    def _over(self) -> bool:
        """Whether the time is up."""
        timeout = self.request.recipe.search.timeout
        if timeout is None or time.monotonic() - self.started <= timeout:
            return False
        if not self.stopped:
            logger.info("the search stops: %g seconds are over", timeout)
        self.stopped = True
        return True

    def _study(self) -> list[Tried]:
        """Runs the trials that are missing; at least one is there afterwards."""

        def after(tried: Sequence[Tried]) -> str:
            best = best_trial(tried)
            if best.index == len(tried) - 1:
                self._write(tried, _standing(self.request, best), finished=False)
            return self._note(_standing(self.request, best))

        return self._run_trials("searching", self.trials, self.request.recipe.search.trials, after)

    def _run_trials(
        self, name: str, trials: Trials, limit: int, after: Callable[[Sequence[Tried]], str]
    ) -> list[Tried]:
        """Returns the finished trials of a study, once the missing ones have run or the time is up; at least one is there.

        Args:
            name: of what is done, for the progress.
            trials: of the study.
            limit: how many there are to be.
            after: is given the finished ones after each, and returns what is said of it.
        """
        tried = trials.finished()
        self.progress.start(name, limit)
        for _ in tried[:limit]:
            self.progress.step()
        while len(tried) < limit and not (tried and self._over()):
            trials.run(tried)
            tried = trials.finished()
            self.progress.step(after(tried))
        self.progress.done()
        return tried

    def _rounds(self, tried: Sequence[Tried], best: Standing) -> tuple[Standing, Floats]:
        """Profiles around the best plan and moves bytes, as long as that helps.

        Returns:
            The best plan, and the predicted change of harm by every change of one KV head under it.
        """
        forms: Forms | None = None
        for number in range(1, self.request.recipe.search.rounds + 1):
            if self.around is None or self._over():
                break
            forms = self._joined(self.around(best.plan, self.progress))
            better = self._round(number, tried, best, forms)
            if better is None:
                break
            best = better
            self._write(tried, best, finished=False)
        choice = choice_of(self.request.profile, best.plan)
        if forms is not None:
            return best, forms(NEUTRAL["relative"]).changes(choice)
        costs, form = self.surrogate.costs(), self.request.quadratic
        return best, costs if form is None else costs - _at(costs, choice) + form.changes(choice)

    def _joined(self, around: Forms) -> Forms:
        """Returns the forms around a plan with what the profile of the dense model says of KV heads together."""
        profiled = self.request.quadratic
        return around if profiled is None else lambda relative: profiled.joined(around(relative))

    def _round(self, number: int, tried: Sequence[Tried], best: Standing, forms: Forms) -> Standing | None:
        """Returns the better plan that moving some of the bytes gives, or None.

        A small study of how to move them: trial 0 is the plan as it is, and one that beats it by a standard error is better.
        """
        profile = self.request.profile
        choice = choice_of(profile, best.plan)

        def plan_of(knobs: dict[str, Any]) -> Plan:
            return chosen_plan(profile, moved(self.knapsack, forms(knobs["relative"]), knobs, choice))

        known = {best.plan.key(): best.harms}
        trials = Trials(self.round_ledger(best.plan), self.meter.measure, self.meter.order, plan_of, known)
        around = self._run_trials(
            f"round {number}",
            trials,
            1 + self.request.recipe.search.round_trials,
            lambda done: f"{done[-1].knobs['moved']:.0%} moved: {np.expm1(done[-1].value):+.0%} harm",
        )
        won = best_trial(around, ROUND_CAUTION)
        others = [trial for trial in around[1:] if not trial.pruned]
        shown = least_trial(others) if others and not won.index else won
        harms, plan = shown.harms, Plan(profile.shape, profile.min_window, unpack(shown.plan))
        found = Standing(plan, harms, log_ratio(harms, tried[0].harms), f"round {number}")
        name = f"round {number}, {shown.knobs['moved']:.1%} moved"
        self.stages.append(Stage.of(name, plan, harms, found.value, won.index > 0))
        if not won.index:
            return None
        self.meter.keep("improved", plan, harms)
        return found

    def _moves(self, tried: Sequence[Tried], best: Standing, change: Floats) -> Standing:
        """Measures single KV heads near the threshold and makes the moves that pay together."""
        count = self.request.recipe.search.moves
        if not count or self.trainer is None or self._over():
            return best
        profile = self.request.profile
        choice = choice_of(profile, best.plan)
        moves = marginal_moves(self.knapsack, change, choice, count)
        plans = [best.plan, *(chosen_plan(profile, move.on(choice)) for move in moves)]
        self.progress.start("measuring moves", self.trainer.size)
        harms = []
        for number in range(self.trainer.size):
            harms.append(self.meter.many("moves", number, plans, best.plan, self.trainer))
            self.progress.step()
        self.progress.done()
        ratios = np.array([log_ratios(column[1:], column[:1] * len(moves)) for column in harms]).T
        for caution in CAUTIONS if moves else ():
            plan = chosen_plan(profile, combined(self.knapsack, choice, moves, ratios, caution))
            if plan.key() == best.plan.key():
                continue
            found = self._measured("moves", plan, tried)
            self.stages.append(Stage.of("moves", plan, found.harms, found.value, found.value < best.value))
            if found.value < best.value:
                return found
        return best

    def _rest(self, tried: Sequence[Tried], best: Standing) -> Standing:
        """Spends what is left of the budget: what interactions and moves gave back, and what another length left over.

        No KV head then keeps less at any length of the budget, and some keep more. What the validation samples do not ask for
        may need it, so it stays unless they say that it is worse, by more than the standard error of their paired differences.
        """
        profile = self.request.profile
        filled = self.knapsack.filled(self.surrogate.costs(), choice_of(profile, best.plan))
        plan = chosen_plan(profile, filled)
        if plan.key() == best.plan.key() or self._over():
            return best
        found = self._measured("rest", plan, tried)
        kept = log_ratio(found.harms, best.harms) <= standard_error(log_ratios(found.harms, best.harms))
        self.stages.append(Stage.of("rest", plan, found.harms, found.value, kept))
        return found if kept else best

    def _measured(self, stage: str, plan: Plan, tried: Sequence[Tried]) -> Standing:
        harms = self.meter.harms("improved", plan, self.meter.order)
        return Standing(plan, harms, log_ratio(harms, tried[0].harms), stage)

    def _plan(self, knobs: dict[str, Any]) -> Plan:
        """Returns the plan that the solver makes of the bent surrogate; it is within the limits."""
        return chosen_plan(self.request.profile, self.request.choice(self.surrogate, self.knapsack, knobs))

    def _earlier(self, tried: Sequence[Tried]) -> Standing | None:
        """Returns what an earlier run of this search improved, if it is at `out`: one that stops sooner takes nothing back."""
        if self.out is None or not self.out.exists():
            return None
        try:
            plan = Plan.load(self.out)
        except PlanError:  # something else, which is to be replaced
            return None
        harms = self.meter.known("improved", plan)
        if harms is None or plan.provenance.get("search") != self.request.key:
            return None
        bare = Plan(plan.model, plan.min_window, plan.rules)
        return Standing(bare, harms, log_ratio(harms, tried[0].harms), plan.provenance["stage"])

    def _note(self, best: Standing) -> str:
        note = f"best {best.harm:.3g} nats ({best.stage})"
        if not self.alternatives:
            return note
        family, other = min(self.alternatives.items(), key=lambda item: item[1].harm)
        return f"{note}, {family} {other.harm:.3g}"

    def _write(self, tried: Sequence[Tried], best: Standing, *, finished: bool) -> Plan:
        """Returns the best plan with its notes, and writes it to `out`."""
        profile, recipe = self.request.profile, self.request.recipe
        if self.stopped or not finished:
            best = min(best, self._earlier(tried) or best, key=lambda standing: standing.value)
        plan = best.plan
        harm: dict[str, float | None] = {
            "plan": best.harm,
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
                        "nothing that was found beats the baseline %s: it measures %.3g nats, the best plan %.3g; its plan is "
                        "returned",
                        family,
                        other.harm,
                        best.harm,
                    )
                plan, harm["plan"] = other.plan, other.harm
        shared = recipe.shared(profile.source)
        shared["budget"] = list(self.request.asked)
        plan = plan.with_notes(
            budget={"asked": list(self.request.asked), "bytes": bytes_note(plan, lengths)},
            quality={
                "predicted_harm": self.surrogate.predicted(plan),
                "measured_harm": harm,
                "baselines": baselines,
                "samples": self.meter.measure.size,
            },
            provenance={
                "source": shared_name(profile.source),
                "profile": profile.fingerprint,
                "calibration": profile.calibration_fingerprint,
                "lengths": list(profile.lengths),
                "seed": recipe.seed,
                "search": self.request.key,
                "finished": finished and not self.stopped,
                "trials": len(tried),
                "measured_plans": sum(trial.measured for trial in tried),
                "best_trial": best_trial(tried).index,
                "knobs": best_trial(tried).knobs,
                "stage": best.stage,
                "surrogate": dict(self.surrogate.calibration.__dict__),
                "versions": versions(),
                "recipe": shared,
            },
        )
        if finished:
            self.explanation = explain(
                self.request,
                self.surrogate,
                plan,
                tried,
                self.ledger.importances(),
                self.stages,
                plan.quality["measured_harm"],
            )
        if self.out is not None:
            if finished:
                write_json(explanation_file(self.out), self.explanation)
                write_baselines(self.out, self.request, self.alternatives)
            plan.save(self.out)
        return plan


def _at(costs: Floats, choice: Ints) -> Floats:
    """Returns the cost of every KV head's rule, `[layers, kv_heads, 1]`."""
    found: Floats = np.take_along_axis(costs, choice[..., None], axis=-1)
    return found


def _standing(request: SearchRequest, trial: Tried) -> Standing:
    plan = Plan(request.profile.shape, request.profile.min_window, unpack(trial.plan))
    return Standing(plan, trial.harms, trial.value, f"trial {trial.index}")

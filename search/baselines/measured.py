"""Plans that need no search, measured beside the found one on the same samples, each family at its best.

Losers are measured only as far as it takes to know: KL is never negative, so a plan whose sum over some samples exceeds the
found plan's over all of them is worse, whatever the others would add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moacompress.core.artefact_names import TEMPORARY, baselines_folder, gates_file
from moacompress.core.errors import ArtefactError
from moacompress.core.files import BrokenJson, read_json, remove
from moacompress.core.progress import Progress
from moacompress.recipe import shared_name
from moacompress.rules.limits import layer_floors, meets
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.baselines.families import FAMILIES, MOA, family_plans
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.plan_evaluator import Job, MeasuredPlan, PlanEvaluator
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.problem.knapsack import total_cost
from moacompress.search.result.search_result import memory_note
from moacompress.search.search_request import SearchRequest

SCREENED = 3
"""Samples on which all candidates of a family are measured."""
FINALISTS = 2
"""Candidates of a family that are measured further: the best of the screening."""
CLOSE = 1.25
"""KL of a second finalist in the screening, relative to the first's, above which it is left out."""
CANDIDATES = 3
"""Candidates of a family, those predicted to be best first."""


def write_baselines(out: Path, request: SearchRequest, measured_baselines: Mapping[str, MeasuredPlan]) -> None:
    """Writes the plan of every family's baseline beside the found one at `out`: `plan.baselines/duo.json` for `plan.json`.

    What an earlier search left there goes.
    """
    profile, folder = request.profile, baselines_folder(out)
    check_baselines(out)
    remove([folder])
    for family, other in measured_baselines.items():
        plan = other.plan.with_notes(
            budget={
                "asked": list(request.asked),
                "bytes": other.plan.kv_bytes_by_length(sorted({*profile.lengths, *request.lengths})),
                **memory_note(request, other.plan),
            },
            quality={"measured_harm": {"plan": other.kl}, "samples": len(profile.validation)},
            provenance={
                "source": shared_name(profile.source),
                "profile": profile.fingerprint,
                "baseline": family,
            },
        )
        plan.save(folder / f"{family}.json")


def check_baselines(out: Path) -> None:
    """Refuses a search whose folder of baselines is somebody else's: what an earlier search left there goes, and nothing else.

    Raises:
        ArtefactError: the folder holds something that no search wrote, or there is a file of that name.
    """
    folder = baselines_folder(out)
    if not folder.exists():
        return
    found = set(folder.iterdir()) if folder.is_dir() else {folder}
    plans = {path for path in found if path.parent == folder and _is_baseline(path)}
    known = plans | {folder / f"{family}.json" for family in FAMILIES}
    gates = set(map(gates_file, known))
    half = {path for path in found if path.is_file() and path.name.startswith(".") and path.suffix == TEMPORARY}
    for path in sorted(found - plans - gates - half):
        raise ArtefactError(f"{path} was not left by a search; move it, or choose another file for the plan")


def _is_baseline(path: Path) -> bool:
    """Whether a file is a plan that was written as a baseline, by this version or another."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        data = read_json(path, "plan")
    except BrokenJson:
        return path.stem in FAMILIES
    except ArtefactError:
        return False
    notes = data.get("provenance") if isinstance(data, dict) else None
    return isinstance(notes, dict) and notes.get("baseline") == path.stem


def measure_baseline_families(
    request: SearchRequest, evaluator: PlanEvaluator, found_kls: Sequence[float], progress: Progress
) -> Iterator[tuple[str, MeasuredPlan | None]]:
    """Yields every family with its best candidate within the request's limits, None where it has none.

    One that is worse than the found plan, whose KLs are `found_kls`, is measured only until that is known. What other workers
    measure is waited for. The progress is told of every candidate that is screened, and of every family whose best is known.

    Raises:
        TimeUp: the time is up before all of them are measured.
    """
    field = {family: _candidates(family, request) for family in families_of(request)}
    progress.start("measuring baselines", sum(len(plans) + 1 for plans in field.values()))
    screened: set[str] = set()

    def screen(job: Job) -> list[float] | None:
        kls = evaluator.attempt(job)
        if kls is not None and job.name not in screened:
            screened.add(job.name)
            progress.step()
        return kls

    while field:
        waiting = []
        for family, plans in list(field.items()):
            found = _best(plans, evaluator, found_kls, screen)
            if isinstance(found, str):
                waiting.append(found)
                continue
            del field[family]
            progress.step("nothing fits" if found is None else f"{family}: {found.kl:.3g} nats")
            yield family, found
        if len(waiting) == len(field) > 0:
            evaluator.pause(waiting)
    progress.done()


def families_of(request: SearchRequest) -> list[str]:
    """Returns the families that a search measures."""
    return [family for family in FAMILIES if family != MOA or request.measures_moa]


def _best(
    plans: Sequence[Plan],
    evaluator: PlanEvaluator,
    found_kls: Sequence[float],
    screen: Callable[[Job], list[float] | None],
) -> MeasuredPlan | str | None:
    """Returns the best candidate of a family, None where there is none, or the name of what another worker measures of it."""
    jobs = [evaluator.job("screening", plan, evaluator.order[:SCREENED]) for plan in plans]
    screened = list(map(screen, jobs))
    for job, kls in zip(jobs, screened, strict=True):
        if kls is None:
            return job.name
    means = [float(np.mean(kls)) for kls in screened if kls is not None]
    ranked = np.argsort(means, kind="stable")[:FINALISTS].tolist()
    finalists = [index for index in ranked if means[index] <= CLOSE * means[ranked[0]]]
    jobs = []
    for index in finalists:
        lost = partial(_is_worse, screened[index] or [], found_kls)
        jobs.append(evaluator.job("finalist", plans[index], evaluator.order[SCREENED:], lost))
    rest = list(map(evaluator.attempt, jobs))
    best: MeasuredPlan | None = None
    for index, job, kls in zip(finalists, jobs, rest, strict=True):
        if kls is None:
            return job.name
        found = MeasuredPlan(plans[index], [*(screened[index] or ()), *kls])
        if best is None or found.kl < best.kl:
            best = found
    return best


def _is_worse(screened: list[float], found_kls: Sequence[float], kls: list[float]) -> bool:
    """Returns whether a plan is worse than the found one on all samples, by a bound and by a test of those measured so far."""
    measured = screened + kls
    return sum(measured) > sum(found_kls) and KlDifference.of(measured, found_kls).verdict == "worse"


def _candidates(family: str, request: SearchRequest) -> list[Plan]:
    """Returns what is measured of a family: where formats are on offer, those predicted to be best."""
    spans, formats = request.profile.offering(()), request.profile.formats
    floors = layer_floors(request.recipe.search.floors, spans.shape)
    sinks = sorted({rule.sink for rule in spans.rules if not rule.is_full})
    found = [
        plan
        for plan in family_plans(family, spans.shape, request.limits, spans, sinks, formats)
        if meets(plan, floors, request.lengths)
    ]
    if formats:
        found.sort(key=lambda plan: nearly_predicted(request.surrogate, plan, max(request.lengths)))
    return found[:CANDIDATES]


def nearly_predicted(surrogate: Surrogate, plan: Plan, n: int) -> float:
    """Returns about what a plan is predicted to cost, in nats: each rule as the widest candidate that keeps no more tokens.

    What rules keep is compared at `n` tokens. They need be no candidates; their formats are.
    """
    kept = np.array([rule.kept(n, plan.min_window) for rule in surrogate.rules], np.float64)
    pairs = np.array([(rule.key_format, rule.value_format) for rule in surrogate.rules])
    nearest: dict[Rule, int] = {}
    for rule in {rule for row in plan.rules for rule in row}:
        alike = (pairs == (rule.key_format, rule.value_format)).all(axis=1)
        near = np.where(kept <= rule.kept(n, plan.min_window), kept, -kept)
        nearest[rule] = int(np.argmax(np.where(alike, near, -np.inf)))
    return total_cost(surrogate.costs(), np.array([[nearest[rule] for rule in row] for row in plan.rules], np.int64))

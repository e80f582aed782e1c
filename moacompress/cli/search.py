"""`moacompress search`: finds the plan with the lowest measured KL within a budget."""

from __future__ import annotations

import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.core.artefact_names import PLAN_FILE
from moacompress.core.errors import UsageError
from moacompress.core.ranks import world_size
from moacompress.rules.budget import split_budgets
from moacompress.rules.memory import memory_lines
from moacompress.rules.worst_share import WorstShare

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile
    from moacompress.recipe import Recipe
    from moacompress.search.result.search_result import SearchResult


ProfileFolder = Annotated[
    Path | None, typer.Argument(metavar="PROFILE", help="Folder written by `profile`.", show_default=False)
]
PlanFile = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File to write the plan to.")]
Status = Annotated[
    str | None,
    typer.Option(
        metavar="STORAGE",
        help="Search nothing; show workers, trials and the best result so far of every search in a storage.",
    ),
]


@command(
    "moacompress search profile/ --budget 25% -o plan.json",
    "moacompress search profile/ --budget 25% --budget 512MiB@32k -o plan.json --trials 40",
    "moacompress search profile/ --budget 50%,25%,12.5% -o plans/plan.json",
    "moacompress search profile/ --max-loss 1% -o plan.json",
    "moacompress search profile/ --budget 25% --formats native -o spans.json",
    "moacompress search profile/ --budget 25% --share auto -o shared.json",
    "moacompress search profile/ --budget 25% --classes 18 -o plan.json",
    "moacompress search profile/ --budget memory=6GiB@8k -o plan.json",
    "moacompress search profile/ --budget 12.5%@8k -o plan.json --storage sqlite:///study.db --json",
    "moacompress search --status sqlite:///study.db",
    settings=(
        "budget",
        "max_loss",
        "search.trials",
        "search.timeout",
        "search.formats",
        "search.gates",
        "search.share",
        "search.classes",
        "search.storage",
        "seed",
        "device",
        "dtype",
    ),
    takes=("recipe", "settings", "dry_run", "overwrite", "tensor_parallel", "trust_remote_code"),
    computes=True,
    maps=True,
    shared=True,
)
def search(
    run: CommandRun,
    profile: ProfileFolder = None,
    out: PlanFile = Path(PLAN_FILE),
    status: Status = None,
) -> Output:
    """Find the plan with the lowest KL within a budget.

    Plans are measured on the model that PROFILE was made from. The same command resumes a stopped search. Under torchrun
    (torchrun --standalone --nproc-per-node 2 -m moacompress search ...) the processes share the samples of every measurement.
    """
    started = time.monotonic()
    if status is not None:
        from moacompress.search.search_status import search_status

        found = search_status(status)
        return Output({"searches": [one.to_dict() for one in found]}, [line for one in found for line in one.lines()])
    if profile is None:
        raise UsageError("missing argument PROFILE: the folder written by `moacompress profile`")
    from moacompress.calibration.profile.store import Profile

    loaded = Profile.load(profile)
    given = run.given.get("budget")
    asked = split_budgets(given) if given else []
    several = asked if len(asked) > 1 else []
    resolved = run.recipe(loaded.recipe, budget=[] if several else asked[0] if asked else None)
    _check_ranks(run.common.dry_run, bool(several) or resolved.max_loss is not None, resolved)
    if run.common.dry_run:
        from moacompress.search.search_estimate import estimate_search

        consent = run.common.trust_remote_code
        expected = estimate_search(loaded, resolved, several, run.progress, trust_remote_code=consent)
        return Output(expected.to_dict(), [*expected.lines()])

    from moacompress.models.processes import own_files
    from moacompress.search.deadline import Deadline
    from moacompress.search.plan_sets import find_asked, find_plans

    options: dict[str, Any] = {
        "recipe": resolved,
        "deadline": Deadline(resolved.search.timeout, started),
        **run.how,
    }
    if several:
        return _several(loaded, find_plans(loaded, several, out=out, **options))
    with own_files(out) if world_size() > 1 else nullcontext(out) as place:
        return _one(loaded, find_asked(loaded, out=place, **options), out)


def _check_ranks(dry_run: bool, several: bool, recipe: Recipe) -> None:
    """Refuses what the processes of one run cannot search for alike, be it with a model each or with one together.

    Raises:
        UsageError: says what.
    """
    if world_size() == 1:
        return
    if dry_run:
        raise UsageError("--dry-run times one process; start it without torchrun, or run it")
    if several:
        raise UsageError("torchrun searches one plan for given budgets; leave out --max-loss and several budgets")
    if recipe.search.storage is not None:
        raise UsageError(
            "--storage shares a search between independently started workers; leave out --storage or torchrun"
        )
    if recipe.search.timeout is not None:
        raise UsageError("the processes of one run would stop at different plans; leave out --timeout or torchrun")


def _following(profile: Profile, plan: object) -> str:
    return "Next: " + shlex.join(["moacompress", "export", str(profile.source), str(plan), "-o", "model/"])


def _one(profile: Profile, found: SearchResult, out: Path) -> Output:
    from moacompress.report.search_tables import explanation_tables, kl_table, loss_lines

    measured = f"{found.measured_plans} plans measured in {found.trials} trials; the best was trial {found.best_trial}."
    if found.harm["plan"] is None:
        measured = (
            "Not measured: the time ran out first. The plan is the one that the profile predicts to be best; resume with the "
            "same command and a longer --timeout."
        )
    return Output(
        {"plan": str(out), **_numbers(found)},
        [
            kl_table(found.harm, found.kv_bytes),
            *memory_lines(found.plan.budget.get("memory", {})),
            *explanation_tables(found.explanation),
            measured,
            f"KV cache: {WorstShare.of(found.plan)}.",
            *loss_lines(found.plan),
            *_elsewhere([found]),
            _following(profile, out),
        ],
    )


def _elsewhere(found: list[SearchResult]) -> list[str]:
    """Returns where the plans are that were there already, or that another worker of the search writes."""
    places = ", ".join(str(result.path) for result in found if not result.written)
    return [f"Written by an earlier run or another worker of this search: {places}"] if places else []


def _several(profile: Profile, found: list[SearchResult]) -> Output:
    from moacompress.report.search_tables import front_table

    return Output(
        {"plans": [{"plan": str(result.path), **_numbers(result)} for result in found]},
        [
            front_table(found),
            *_elsewhere(found),
            _following(profile, found[0].path),
        ],
    )


def _numbers(found: SearchResult) -> dict[str, Any]:
    return {
        "trials": found.trials,
        "measured_plans": found.measured_plans,
        "best_trial": found.best_trial,
        "written": found.written,
        "harm": found.harm,
        "kv_bytes": found.kv_bytes,
        "worst_share": found.plan.budget.get("worst_share"),
        "best_baseline": found.plan.quality.get("best_baseline"),
        "refused": found.explanation.get("refused"),
        **({} if found.classes is None else {"classes": found.classes}),
        **({"memory": memory} if (memory := found.plan.budget.get("memory")) else {}),
        "seconds": found.seconds,
    }

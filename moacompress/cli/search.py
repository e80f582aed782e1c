"""`moacompress search`: the plan of least measured harm within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import Output, Run, verb
from moacompress.cli.options import Budgets, Overwrite, RecipeFile


@verb(
    "moacompress search profile/ --budget 25% -o plan.json",
    "moacompress search profile/ --budget 25% --budget 512MiB@32k -o plan.json --trials 40",
    "moacompress search profile/ --budget 12.5%@8k -o plan.json --storage sqlite:///study.db --json",
)
def search(
    run: Run,
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="Folder that `profile` made.")],
    budget: Budgets = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File of the plan.")] = Path("plan.json"),
    recipe: RecipeFile = None,
    trials: Annotated[int | None, typer.Option(help="Measured trials.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which no new trial starts.")] = None,
    solver: Annotated[str | None, typer.Option(help="Solver inside each trial: lagrange or milp.")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage, to resume from or to share.")] = None,
    overwrite: Overwrite = False,
) -> Output:
    """Find the plan of least harm within a budget.

    Plans are measured on the model of PROFILE. A search that was stopped goes on with the same command.
    """
    from moacompress.calibration.store import Profile

    loaded = Profile.load(profile)
    resolved = run.recipe(
        recipe,
        base=loaded.recipe,
        budget=budget,
        search__trials=trials,
        search__timeout=timeout,
        search__solver=solver,
        search__storage=storage,
    )

    from moacompress.report.summary import harm_table
    from moacompress.search.study import find_plan

    found = find_plan(loaded, None, recipe=resolved, out=out, overwrite=overwrite, progress=run.progress)
    data = {
        "plan": str(out),
        "trials": found.trials,
        "measured_plans": found.measured_plans,
        "best_trial": found.best_trial,
        "harm": found.harm,
        "kv_bytes": found.kv_bytes,
        "seconds": found.seconds,
    }
    return Output(
        data,
        [
            harm_table(found.harm, found.kv_bytes),
            f"{found.measured_plans} plans measured in {found.trials} trials; the best was trial {found.best_trial}.",
            f"Next: moacompress export {loaded.source} {out} -o model/",
        ],
    )

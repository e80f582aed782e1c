"""What the trials of a search gain over its surrogate's own plan, and whether the sampler matters, on held-out samples.

    python benchmarks/samplers.py PROFILE --budget 12.5% --trials 16 --seeds 0,1 -o rows.json
    python benchmarks/samplers.py --table rows.json

Every sampler searches the same profile with as many trials, without baselines; the plan that each search
returns is then measured on samples that neither the profile nor the searches saw. `surrogate` is trial 0 alone. A search
here returns the trial of lowest KL, where a user's asks it to be lower than trial 0 by two standard errors. Plans lie beside
the output: the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
from harness import markdown, options  # beside this script

from moacompress.cli import app
from moacompress.report.search_tables import difference_text
from moacompress.search.measure import trials as trials_module
from moacompress.search.measure.kl_difference import KlDifference

SAMPLERS = {
    "gp": optuna.samplers.GPSampler,
    "tpe": lambda seed, n_startup_trials, **_: optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=n_startup_trials, multivariate=True
    ),
    "random": lambda seed, **_: optuna.samplers.RandomSampler(seed=seed),
}


def main() -> None:
    """Searches with every sampler, has the plans measured, and prints a table."""
    parser = options(__doc__)
    parser.add_argument("profile", type=Path, nargs="?")
    parser.add_argument("--budget", default="12.5%")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--samplers", default=",".join(SAMPLERS), help="which, with commas between")
    parser.add_argument("--seeds", default="0", help="of the searches, with commas between")
    parser.add_argument("--samples", type=int, default=40, help="held-out samples that the plans are measured on")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--out", type=Path, help="JSON file of the rows")
    parser.add_argument("--table", type=Path, help="search nothing; print the rows of a file")
    given = parser.parse_args()
    if given.table is not None:
        print(table(json.loads(given.table.read_text("utf-8"))))
        return
    if given.profile is None or given.out is None:
        parser.error("give a profile and --out, or --table")
    folder = given.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    minutes = {"surrogate": searched(given, folder / "surrogate.json", "gp", 1, 0)}
    for seed in map(int, given.seeds.split(",")):
        for sampler in given.samplers.split(","):
            name = f"surrogate/{sampler}-{seed}"
            minutes[name] = searched(given, folder / f"{sampler}-{seed}.json", sampler, given.trials, seed)
    plans = [f"{name}={folder / name.rpartition('/')[2]}.json" for name in minutes]
    compare = [sys.executable, str(Path(__file__).with_name("compare_plans.py")), str(given.profile), *plans]
    subprocess.run(
        [*compare, "--samples", str(given.samples), "--dtype", given.dtype, "-o", str(given.out)], check=True
    )
    rows = json.loads(given.out.read_text("utf-8"))
    for row in rows:
        row["minutes"] = minutes[row["plan"]]
        found = json.loads((folder / f"{row['plan'].rpartition('/')[2]}.json").read_text("utf-8"))
        row["searched"] = found["quality"]["measured_harm"]["plan"]
    given.out.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(table(rows))


def searched(given: argparse.Namespace, plan: Path, sampler: str, trials: int, seed: int) -> float | None:
    """Searches a plan, unless it is there, and returns the minutes that it took."""
    notes = plan.with_suffix(".minutes")
    if not notes.exists():
        asked = ["--budget", given.budget, "--trials", str(trials)]
        recipe = plan.with_suffix(".yaml")
        recipe.write_text("search: {alternatives: false}\n", "utf-8")
        begin = time.monotonic()
        arguments = ["search", str(given.profile), *asked, "--seed", str(seed), "--recipe", str(recipe)]
        with (
            mock.patch.object(optuna.samplers, "GPSampler", SAMPLERS[sampler]),
            mock.patch.object(trials_module, "CAUTION", 0.0),
        ):
            app([*arguments, "--dtype", given.dtype, "-o", str(plan)], standalone_mode=False)
        notes.write_text(f"{(time.monotonic() - begin) / 60:.2f}\n", "utf-8")
    return float(notes.read_text("utf-8"))


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as a table in Markdown; differences are to trial 0, paired by sample."""
    first, cells = rows[0]["kls"], []
    for row in rows:
        apart = "" if row is rows[0] else difference_text(KlDifference.of(row["kls"], first).to_dict())
        name = row["plan"].rpartition("/")[2].replace("-", ", ")
        cells.append([name, f"{row['minutes']:.1f}", f"{row['searched']:.3g}", f"{np.mean(row['kls']):.3g}", apart])
    return markdown(["sampler, seed", "minutes", "KL of the search, nats", "KL held out", "difference"], cells)


if __name__ == "__main__":
    main()

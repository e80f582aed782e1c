"""KL of plans on the same samples, each compared with another one, paired by sample.

    python benchmarks/compare_plans.py PROFILE quarter=plan-25.json eighth=plan-12.5.json:whole -o rows.json
    python benchmarks/compare_plans.py --table rows.json

KL(dense || plan) in nats per answer token, on PROFILE's validation samples or, with `--samples N`, on as many others of the
pools that are kept for evaluation. A plan is `NAME=FILE`; `:whole` after it takes its keys whole, `:mean` less the profile's
mean keys. `eighth/no gates` is compared with `eighth`, a name without a slash with none. Records beside the output keep what is
measured: the same command resumes, and adds to a file that has other plans.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import markdown, options  # beside this script

from moacompress.calibration.data.sample_sources import build_samples
from moacompress.calibration.profile.store import Profile
from moacompress.core.progress import Progress
from moacompress.core.tables import readable_number
from moacompress.report.search_tables import difference_text
from moacompress.rules.plan import Plan
from moacompress.runtime.ready_model import load_for
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.measuring import measured_kls


def main() -> None:
    """Measures the plans, writes their rows, and prints a table."""
    parser = comparison_options(__doc__)
    parser.add_argument("plans", nargs="*", metavar="NAME=FILE")
    given = parser.parse_args()
    if given.table is not None:
        print(table(json.loads(given.table.read_text("utf-8"))))
        return
    if given.profile is None or given.out is None or not given.plans:
        parser.error("give a profile, plans and --out, or --table")
    profile = Profile.load(given.profile)
    print(table(compared(profile, dict(named_plan(text, profile) for text in given.plans), given)))


def comparison_options(doc: str | None) -> argparse.ArgumentParser:
    """Returns the options of a script that compares plans of a profile."""
    parser = options(doc)
    parser.add_argument("profile", type=Path, nargs="?")
    parser.add_argument("--model", help="where the model is, if not where it was profiled")
    parser.add_argument(
        "--samples", type=int, help="so many samples of no calibration, in place of the validation samples"
    )
    parser.add_argument("--dtype", default="auto", help="compute dtype of the model")
    parser.add_argument("-o", "--out", type=Path, help="JSON file of the rows")
    parser.add_argument("--table", type=Path, help="measure nothing; print the rows of a file")
    return parser


def compared(profile: Profile, plans: dict[str, Plan], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures plans by name and adds their rows to those in `given.out`; returns all of them."""
    source = load_for(profile.recipe.override(dtype=given.dtype), given.model or profile.source)
    samples = profile.validation
    if given.samples is not None:
        calibration = profile.recipe.calibration.model_copy(update={"validation_samples": given.samples})
        samples = build_samples(source, profile.recipe.model_copy(update={"calibration": calibration}), "evaluation")
    records = given.out.with_suffix(".records.jsonl")
    kls = measured_kls(source, samples, list(plans.values()), records, Progress()).tolist()
    n = profile.lengths[-1]
    rows = {row["plan"]: row for row in json.loads(given.out.read_text("utf-8"))} if given.out.exists() else {}
    for (name, plan), found in zip(plans.items(), kls, strict=True):
        row = {"model": Path(profile.source).name, "plan": name, "length": n, "kv_share": plan.kv_share(n)}
        predicted = plan.quality.get("predicted_harm")
        rows[name] = {**row, "predicted": predicted, "kinds": [sample.source for sample in samples], "kls": found}
    given.out.write_text(json.dumps(list(rows.values()), indent=1) + "\n", "utf-8")
    return list(rows.values())


def named_plan(text: str, profile: Profile) -> tuple[str, Plan]:
    """Reads `NAME=FILE`, `NAME=FILE:whole` or `NAME=FILE:mean`."""
    name, _, rest = text.partition("=")
    file, _, keys = rest.partition(":")
    plan = Plan.load(file)
    if keys == "mean" and not profile.centres:
        raise SystemExit("the profile has no mean keys; profile again")
    return name, {"": plan, "whole": replace(plan, centres=()), "mean": replace(plan, centres=profile.centres)}[keys]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as two tables in Markdown: of all samples, and the means of each kind of samples."""
    kls = {row["plan"]: row["kls"] for row in rows}
    cells = []
    for row in rows:
        name, mean = row["plan"], float(np.mean(row["kls"]))
        other = name.rpartition("/")[0]
        apart = difference_text(KlDifference.of(kls[name], kls[other]).to_dict()) if other in kls else ""
        cells.append([name, f"{row['kv_share']:.3f}", readable_number(row["predicted"], ".2g"), f"{mean:.3g}", apart])
    whole = markdown(["plan", "KV bytes, of dense", "KL predicted, nats", "measured", "difference"], cells)
    by_kind = []
    for kind in dict.fromkeys(rows[0]["kinds"]):
        of_kind = [index for index, other in enumerate(rows[0]["kinds"]) if other == kind]
        means = [f"{np.mean([kls[name][index] for index in of_kind]):.2g}" for name in kls]
        by_kind.append([kind, str(len(of_kind)), *means])
    return f"{whole}\n\n{markdown(['kind', 'samples', *kls], by_kind)}"


if __name__ == "__main__":
    main()

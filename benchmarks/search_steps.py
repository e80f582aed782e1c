"""What each step of a search gives on held-out samples, and the plans that need no search, at the same bytes.

    python benchmarks/search_steps.py profile/ plan.json --samples 24 --json

The samples are made as the profile's were, of the pools that are kept for evaluation. Records beside the plan keep what is
measured; the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.calibration.data.sample_sources import build_samples
from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import explanation_file
from moacompress.core.files import read_json
from moacompress.core.progress import Progress
from moacompress.core.statistics import Estimate, estimate_row, estimate_text, exponential_mean, median
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from moacompress.runtime.ready_model import load_for
from moacompress.search.baselines.families import family_plans
from moacompress.search.measure.measuring import measured_kls
from moacompress.search.measure.packed_plan import unpack
from moacompress.search.measure.trials import log_ratios
from moacompress.search.search_request import SearchRequest


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--samples", type=int, default=24, help="held-out samples")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="other plans, measured on the same samples")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    options = parser.parse_args()
    if options.samples < 2:
        parser.error("intervals need 2 samples or more")
    profile, found = Profile.load(options.profile), Plan.load(options.plan)
    stages = read_json(explanation_file(options.plan), "explanation")["stages"]
    names = [stage["name"] for stage in stages if stage["kept"]]
    plans = [unpack(stage["plan"], profile) for stage in stages if stage["kept"]]
    others = baselines(profile, found) | {path.stem: Plan.load(path) for path in options.beside}
    source = load_for(profile.recipe, profile.source)
    recipe = profile.recipe.override(calibration__validation_samples=options.samples, calibration__text_samples=0)
    samples = build_samples(source, recipe, "evaluation")
    records = options.plan.with_suffix(".steps.jsonl")
    kls = measured_kls(source, samples, [*plans, *others.values()], records, Progress())
    last = len(plans) - 1
    rows = [row(name, kls[i], kls[max(0, i - 1)], kls[0]) for i, name in enumerate(names)]
    rows += [row(name, kls[len(plans) + i], kls[last], kls[0]) for i, name in enumerate(others)]
    if options.json:
        print(json.dumps({"samples": len(samples), "rows": rows}))
        return
    print(f"{len(samples)} samples; the change is against the row before, of other plans against the last step")
    for one in rows:
        print(
            f"{one['plan']:24} {one['harm']:.4f} nats, median {one['median']:.4f}; {shown(one['change'])}, median ratio "
            f"{estimate_text(one['median_ratio']['value'], one['median_ratio']['ci95'], '.3f')}; "
            f"{shown(one['change_of_first'])} against the surrogate's own plan"
        )


def baselines(profile: Profile, found: Plan) -> dict[str, Plan]:
    """Returns the baselines that a plan was measured beside, by family."""
    recipe = Recipe.from_dict(found.provenance["recipe"])
    constraints = SearchRequest.of(profile, found.budget["asked"], recipe).constraints
    sinks = sorted({rule.sink for rule in profile.rules if not rule.is_full})
    keys = {family: note["key"] for family, note in found.quality["baselines"].items()}
    return {
        family: plan
        for family, key in keys.items()
        for plan in family_plans(family, profile.shape, constraints, profile, sinks)
        if plan.key() == key
    }


def row(name: str, kls: np.ndarray, before: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    """Returns the numbers of a plan: its KL, and the paired changes against two others, with 95% intervals."""
    middle, ends = median(log_ratios(kls.tolist(), before.tolist()))
    ratio: Estimate = math.exp(middle), None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
    return {
        "plan": name,
        "harm": float(kls.mean()),
        "median": float(np.median(kls)),
        "change": change(kls, before),
        "median_ratio": estimate_row(*ratio),
        "change_of_first": change(kls, first),
    }


def change(kls: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """Returns the geometric mean of the paired ratios, less one."""
    value, ends = exponential_mean(log_ratios(kls.tolist(), before.tolist()))
    return estimate_row(value - 1, None if ends is None else (ends[0] - 1, ends[1] - 1))


def shown(number: dict[str, Any]) -> str:
    """Returns a change with its interval, for people."""
    return estimate_text(number["value"], number["ci95"], "+.1%")


if __name__ == "__main__":
    main()

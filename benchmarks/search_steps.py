"""What each step of a search gives on held-out samples: the surrogate's plan, the study's, every round's, the moves'.

    python benchmarks/search_steps.py profile/ plan.json --samples 24 --json

The samples are made as the profile's were, of the pools that are kept for evaluation. A ledger beside the plan keeps what is
measured; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from moacompress.artefacts import read_json
from moacompress.calibration.data import build_samples
from moacompress.calibration.store import Profile
from moacompress.evaluation.stats import mean
from moacompress.models import load_for
from moacompress.plan import Plan
from moacompress.progress import Progress
from moacompress.search.measuring import measured_harms
from moacompress.search.outcome import explanation_path, unpack
from moacompress.search.trials import log_ratios


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--samples", type=int, default=24, help="held-out samples")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    options = parser.parse_args()
    profile = Profile.load(options.profile)
    stages = read_json(explanation_path(options.plan), "explanation")["stages"]
    stages = [stage for stage in stages if stage["kept"]]
    plans = [Plan(profile.shape, profile.min_window, unpack(stage["plan"])) for stage in stages]
    source = load_for(profile.recipe, profile.source)
    recipe = profile.recipe.override(calibration__validation_samples=options.samples, calibration__text_samples=0)
    samples = build_samples(source, recipe, "evaluation")
    harms = measured_harms(source, samples, plans, options.plan.with_suffix(".steps.jsonl"), Progress())
    rows = []
    for number, stage in enumerate(stages):
        before = harms[max(0, number - 1)].tolist()
        ratio, (low, high) = mean(log_ratios(harms[number].tolist(), before))
        total, (total_low, total_high) = mean(log_ratios(harms[number].tolist(), harms[0].tolist()))
        rows.append(
            {
                "stage": stage["name"],
                "harm": float(harms[number].mean()),
                "median": float(np.median(harms[number])),
                "against_before": {
                    "value": float(np.expm1(ratio)),
                    "ci95": [float(np.expm1(low)), float(np.expm1(high))],
                },
                "against_surrogate": {
                    "value": float(np.expm1(total)),
                    "ci95": [float(np.expm1(total_low)), float(np.expm1(total_high))],
                },
            }
        )
    if options.json:
        print(json.dumps({"samples": len(samples), "stages": rows}))
        return
    for row in rows:
        step, whole = row["against_before"], row["against_surrogate"]
        print(
            f"{row['stage']:24} {row['harm']:.4f} nats (median {row['median']:.4f}), {step['value']:+.1%} "
            f"[{step['ci95'][0]:+.1%}, {step['ci95'][1]:+.1%}] against the step before, {whole['value']:+.1%} "
            f"[{whole['ci95'][0]:+.1%}, {whole['ci95'][1]:+.1%}] against the surrogate's plan"
        )


if __name__ == "__main__":
    main()

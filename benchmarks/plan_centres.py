"""What centres of keys are worth to whole plans: the same rules with and without them, on a profile's validation samples.

    python benchmarks/plan_centres.py PROFILE PLAN.json ... --model MODEL -o rows.jsonl

KL(dense || plan) in nats per answer token, as a search measures it. Centres are those of the profile, whatever plans have of
their own. `difference` is with them less without, paired by sample.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from moacompress.calibration.profile.store import Profile
from moacompress.core.progress import SILENT
from moacompress.report.search_tables import difference_text
from moacompress.rules.plan import Plan
from moacompress.runtime.ready_model import load_for
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.measuring import measured_kls


def main() -> None:
    """Measures every plan, and prints a row of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--model", help="where the model is, if not where it was profiled")
    parser.add_argument("-o", "--out", type=Path, help="a file that every row is appended to")
    given = parser.parse_args()
    profile = Profile.load(given.profile)
    if not profile.centres:
        parser.error("the profile has no mean keys; profile again")
    source = load_for(profile.recipe, given.model or profile.source)
    for path in given.plans:
        plan = Plan.load(path)
        both = [replace(plan, centres=centres) for centres in (profile.centres, ())]
        with tempfile.TemporaryDirectory() as folder:
            less, whole = measured_kls(source, profile.validation, both, Path(folder) / "kls.jsonl", SILENT).tolist()
        n = plan.stated_lengths[-1]
        row: dict[str, Any] = {
            "model": Path(profile.source).name,
            "plan": path.name,
            "kv_share": plan.kv_share(n),
            "length": n,
            "less_mean": less,
            "whole": whole,
            "difference": KlDifference.of(less, whole).to_dict(),
        }
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        means = [sum(kls) / len(kls) for kls in (less, whole)]
        print(
            f"{path.name}: {plan.kv_share(n):.1%} at {n:,} tokens, less their mean {means[0]:.5f} nats, whole {means[1]:.5f}, "
            f"difference {difference_text(row['difference'])}",
            flush=True,
        )


if __name__ == "__main__":
    main()

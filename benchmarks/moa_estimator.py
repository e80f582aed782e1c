"""What MoA's estimator chooses from our grid of spans and from one like MoA's, beside our estimator and a uniform window.

    python benchmarks/moa_estimator.py PROFILE --budget 25% -o rows.jsonl

PROFILE was made with `--baselines`. MoA's grid, of its published code: a sink of one block of 64 tokens, and no window below an
eighth of the shortest length profiled. KL(dense || plan) in nats per answer token on the profile's validation samples;
`difference` is to the uniform window, paired by sample.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from harness import append_row, options  # beside this script

from moacompress.calibration.profile.store import Profile
from moacompress.core.progress import SILENT
from moacompress.report.search_tables import difference_text
from moacompress.rules.kv_bytes import candidate_kv_bytes
from moacompress.rules.limits import Limits, limit_array
from moacompress.rules.plan import Plan
from moacompress.runtime.ready_model import load_for
from moacompress.search.baselines.families import baseline_plans
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.measuring import measured_kls
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.problem.knapsack import Knapsack

MOA_SINK = 64
MOA_SHARE = 8
"""Part of the shortest length that the narrowest window of MoA's grid takes: one of so many."""


def main() -> None:
    """Chooses, measures, and prints a row for every estimator and grid."""
    parser = options(__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--budget", type=float, default=25, help="percent of the dense KV bytes, at every length")
    parser.add_argument("--model", help="where the model is, if not where it was profiled")
    parser.add_argument("-o", "--out", type=Path, help="a file that every row is appended to")
    given = parser.parse_args()
    profile = Profile.load(given.profile).without_gates().offering(())
    limits = {n: int(profile.shape.dense_kv_bytes(n) * given.budget / 100) for n in profile.lengths}
    plans = {"uniform window": baseline_plans("uniform", profile.shape, limits, profile.min_window, sinks=(4,))[0]}
    for estimator in ("moa", "mass", profile.recipe.profile.estimator):
        for grid in ("ours", "moa"):
            plans[f"{estimator}, {grid} grid"] = chosen(profile, estimator, limits, numbers_of(profile, grid))
    source = load_for(profile.recipe, given.model or profile.source)
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "kls.jsonl"
        kls = measured_kls(source, profile.validation, list(plans.values()), records, SILENT).tolist()
    n = profile.lengths[0]
    for (name, plan), found in zip(plans.items(), kls, strict=True):
        fewest = min(rule.kept(n, plan.min_window) for row in plan.rules for rule in row)
        row = {
            "model": Path(profile.source).name,
            "budget": given.budget,
            "plan": name,
            "kv_share": plan.kv_share(n),
            "fewest": int(fewest),
            "kls": found,
            "difference": KlDifference.of(found, kls[0]).to_dict() if found is not kls[0] else None,
        }
        append_row(given.out, row)
        beside = "" if row["difference"] is None else f", against uniform {difference_text(row['difference'])}"
        print(f"{name:24} {np.mean(found):.4f} nats, at fewest {row['fewest']} tokens a head{beside}", flush=True)


def numbers_of(profile: Profile, grid: str) -> list[int]:
    """Returns the numbers of the profile's rules that a grid has, "ours" or "moa"."""
    n = min(profile.lengths)
    return [
        number
        for number, rule in enumerate(profile.rules)
        if grid == "ours"
        or rule.sees_all
        or (rule.sink == MOA_SINK and (rule.kept(n, profile.min_window) - MOA_SINK) * MOA_SHARE >= n)
    ]


def chosen(profile: Profile, estimator: str, limits: Limits, numbers: list[int]) -> Plan:
    """Returns the plan of the numbered rules that an estimator foresees the least of."""
    influence = profile.blended(estimator)
    costs = Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths)).costs()
    rules = [profile.rules[number] for number in numbers]
    sizes = candidate_kv_bytes(profile.shape, rules, profile.min_window, list(limits))
    knapsack = Knapsack(sizes, limit_array(limits))
    choice = knapsack.choose(costs[..., numbers])
    return profile.plan([[rules[number] for number in row] for row in choice.tolist()])


if __name__ == "__main__":
    main()

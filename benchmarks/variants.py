"""The surrogate's own plans with other formats on offer, or without some kinds of samples, beside that of the whole profile.

    python benchmarks/variants.py PROFILE --budget 12.5% --formats int8,int4 --formats native -o rows.json
    python benchmarks/variants.py PROFILE --budget 12.5% --without key-value --without needle,multi-needle -o rows.json
    python benchmarks/variants.py --table rows.json

The plan of `--budget 12.5%` is named `12.5` and has the first `--formats`; `12.5/native` is offered others, and `12.5/no
key-value` is priced without the samples whose source begins so. Gates and mean keys are those of the whole profile.
Measured as `compare_plans.py` does, which also says what `--samples` are; plans lie beside the output.
"""

from __future__ import annotations

import json
from itertools import product

from compare_plans import compared, comparison_options, table  # beside this script

from moacompress.calibration.profile.store import Profile
from moacompress.rules.plan import Plan
from moacompress.search.search_request import SearchRequest


def main() -> None:
    """Makes the plans, measures them, and prints a table."""
    parser = comparison_options(__doc__)
    parser.add_argument("--budget", action="append", default=[], help="of the plans")
    parser.add_argument("--formats", action="append", default=[], help="on offer beside the native one, commas between")
    parser.add_argument("--without", action="append", default=[], help="kinds of samples, commas between")
    given = parser.parse_args()
    if given.table is not None:
        print(table(json.loads(given.table.read_text("utf-8"))))
        return
    if given.profile is None or given.out is None or not given.budget:
        parser.error("give a profile, --budget and --out, or --table")
    profile, plans = Profile.load(given.profile), dict[str, Plan]()
    folder = given.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = given.formats or [None]
    variants = [("", first, ""), *((f"/{formats}", formats, "") for formats in others)]
    variants += [(f"/no {kinds}", first, kinds) for kinds in given.without]
    for budget, (name, formats, left_out) in product(given.budget, variants):
        plan = own_plan(profile, budget, formats, left_out)
        plans[budget.rstrip("%") + name] = plan
        plan.save(folder / f"{budget.rstrip('%')}{name.replace('/', ' ')}.json")
    print(table(compared(profile, plans, given)))


def own_plan(profile: Profile, budget: str, formats: str | None, left_out: str) -> Plan:
    """Returns the plan that a search begins with, priced without the samples of some kinds."""
    samples, kinds = profile.calibration_samples(), tuple(filter(None, left_out.split(",")))
    kept = [number for number, sample in enumerate(samples) if not sample.source.startswith(kinds)]
    recipe = profile.recipe.override(budget=budget, search__formats=formats)
    request = SearchRequest.of(profile.subset(kept), budget, recipe)
    plan = request.plan(request.parameters.neutral)
    return plan.with_notes(quality={"predicted_harm": request.predicted(plan)})


if __name__ == "__main__":
    main()

"""The solver on random problems of the size of a large model: its time, and the gap to its lower bound.

    python benchmarks/solver.py --heads 1024 --rules 50 --lengths 3 --json

Costs are heavy-tailed over heads and fall with what a rule keeps, as profiles' do; the budget is a quarter.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
from harness import options  # beside this script

from moacompress.search.problem.solver import solve


def problem(heads: int, rules: int, lengths: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns costs [heads, rules], slots [lengths, heads, rules] and limits [lengths] of a random problem."""
    rng = np.random.default_rng(seed)
    n = 1024 * 2 ** np.arange(lengths)
    alpha = np.concatenate([[0, 32], np.exp(rng.uniform(np.log(32), np.log(2048), rules - 2)).astype(np.int64)])
    beta = np.concatenate([[1.0, 0.0], rng.choice([0, 1 / 16, 1 / 8, 1 / 4, 1 / 2], rules - 2)])
    kept = np.minimum(n[:, None], alpha + beta * n[:, None])
    slots = np.repeat((-(-kept // 16) * 16).astype(np.int64)[:, None, :], heads, axis=1)
    weight, steep = np.exp(rng.normal(-4, 2.5, (heads, 1))), rng.uniform(1, 4, (heads, 1))
    costs = weight * (1 - kept.mean(0) / n.mean()) ** steep
    return costs * np.exp(rng.normal(0, 0.3, costs.shape)) * (costs > 0), slots, heads * n // 4


def main() -> None:
    """Runs the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--heads", type=int, default=1024)
    parser.add_argument("--rules", type=int, default=50)
    parser.add_argument("--lengths", type=int, default=3)
    parser.add_argument("--problems", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    given = parser.parse_args()
    solve(*problem(90, 20, 2, 0))  # imports
    runs: list[dict[str, float]] = []
    for seed in range(given.problems):
        costs, slots, limits = problem(given.heads, given.rules, given.lengths, seed)
        begin = time.perf_counter()
        found = solve(costs, slots, limits)
        assert found.gap is not None
        runs.append({"solve_ms": 1e3 * (time.perf_counter() - begin), "gap": found.gap})
    times = [run["solve_ms"] for run in runs]
    result = {
        "heads": given.heads,
        "rules": given.rules,
        "lengths": given.lengths,
        "solve_ms": {"median": statistics.median(times), "max": max(times)},
        "worst_gap": max(run["gap"] for run in runs),
        "runs": runs,
    }
    if given.json:
        print(json.dumps(result))
        return
    print(
        f"{given.heads} heads x {given.rules} rules x {given.lengths} lengths, {given.problems} problems: solve "
        f"{statistics.median(times):.0f} ms (at most {max(times):.0f}), at most {result['worst_gap']:.2%} above the optimum"
    )


if __name__ == "__main__":
    main()

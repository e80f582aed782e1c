"""The budgeted choice: one rule for every KV head, least total cost, and what they take within every limit.

A multiple-choice knapsack with a capacity for each limit, such as the KV bytes at a length. `solve` puts a price on each, so
that heads choose alone, and repairs the result, which meets the limits exactly. Throughout, `costs` are `[heads, rules]`,
`sizes` int64 `[limits, heads, rules]` and `limits` int64 `[limits]`; a choice has one rule per head, int64 `[heads]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import InfeasibleBudgetError

TOLERANCE = 1e-5
"""Relative distance between the dual value and its upper bound at which prices are good enough."""
MAX_CUTS = 30
POLISH_GAP = 0.002
POLISH_NODES = 500
SWAP_MOVES = 200
"""Changes of one head, of least reduced cost, that are tried in pairs."""
MAX_SWAPS = 100
NEAR_RULES = 8
"""Rules of a head, of least reduced cost, that repair and fill choose among."""
MAX_MOVES = 10_000


@dataclass(frozen=True)
class Solution:
    """A feasible choice.

    Attributes:
        choice: rule of every head.
        cost: its total cost.
        gap: `(cost - bound) / cost` for the best lower bound known, None without one.
    """

    choice: Ints
    cost: float
    gap: float | None


def solve(costs: Floats, sizes: Ints, limits: Ints) -> Solution:
    """Chooses one rule for every KV head by Lagrangian relaxation: cutting planes on the prices, then repair, fill and swaps.

    With a few heads and a tight budget the relaxation says little: where the gap stays above `POLISH_GAP`, HiGHS gets a
    bounded number of nodes (not seconds: the same problem always has the same solution).

    Costs are at least 0.

    Raises:
        InfeasibleBudgetError: no choice is within the limits.
    """
    costs = np.asarray(costs, np.float64)
    sizes, limits = np.asarray(sizes, np.int64), np.asarray(limits, np.int64)
    found = relaxed(costs, sizes, limits)
    if found is not None and found.gap is not None and found.gap <= POLISH_GAP:
        return found
    return _polished(costs, sizes, limits, found)


def relaxed(costs: Floats, sizes: Ints, limits: Ints, prices: Floats | None = None) -> Solution | None:
    """Returns the best choice that prices lead to; None where the repair gets stuck.

    It can only get stuck where no rule of some head is smallest at every length. The prices are of bytes as shares of the
    limits, `[limits]`, where good ones are known; by default the best ones.

    Raises:
        InfeasibleBudgetError: no choice is within the limits.
    """
    smallest = sizes.min(axis=2).sum(axis=1)
    for number, (need, limit) in enumerate(zip(smallest, limits, strict=True)):
        if need > limit:
            raise InfeasibleBudgetError(
                f"no choice of rules fits limit number {number + 1} of the budget, {limit:,}: the smallest takes {need:,}; "
                "ask for more"
            )
    # each head's cheapest rule, the smallest of equals
    ties = np.where(costs <= costs.min(axis=1, keepdims=True), sizes.sum(axis=0), np.iinfo(np.int64).max)
    cheapest = np.asarray(np.argmin(ties, axis=1))
    if (_used(sizes, cheapest) <= limits).all():
        return Solution(cheapest, _total(costs, cheapest), 0.0)
    # a limit of nothing is only met by rules of no bytes; 1 keeps the shares finite
    shares = sizes / np.maximum(limits, 1)[:, None, None]
    prices, bound = best_prices(costs, shares) if prices is None else (prices, -np.inf)
    priced = np.tensordot(prices, shares, axes=1)
    near = _near(costs + priced, sizes)
    costs, sizes = np.take_along_axis(costs, near, 1), np.take_along_axis(sizes, near[None], 2)
    priced = np.take_along_axis(priced, near, 1)
    best: Ints | None = None
    for scale in (1.0, 1.02, 0.98):  # from either side of the threshold: repairs and fills end differently
        choice = _repair(np.argmin(costs + scale * priced, axis=1), costs, sizes, limits)
        if choice is None:
            continue
        choice = fill(choice, costs, sizes, limits)
        choice = _swap(choice, costs, sizes, limits, costs + priced)
        if best is None or _total(costs, choice) < _total(costs, best):
            best = choice
    if best is None:
        return None
    cost = _total(costs, best)
    return Solution(np.take_along_axis(near, best[:, None], 1)[:, 0], cost, _gap(cost, bound))


def _polished(costs: Floats, sizes: Ints, limits: Ints, start: Solution | None) -> Solution:
    """Returns what HiGHS finds over each head's Pareto rules in `POLISH_NODES`, or `start`, whichever costs less."""
    from scipy import optimize, sparse

    heads, rules = np.nonzero(pareto(costs, sizes))
    unit = max(int(np.gcd.reduce(sizes, axis=None)), 1)  # small numbers, for HiGHS's tolerances
    columns = np.arange(len(heads))
    one_each = sparse.csr_array((np.ones(len(heads)), (heads, columns)), shape=(len(costs), len(heads)))
    scale = (float(costs.max()) if start is None else start.cost) or 1.0
    within = sparse.csr_array((sizes[:, heads, rules] // unit).astype(np.float64))
    found = optimize.milp(
        costs[heads, rules] * (1000.0 / scale),  # far above HiGHS's absolute tolerances
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(within, -np.inf, limits // unit),
        ],
        integrality=np.ones(len(heads)),
        bounds=optimize.Bounds(0, 1),
        options={"node_limit": POLISH_NODES, "mip_rel_gap": POLISH_GAP / 10},
    )
    choice = None
    if found.x is not None:
        chosen = found.x > 0.5
        choice = np.zeros(len(costs), np.int64)
        choice[heads[chosen]] = rules[chosen]
        choice = _repair(choice, costs, sizes, limits)  # HiGHS meets limits within a tolerance; bytes are exact
    if start is not None and (choice is None or start.cost <= _total(costs, choice)):
        choice = start.choice
    if choice is None:
        raise InfeasibleBudgetError(
            f"no choice of rules meets all {len(limits)} limits of the budget at once; ask for more"
        )
    cost = _total(costs, choice)
    gaps = [] if start is None or start.gap is None else [_gap(cost, start.cost * (1 - start.gap))]
    if found.mip_dual_bound is not None:
        gaps.append(_gap(cost, float(found.mip_dual_bound) * scale / 1000.0))
    return Solution(choice, cost, min(gaps, default=None))


def pareto(costs: Floats, sizes: Ints) -> npt.NDArray[np.bool_]:
    """Returns the rules of each head that no other one beats on cost and on every size, bool; of equals the first stays."""
    keep = np.ones(costs.shape, bool)
    earlier = np.arange(costs.shape[1])
    for rule in range(costs.shape[1]):
        other = (costs <= costs[:, [rule]]) & (sizes <= sizes[:, :, [rule]]).all(axis=0)
        equal = (costs == costs[:, [rule]]) & (sizes == sizes[:, :, [rule]]).all(axis=0)
        keep[:, rule] = ~(other & (~equal | (earlier < rule))).any(axis=1)
    return keep


def _total(costs: Floats, choice: Ints) -> float:
    return float(costs[np.arange(len(choice)), choice].sum())


def _used(sizes: Ints, choice: Ints) -> Ints:
    used: Ints = sizes[:, np.arange(len(choice)), choice].sum(axis=1)
    return used


def _gap(cost: float, bound: float) -> float:
    return 0.0 if cost <= 0 else min(max(0.0, (cost - bound) / cost), 1.0)


def _near(reduced: Floats, sizes: Ints) -> Ints:
    """Returns the rules of each head that can matter at the best prices, [heads, `NEAR_RULES` + 1 at most].

    Those of least reduced cost, and the smallest one, so that what is feasible stays so.
    """
    if reduced.shape[1] <= NEAR_RULES + 1:
        return np.broadcast_to(np.arange(reduced.shape[1]), reduced.shape)
    cheap = np.argpartition(reduced, NEAR_RULES, axis=1)[:, :NEAR_RULES]
    smallest = np.argmin((sizes / np.maximum(sizes.max(axis=(1, 2), keepdims=True), 1)).sum(axis=0), axis=1)
    return np.concatenate([cheap, smallest[:, None]], axis=1)


class _Dual:
    """The dual function: `g(prices) = sum over heads of min over rules (cost + prices . share) - sum(prices)`."""

    def __init__(self, costs: Floats, shares: Floats) -> None:
        self.costs, self.shares = costs, shares
        self.heads = np.arange(len(costs))
        self.best_prices, self.best = np.zeros(len(shares)), -np.inf

    def __call__(self, prices: Floats) -> tuple[float, Floats]:
        """Returns the dual value and a supergradient: how far each length's limit is exceeded, relatively."""
        reduced = np.tensordot(prices, self.shares, axes=1)
        reduced += self.costs
        choice = np.argmin(reduced, axis=1)
        value = float(reduced[self.heads, choice].sum() - prices.sum())
        if value > self.best:
            self.best, self.best_prices = value, prices
        slope: Floats = self.shares[:, self.heads, choice].sum(axis=1) - 1.0
        return value, slope


def best_prices(costs: Floats, shares: Floats) -> tuple[Floats, float]:
    """Maximises the dual.

    Equal prices first, by bisection on their logarithm; then, for several limits, Kelley's cutting planes in a box
    around them. `shares` are sizes as shares of the limits. Returns prices `[limits]`, and the dual value there, which is
    a lower bound on the cost.
    """
    dual = _Dual(costs, shares)
    lengths = len(shares)
    positive = costs[costs > 0]
    low, high = np.log(positive.min() / costs.size), np.log(positive.max() * costs.size)
    cuts = []
    for _ in range(60):
        middle = (low + high) / 2
        prices = np.full(lengths, np.exp(middle))
        value, slope = dual(prices)
        cuts.append((value - slope @ prices, slope))
        if slope.sum() > 0:
            low = middle
        else:
            high = middle
        if high - low < (1e-12 if lengths == 1 else 1e-3):
            break
    if lengths > 1:
        _cutting_planes(dual, cuts, box=4.0 * lengths * float(np.exp(high)))
    return dual.best_prices, dual.best


def _cutting_planes(dual: _Dual, cuts: list[tuple[float, Floats]], box: float) -> None:
    """Kelley's method: `dual` remembers the best prices it was asked for."""
    from scipy.optimize import linprog

    lengths = len(dual.best_prices)
    objective = np.concatenate([np.zeros(lengths), [-1.0]])
    for _ in range(MAX_CUTS):
        scale = max(abs(dual.best), 1e-300)
        rows = np.array([np.concatenate([-slope * box, [scale]]) for _, slope in cuts]) / scale
        offsets = np.array([offset for offset, _ in cuts]) / scale
        found = linprog(objective, A_ub=rows, b_ub=offsets, bounds=[(0, 1)] * lengths + [(None, None)], method="highs")
        if found.x is None or -found.fun - dual.best / scale < TOLERANCE:
            return
        prices = found.x[:lengths] * box
        value, slope = dual(prices)
        cuts.append((value - slope @ prices, slope))


def _repair(choice: Ints, costs: Floats, sizes: Ints, limits: Ints) -> Ints | None:
    """Changes heads where that costs least for the excess it removes; None where no single change helps any more."""
    choice = choice.copy()
    heads = np.arange(len(choice))
    for _ in range(MAX_MOVES):
        excess = np.maximum(_used(sizes, choice) - limits, 0)
        if not excess.any():
            return choice
        saved = sizes[:, heads, choice][:, :, None] - sizes
        # what a move takes off the excess (no more than there is), less what it adds on other lengths
        weight = np.where(excess > 0, 1.0 / np.maximum(limits, 1), 0.0)
        helped = (np.minimum(saved, excess[:, None, None]) * weight[:, None, None]).sum(axis=0)
        over = (_used(sizes, choice)[:, None, None] - saved > np.maximum(limits, limits + excess)[:, None, None]).any(0)
        extra = np.maximum(costs - costs[heads, choice][:, None], 0.0)
        ratio = np.where((helped > 0) & ~over, (extra + 1e-300) / np.maximum(helped, 1e-300), np.inf)
        best = int(np.argmin(ratio))
        if not np.isfinite(ratio.flat[best]):
            return None
        choice[best // costs.shape[1]] = best % costs.shape[1]
    return None


def fill(
    choice: Ints,
    costs: Floats,
    sizes: Ints,
    limits: Ints,
    *,
    grow: bool = False,
    may: Callable[[Ints], npt.NDArray[np.bool_]] | None = None,
) -> Ints:
    """Returns the choice with what it leaves of the limits spent, on the head that gains most for its bytes first.

    With `grow` no head may give up bytes at any length, and one that gains nothing takes more all the same: among equal
    gains for the bytes, the rule that takes most of them comes first. `may` returns which rules heads may take next, bool
    `[heads, rules]`, of the present choice; by default all.
    """
    choice = choice.copy()
    heads = np.arange(len(choice))
    while True:
        left = limits - _used(sizes, choice)
        added = sizes - sizes[:, heads, choice][:, :, None]
        gain = costs[heads, choice][:, None] - costs
        wanted = (gain >= 0) & (added >= 0).all(axis=0) & (added > 0).any(axis=0) if grow else gain > 0
        if may is not None:
            wanted &= may(choice)
        head, rule = np.nonzero(wanted & (added <= left[:, None, None]).all(axis=0))
        if not len(head):
            return choice
        share = (np.maximum(added[:, head, rule], 0) / np.maximum(limits, 1)[:, None]).sum(axis=0)
        worth = gain[head, rule] / np.maximum(share, 1e-12)
        best = int(np.lexsort((share, worth))[-1] if grow else np.argmax(worth))
        choice[head[best]] = rule[best]


def _swap(choice: Ints, costs: Floats, sizes: Ints, limits: Ints, reduced: Floats) -> Ints:
    """Changes two heads at once as long as that lowers the cost, the best pair first.

    `reduced` are the costs with bytes at their prices; the changes that lose least of it are tried.
    """
    choice = choice.copy()
    heads = np.arange(len(choice))
    for _ in range(MAX_SWAPS):
        lost = reduced - reduced[heads, choice][:, None]
        lost[heads, choice] = np.inf
        moves = np.argsort(lost, axis=None, kind="stable")[: min(SWAP_MOVES, lost.size - len(heads))]
        head, rule = np.divmod(moves, costs.shape[1])
        change = costs[head, rule] - costs[head, choice[head]]
        added = sizes[:, head, rule] - sizes[:, head, choice[head]]
        left = limits - _used(sizes, choice)
        fits = (added[:, :, None] + added[:, None, :] <= left[:, None, None]).all(axis=0) & (head[:, None] != head)
        pairs = np.where(fits, change[:, None] + change, np.inf)
        best = int(np.argmin(pairs)) if pairs.size else 0
        if not pairs.size or not pairs.flat[best] < -1e-12 * abs(_total(costs, choice)):
            return choice
        for move in divmod(best, len(moves)):
            choice[head[move]] = rule[move]
    return choice

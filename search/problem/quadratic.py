"""What KV heads do together: a quadratic model of the KL, shrunk towards the sum over heads, and a local search in it.

To second order KL is half the mean square of the *sum* over KV heads of what each moves along a random cotangent; the
surrogate adds up the squares of each alone. The sum knows which heads cancel or add up, but it is estimated from few samples:
alone it overfits, so it is mixed with the surrogate, and a study decides how much of it helps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats, Ints
from moacompress.search.problem.knapsack import Knapsack
from moacompress.search.problem.solver import best_prices
from moacompress.search.sharing.head_groups import HeadGroups

CANDIDATES = 300
"""Changes of one KV head, of least reduced cost, that are tried alone and in pairs."""
MAX_STEPS = 300
MAX_TURNS = 10
"""Times that single KV heads, and all KV heads of one rule, are changed in turn."""


@dataclass(frozen=True)
class Quadratic:
    """The quadratic form of a profile.

    A rule is made of parts, its span and the formats of its keys and values, and moves the sum of what its parts move.

    Attributes:
        rows: what a part on a KV head moves along each cotangent, `[rows, heads, parts]`, heads of all layers in one axis.
            Predicted KL is half the sum over rows of the squared sum over heads.
        parts: the parts of every rule, int64 `[rules, parts of a rule]`; None where every rule is a part of its own.
    """

    rows: Floats
    parts: Ints | None = None

    @staticmethod
    def of(profile: Profile) -> Quadratic:
        """Returns the form of a profile, lengths weighing the same."""
        totals = profile.of_parts("total")  # [samples, draws, layers, kv_heads, parts]
        samples, draws = totals.shape[:2]
        kinds = np.array(profile.sample_kinds)
        weights = np.zeros(samples)
        for kind, weight in profile.kind_weights.items():
            for length in profile.lengths:
                here = (kinds == kind) & (profile.sample_lengths == length)
                lengths = len(set(profile.sample_lengths[kinds == kind].tolist()))
                weights[here] = weight / (lengths * max(1, here.sum()))
        scale = np.sqrt(weights / draws)[:, None, None, None, None]
        rows = (totals * scale).reshape(samples * draws, -1, totals.shape[-1])
        return Quadratic(rows, profile.parts)

    def kl(self, choice: Ints) -> float:
        """Returns the predicted KL of a choice of rules, `[layers, kv_heads]`, in nats."""
        chosen = choice.reshape(-1)
        heads = np.arange(len(chosen))
        return float((self._moved(heads, chosen).sum(axis=1) ** 2).sum() / 2)

    def _parts_of(self, rules: Ints) -> Ints:
        """Returns the parts of rules, `[..., parts of a rule]`."""
        return rules[..., None] if self.parts is None else self.parts[rules]

    def _of_rules(self, of_parts: Floats) -> Floats:
        """Returns sums over the parts of every rule: `[..., parts]` to `[..., rules]`."""
        return of_parts if self.parts is None else of_parts[..., self.parts].sum(axis=-1)

    def _moved(self, heads: Ints, rules: Ints) -> Floats:
        """Returns what rules on KV heads move along each cotangent, `[rows, heads given]`."""
        moved: Floats = self.rows[:, heads[:, None], self._parts_of(rules)].sum(axis=-1)
        return moved

    @cached_property
    def _products(self) -> Floats:
        """Sums over rows of the products of a KV head's parts, `[heads, parts, parts]`."""
        by_head = self.rows.transpose(1, 2, 0)
        products: Floats = by_head @ by_head.transpose(0, 2, 1)
        return products

    @cached_property
    def _squares(self) -> Floats:
        """Sum over rows of the square of what every rule moves, `[heads, rules]`."""
        if self.parts is None:
            return np.diagonal(self._products, axis1=1, axis2=2)
        squares: Floats = self._products[:, self.parts[:, :, None], self.parts[:, None, :]].sum(axis=(2, 3))
        return squares

    def merged(self, groups: HeadGroups) -> Quadratic:
        """Returns the form over groups of KV heads that have one rule: what they move adds up before it is squared."""
        return replace(self, rows=groups.summed(self.rows))

    def changes(self, choice: Ints) -> Floats:
        """Returns the predicted change of KL by every change of one KV head, nats, `[layers, kv_heads, rules]`."""
        return self._changes(choice.reshape(-1)).reshape(*choice.shape, -1)

    def _changes(self, now: Ints) -> Floats:
        """Returns `changes`, `[heads, rules]`.

        With m what a rule moves, s the sum of all KV heads now and c the part of this one, `(s - c) m + m^2 / 2` summed over
        rows, less the same of the present rule.
        """
        heads = np.arange(len(now))
        total = self._moved(heads, now).sum(axis=1)
        own = self._products[heads[:, None], self._parts_of(now)].sum(axis=1)
        found: Floats = self._of_rules(np.tensordot(total, self.rows, axes=1) - own) + self._squares / 2
        return found - found[heads, now][:, None]

    def refined(self, choice: Ints, costs: Floats, share: float, knapsack: Knapsack) -> Ints:
        """Returns a choice within the limits that no change of one KV head, or of two, improves.

        What is lowered is `(1 - share) * costs + share * kl`, from a choice within the limits, `[layers, kv_heads]`; costs are
        predicted KL of every rule alone, or its change, nats, `[layers, kv_heads, rules]`. Where the knapsack limits the number
        of different rules, heads change among those that there are, and all heads of one rule change together, in turn.
        """
        now, classes = self._refined(choice, costs, share, knapsack), knapsack.classes
        if classes is None:
            return now
        for _ in range(MAX_TURNS):
            groups, before = classes.groups(now), now
            of_groups = groups.summed(costs.reshape(-1, costs.shape[-1]))[:, None]
            together = self.merged(groups)._refined(
                groups.gathered(now)[:, None], of_groups, share, knapsack.merged(groups)
            )
            now = self._refined(groups.spread(together[:, 0]), costs, share, knapsack)
            if (now == before).all():
                break
        return now

    def _refined(self, choice: Ints, costs: Floats, share: float, knapsack: Knapsack) -> Ints:
        """Returns what `refined` does by changes of single rows alone."""
        rules = costs.shape[-1]
        alone = costs.reshape(-1, rules)
        sizes = knapsack.sizes.reshape(len(knapsack.limits), -1, rules)
        shares = sizes / np.maximum(knapsack.limits, 1)[:, None, None]
        above = alone - alone.min(axis=1, keepdims=True)
        priced = np.tensordot(best_prices(above, shares)[0], shares, axes=1) if above.any() else np.zeros_like(alone)
        now = choice.reshape(-1).copy()
        heads = np.arange(len(now))
        for _ in range(MAX_STEPS):
            together = self._changes(now)
            change = (1 - share) * (alone - alone[heads, now][:, None]) + share * together
            reduced = change + priced - priced[heads, now][:, None]
            reduced[heads, now] = np.inf
            reduced[~knapsack.may(now, 2)] = np.inf
            count = min(CANDIDATES, int(np.isfinite(reduced).sum()))
            if not count:
                break
            moves = np.argsort(reduced, axis=None, kind="stable")[:count]
            head, rule = np.divmod(moves, rules)
            gain = change[head, rule]
            effect = self._moved(head, rule) - self._moved(head, now[head])
            added = sizes[:, head, rule] - sizes[:, head, now[head]]
            left = knapsack.limits - sizes[:, heads, now].sum(axis=1)
            fits = (added[:, :, None] + added[:, None, :] <= left[:, None, None]).all(axis=0) & (head[:, None] != head)
            pairs = np.where(fits, gain[:, None] + gain + share * effect.T @ effect, np.inf)
            np.fill_diagonal(pairs, np.where((added <= left[:, None]).all(axis=0), gain, np.inf))  # one change alone
            best = int(np.argmin(pairs))
            if not pairs.flat[best] < -1e-9:
                break
            for move in set(divmod(best, len(moves))):
                now[head[move]] = rule[move]
        return now.reshape(choice.shape)

"""The surrogate: what a plan is predicted to do to the model, as a sum over its KV heads.

The profile's influence, made monotone over nested rules: a rule that keeps less is never cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import ArtefactError
from moacompress.rules.formats import NATIVE, all_formats, at_least_as_exact
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import selected, window


@dataclass(frozen=True)
class Surrogate:
    """Predicted KL of every rule on every KV head.

    Attributes:
        rules: candidate rules, the full one first.
        influence: float64 [lengths, layers, kv_heads, rules], nats; 0 for the full rule.
        supersets: bool [rules, rules]; `[a, b]` is whether b keeps everything that a keeps, at every length, and as exactly.
    """

    rules: tuple[Rule, ...]
    influence: Floats
    supersets: npt.NDArray[np.bool_]

    @staticmethod
    def build(influence: Floats, rules: Sequence[Rule], min_window: int, max_length: int) -> Surrogate:
        """Returns the surrogate of a profile's influence, `[lengths, layers, kv_heads, rules]`, nats.

        `rules[0]` is the full one. Nesting of rules is judged up to the longest profiled length.

        Raises:
            ArtefactError: the influence holds NaN, infinity or negative numbers.
        """
        if not (np.isfinite(influence).all() and (influence >= 0).all()):
            raise ArtefactError("the profile's influence holds numbers that are not finite or negative; profile again")
        influence = np.array(influence, np.float64)
        influence[..., [rule.is_full for rule in rules]] = 0.0
        return Surrogate(tuple(rules), influence, nested(rules, min_window, max_length))

    def costs(self, length_weights: npt.ArrayLike | None = None, precision: float = 1.0) -> Floats:
        """Returns predicted KL in nats, a mean over lengths, [layers, kv_heads, rules].

        Lengths weigh the same by default. What formats cost counts `precision` times as much, beside what spans cost.
        """
        weights = np.ones(len(self.influence)) if length_weights is None else np.asarray(length_weights, np.float64)
        found = np.tensordot(weights / weights.sum(), self.influence, axes=1)
        if precision != 1:
            found = found + (precision - 1) * found[..., self._at_full_span]
        return monotone(found, self.supersets)

    @cached_property
    def _at_full_span(self) -> Ints:
        """The rule with every rule's formats that sees everything, [rules]: what it costs, the formats cost alone."""
        number = {(rule.key_format, rule.value_format): at for at, rule in enumerate(self.rules) if rule.sees_all}
        return np.array([number[rule.key_format, rule.value_format] for rule in self.rules], np.int64)

    def predicted(self, plan: Plan) -> float | None:
        """Returns the predicted KL of a plan in nats, or None where a rule of it is no candidate."""
        index = {rule: number for number, rule in enumerate(self.rules)}
        choice = [[index.get(rule, -1) for rule in row] for row in plan.rules]
        if any(number < 0 for row in choice for number in row):
            return None
        return float(np.take_along_axis(self.costs(), np.array(choice)[..., None], axis=-1).sum())


def nested(rules: Sequence[Rule], min_window: int, max_length: int) -> npt.NDArray[np.bool_]:
    """Returns `[a, b]`: rule b keeps at least the keys that rule a keeps, for every n up to `max_length`, and as exactly."""
    spans = list(dict.fromkeys(rule.in_formats(NATIVE, NATIVE) for rule in rules))
    n: Ints = np.unique(np.linspace(1, max_length, min(max_length, 4096)).astype(np.int64))
    table = RuleTable.of(spans, min_window)
    sink, alpha, beta_q = table.span[:3]
    # what a gate keeps of the tokens that have left a wider window it kept when they were fewer
    windows, chosen = window(n[:, None], alpha, beta_q, min_window), selected(n[:, None], *table.select)
    within = np.stack(
        [((windows[:, [a]] <= windows) & (chosen[:, [a]] <= chosen)).all(axis=0) for a in range(len(spans))]
    )
    full = np.array([span.sees_all for span in spans])
    alike = (sink[:, None] == sink) | (chosen == 0).all(axis=0)[:, None]  # or it is another choice
    keeps = within & (sink[:, None] <= sink) & alike | full
    formats = all_formats()
    exact = np.array([[at_least_as_exact(other, name) for other in formats] for name in formats])
    number = {name: at for at, name in enumerate(formats)}
    span, keys, values = np.array(
        [
            (spans.index(rule.in_formats(NATIVE, NATIVE)), number[rule.key_format], number[rule.value_format])
            for rule in rules
        ]
    ).T
    supersets: npt.NDArray[np.bool_] = (
        keeps[np.ix_(span, span)] & exact[np.ix_(keys, keys)] & exact[np.ix_(values, values)]
    )
    return supersets


def monotone(influence: Floats, supersets: npt.NDArray[np.bool_]) -> Floats:
    """Returns the running maximum from full down: a rule costs at least what any rule that keeps more costs.

    Influence is `[..., rules]`; every rule is a superset of itself.
    """
    return np.stack([influence[..., row].max(axis=-1) for row in supersets], axis=-1)

"""Searching for those who will heal: of the KL of copies, measured KL counts what healing is assumed to leave."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moacompress.rules.plan import Plan

if TYPE_CHECKING:
    from moacompress.search.measure.objective import Measure, SampleKl

Left = Callable[[Plan], float]
"""Share of a plan's measured KL that healing is assumed to leave, in (0, 1]."""


def healed_share(factor: float, copies: float, rest: float) -> float:
    """Returns the share of a plan's KL that healing leaves, where it leaves `factor` of that of the copies.

    What a plan measures is not told apart by what does it, so it is divided as it was predicted.

    Args:
        factor: share of the copies' KL that is left, in (0, 1].
        copies: predicted KL of the copies, unhealed, nats.
        rest: predicted KL of everything else, nats.
    """
    total = copies + rest
    return 1.0 if total <= 0 else (factor * copies + rest) / total


@dataclass(frozen=True)
class HealedMeasure:
    """A measure whose KLs are those that healing is assumed to leave.

    Attributes:
        measure: of the model as it is.
        left: of every plan.
    """

    measure: Measure
    left: Left

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.measure.size

    @contextmanager
    def under(self, plan: Plan) -> Iterator[SampleKl]:
        """Yields the KL of single samples under a plan, as it is assumed to be after healing."""
        left = self.left(plan)
        with self.measure.under(plan) as kl:
            yield lambda number: left * kl(number)

    def many(self, number: int, plans: Sequence[Plan], base: Plan) -> Generator[float, None, None]:
        """Yields the KLs of several plans on one sample, each as it is assumed to be after healing."""
        with closing(self.measure.many(number, plans, base)) as kls:
            for plan, kl in zip(plans, kls, strict=True):
                yield self.left(plan) * kl

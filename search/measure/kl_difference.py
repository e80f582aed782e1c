"""How two plans are compared: the difference of their mean KL, paired by sample.

Mean KL is what a user loses. What looks best of many noisy numbers is usually less good, so a plan replaces another one only
where it is lower by some standard errors of the paired difference. Optuna alone is told the mean log-ratio of a trial (see
`trials.log_ratio`), with which a pruned trial has a value too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moacompress.core.statistics import SIGNIFICANT, mean, p_value_of_chosen, standard_error

CAUTION = 2.0
"""Standard errors by which a trial must be lower to replace trial 0. A trial that was lower by 1.3 of them on 28
samples was higher on others."""


@dataclass(frozen=True)
class KlDifference:
    """The mean KL of a plan less that of another one on the same samples; below 0 the plan is better.

    Attributes:
        value: nats.
        standard_error: of the mean of the paired differences, nats; None for a single sample.
        ci95: 95% interval of `value`, nats; None where there are too few samples for one.
        samples: how many there are.
        p: p-value of both plans being alike, by a permutation test of the paired differences. It allows for the plan having
            been chosen as the lowest of `candidates` on these samples; the interval does not.
        candidates: plans that this one was chosen among, itself included.
    """

    value: float
    standard_error: float | None
    ci95: tuple[float, float] | None
    samples: int
    p: float
    candidates: int = 1

    @staticmethod
    def of(kls: Sequence[float], others: Sequence[float], among: Iterable[Sequence[float]] = ()) -> KlDifference:
        """Compares KLs in nats, in the order of the same samples; the shorter list decides how many samples there are.

        `among` are those of the plans that this one was chosen among as the lowest; those measured on fewer samples, and
        itself, do not count.
        """
        n = min(len(kls), len(others))
        value, interval = mean(apart := np.subtract(kls[:n], others[:n]).tolist())
        rest = [list(one) for one in among if len(one) == n and list(one) != list(kls)]
        # a plan that is higher was chosen in spite of it
        p = p_value_of_chosen(kls[:n], rest if value < 0 else (), others[:n])
        return KlDifference(value, standard_error(apart), interval, n, p, 1 + len(rest))

    @property
    def verdict(self) -> str:
        """Whether the plan is `better` or `worse`, which a test has to say, or `alike`."""
        if self.p >= SIGNIFICANT:
            return "alike"
        return "better" if self.value < 0 else "worse"

    def is_lower(self, caution: float = CAUTION) -> bool:
        """Returns whether the plan is lower by so many standard errors; of a single sample that is never known."""
        if not caution:
            return self.value < 0
        return self.standard_error is not None and self.value + caution * self.standard_error < 0

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {**asdict(self), "ci95": None if self.ci95 is None else list(self.ci95)}

"""How two plans are compared: the difference of their mean KL, paired by sample.

Mean KL is what a user loses. What looks best of many noisy numbers is usually less good, so a plan replaces another one only
where it is lower by some standard errors of the paired difference. Optuna alone is told the mean log-ratio of a trial (see
`trials.log_ratio`), with which a pruned trial has a value too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moacompress.core.statistics import SIGNIFICANT, mean, p_value, standard_error

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
        p: p-value of both plans being alike, by a permutation test of the paired differences.
    """

    value: float
    standard_error: float | None
    ci95: tuple[float, float] | None
    samples: int
    p: float

    @staticmethod
    def of(kls: Sequence[float], others: Sequence[float]) -> KlDifference:
        """Compares KLs in nats, in the order of the same samples; the shorter list decides how many."""
        paired = [kl - other for kl, other in zip(kls, others, strict=False)]
        value, interval = mean(paired)
        p = p_value(paired, [0.0] * len(paired))
        return KlDifference(value, standard_error(paired), interval, len(paired), p)

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

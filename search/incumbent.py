"""The incumbent of a search: the best plan so far, which every step takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moacompress.rules.plan import Plan
from moacompress.search.measure.trials import Tried
from moacompress.search.result.search_result import unpack

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile
    from moacompress.search.problem.quadratic import Quadratic


@dataclass(frozen=True)
class Incumbent:
    """The best plan so far.

    Attributes:
        plan: the plan, without notes.
        kls: nats, in the order of the shuffled samples; empty where it is not measured yet.
        value: mean log-ratio to trial 0.
        stage: what it comes from.
        form: predicts changes of KL around the plan, or around the one that it was made from; None where no step has
            profiled the model under it.
    """

    plan: Plan
    kls: list[float]
    value: float
    stage: str
    form: Quadratic | None = None

    @staticmethod
    def of(trial: Tried, profile: Profile) -> Incumbent:
        """Returns the plan of a trial."""
        plan = unpack(trial.plan, profile)
        return Incumbent(plan, trial.kls, trial.value, f"trial {trial.index}")

    @property
    def kl(self) -> float:
        """Mean KL, nats."""
        return float(np.mean(self.kls))

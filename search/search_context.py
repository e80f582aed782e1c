"""What the steps of a search work with: it is made once, before the first of them, and is all that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from moacompress.core.arrays import Floats
from moacompress.core.progress import Progress
from moacompress.rules.plan import Plan
from moacompress.search.alternatives import Alternative
from moacompress.search.around import Around
from moacompress.search.deadline import Deadline
from moacompress.search.explain import Stage
from moacompress.search.harm_meter import HarmMeter
from moacompress.search.knobs import distributions
from moacompress.search.ledger import Ledger
from moacompress.search.objective import Measure
from moacompress.search.search_request import Knob, SearchRequest
from moacompress.search.search_result import pack
from moacompress.search.standing import Standing
from moacompress.search.surrogate import Surrogate
from moacompress.search.trials import Tried, log_ratio, noise


@dataclass
class SearchContext:
    """What every step may use.

    Attributes:
        request: what is asked for.
        storage: of the search's studies, as that of a `Ledger`.
        name: of the study; those of single steps go on from it.
        meter: measures plans on validation samples, at most once each.
        surrogate: not yet calibrated where no step has run.
        alternatives: the best plan of every family of baselines that is measured, by family.
        around: profiles around a plan; None where neither rounds nor moves are wanted.
        trainer: the model on calibration samples, for choosing moves; None likewise.
        out: where the best plan is written, or None.
        deadline: when to stop.
        progress: told of every measurement.
        tried: finished trials of the study, which keeps them here; the others are compared with the first, trial 0.
        stages: what was tried so far, for the explanation.
    """

    request: SearchRequest
    storage: str | None
    name: str
    meter: HarmMeter
    surrogate: Surrogate
    alternatives: dict[str, Alternative]
    around: Around | None
    trainer: Measure | None
    out: Path | None
    deadline: Deadline
    progress: Progress
    tried: list[Tried] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    @property
    def reference(self) -> list[float]:
        """Harms of trial 0, nats, in the order of the shuffled samples: what the value of a plan is relative to."""
        return self.tried[0].harms

    def plan_of(self, knobs: Knob) -> Plan:
        """Returns the plan of a trial: see `SearchRequest.plan`.

        Args:
            knobs: values of the study's knobs.
        """
        return self.request.plan(self.surrogate, knobs)

    def start(self) -> Standing:
        """Returns the surrogate's own plan: what a search begins with. It is not measured yet."""
        return Standing(self.plan_of(self.request.knobs.neutral), [], 0.0, "trial 0")

    def measured(self, standing: Standing, plan: Plan, stage: str) -> Standing:
        """Returns a plan that was made from another one, measured on all validation samples.

        Args:
            standing: what it was made from.
            plan: the plan.
            stage: what it comes from.
        """
        return self.compared(standing, plan, self.meter.harms("improved", plan, self.meter.order), stage)

    def compared(self, standing: Standing, plan: Plan, harms: list[float], stage: str) -> Standing:
        """Returns a plan that is measured already; see `measured`.

        Args:
            standing: what it was made from.
            plan: the plan.
            harms: nats, in the order of the shuffled samples.
            stage: what it comes from.
        """
        return replace(standing, plan=plan, harms=harms, value=log_ratio(harms, self.reference), stage=stage)

    def add_stage(
        self, name: str, standing: Standing, kept: bool, rival: Sequence[float] = (), caution: float = 0.0
    ) -> None:
        """Notes what was tried for the explanation.

        Args:
            name: what it was.
            standing: the plan that it came to.
            kept: whether that became the best one.
            rival: harms of the plan that it had to beat; none for the first.
            caution: standard errors of the gain that it had to be better by.
        """
        gain = log_ratio(standing.harms, rival) if rival else None
        least = noise(standing.harms, rival, caution) if rival else None
        self.stages.append(
            Stage(name, standing.harm, standing.value, kept, pack(standing.plan), gain=gain, noise=least)
        )

    def changes(self, standing: Standing) -> Floats:
        """Returns the predicted change of harm by every change of one row of the plan's knapsack, nats, the rules last.

        It is that of the form around the plan, or else that of the surrogate with what the profile says of KV heads together;
        then only differences between the rules of a row count.

        Args:
            standing: the plan that is to be changed.
        """
        space = self.request.space(standing.plan.shares)
        choice = space.choice(standing.plan)
        if standing.form is not None:
            return space.form(standing.form).changes(choice)
        costs, form = space.costs(self.surrogate.costs()), self.request.quadratic
        if form is None:
            return costs
        return costs - np.take_along_axis(costs, choice[..., None], axis=-1) + space.form(form).changes(choice)

    def ledger_of(
        self, suffix: str, ranges: Mapping[str, tuple[float, float]], neutral: Knob, starts: Sequence[Knob]
    ) -> Ledger:
        """Returns the ledger of a small study within a step; it goes where the search's own is.

        Args:
            suffix: its name after the search's, such as the key of a plan.
            ranges: each knob's smallest and largest value.
            neutral: knobs of its trial 0.
            starts: knobs that are tried right after.
        """
        profile, seed = self.request.profile, self.request.recipe.seed
        name = f"{self.name}-{suffix}"
        return Ledger(self.storage, name, profile.fingerprint, distributions(ranges), neutral, seed, starts)


Step: TypeAlias = Callable[[Standing, SearchContext], Standing]
"""Takes the best plan so far and returns the best after it, which may be the same."""

"""What the steps of a search work with: the best plan so far, which each takes and returns, and all that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from moacompress.core.progress import Progress
from moacompress.rules.plan import Plan
from moacompress.search.deadline import Deadline
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.packed_plan import pack, unpack
from moacompress.search.measure.plan_evaluator import MeasuredPlan, PlanEvaluator
from moacompress.search.measure.trials import TrialResult
from moacompress.search.result.explain import Stage
from moacompress.search.search_request import SearchRequest

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile


@dataclass(frozen=True)
class Incumbent(MeasuredPlan):
    """The best plan so far; it has no notes, and no KLs where it is not measured yet.

    Attributes:
        stage: what it comes from.
    """

    stage: str

    @staticmethod
    def of(trial: TrialResult, profile: Profile) -> Incumbent:
        """Returns the plan of a trial."""
        return Incumbent(unpack(trial.plan, profile), trial.kls, f"trial {trial.index}")


@dataclass
class SearchContext:
    """What every step may use.

    Attributes:
        request: what is asked for.
        evaluator: measures plans on validation samples, at most once each.
        out: where this worker writes the best plan; None for nowhere, or where another worker does.
        deadline: when to stop.
        progress: told of every measurement.
        measured_baselines: the best plan of every family of baselines that is measured, by family.
        tried: finished trials of the study, which keeps them here; the others are compared with the first, trial 0.
        stages: what was tried so far, for the explanation.
        class_cost: what the limit of classes costs, see `class_quality`; None where there is none, or it is not measured yet.
    """

    request: SearchRequest
    evaluator: PlanEvaluator
    out: Path | None
    deadline: Deadline
    progress: Progress
    measured_baselines: dict[str, MeasuredPlan] = field(default_factory=dict)
    tried: list[TrialResult] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    class_cost: dict[str, Any] | None = None

    def start(self) -> Incumbent:
        """Returns the surrogate's own plan: what a search begins with. It is not measured yet."""
        return Incumbent(self.request.plan(self.request.parameters.neutral), [], "trial 0")

    def measured(self, incumbent: Incumbent, plan: Plan, stage: str) -> Incumbent:
        """Returns a plan that was made from the incumbent, measured on all validation samples."""
        kls = self.evaluator.shown("improved", plan, f"measuring the plan of {stage}")
        return replace(incumbent, plan=plan, kls=kls, stage=stage)

    def add_stage(
        self,
        name: str,
        incumbent: Incumbent,
        kept: bool,
        reference: Sequence[float] = (),
        tried: Sequence[TrialResult] = (),
    ) -> None:
        """Notes what was tried for the explanation.

        Args:
            name: what it was.
            incumbent: the plan that it came to.
            kept: whether that became the best one.
            reference: KLs of the plan that it had to beat; none for the first.
            tried: the trials that it was chosen among, the reference's first; none where it is the only one.
        """
        among = [trial.kls for trial in tried[1:] if not trial.pruned]
        difference = KlDifference.of(incumbent.kls, reference, among) if reference else None
        self.stages.append(Stage(name, incumbent.kls, kept, pack(incumbent.plan), difference))

    @property
    def candidates(self) -> list[list[float]]:
        """KLs of the plans that were measured on all samples, in their order: the best plan is chosen among them."""
        return [trial.kls for trial in self.tried if not trial.pruned] + [stage.kls for stage in self.stages]


Step: TypeAlias = Callable[[Incumbent, SearchContext], Incumbent]
"""Takes the best plan so far and returns the best after it, which may be the same."""

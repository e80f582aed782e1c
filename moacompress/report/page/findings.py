"""All that is known of a plan: the plan itself, and what other commands left beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import (
    AUDIT_FILE,
    BENCH_FILE,
    DEMO_FILE,
    EVALUATION_FILE,
    MODEL_FOLDER,
    PLAN_FILE,
    PROFILE_FOLDER,
    REPORT_FILE,
    SUMMARY_FILE,
    explanation_file,
    front_file,
)
from moacompress.core.errors import ArtefactError, MoaCompressError
from moacompress.core.files import read_json
from moacompress.exporter.exporting import unrepaired
from moacompress.models.stored_plan import read_plan
from moacompress.rules.budget import Budget, reference_length
from moacompress.rules.plan import Plan

Finding = Mapping[str, Any]


@dataclass(frozen=True)
class Findings:
    """What is known of a plan.

    Attributes:
        folder: where the run is, to be written in commands.
        plan: the plan.
        profile: it was made from; None where it is not there.
        explanation: of the search.
        evaluation: of the checkpoint.
        bench: of the checkpoint.
        summary: of the run.
        audit: of the profile.
        front: plans of other budgets, from the same search.
        passed_over: files that are there and were not taken, with the reason.
    """

    folder: Path
    plan: Plan
    profile: Profile | None = None
    explanation: Finding | None = None
    evaluation: Finding | None = None
    bench: Finding | None = None
    summary: Finding | None = None
    audit: Finding | None = None
    front: Finding | None = None
    passed_over: list[str] = field(default_factory=list)

    @property
    def reference(self) -> int:
        """The reference length, tokens."""
        asked = [Budget.parse(text) for text in self.plan.budget.get("asked", [])]
        return reference_length(asked, self.plan.profiled_lengths)

    @property
    def model_name(self) -> str:
        """Name of the dense model, without where it lay."""
        demo = self.folder / DEMO_FILE
        if demo.is_file():
            return str(read_json(demo, DEMO_FILE).get("name", "the demo's model")).removesuffix(".gguf")
        return str(self.plan.provenance.get("source", "a model")).rstrip("/").rsplit("/", 1)[-1]

    @staticmethod
    def load(plan_file: Path, profile: Path | None = None) -> Findings:
        """Reads a plan and what lies beside it.

        Args:
            plan_file: in a run's folder, in its `model` folder, or somewhere else.
            profile: of the dense model; by default the one in the run's folder.

        Raises:
            PlanError: the plan cannot be read, or is not the one that the checkpoint in that folder runs.
            ArtefactError: a file is damaged, or the profile that was named is not the plan's.
        """
        folder = plan_file.parent
        if folder.name == MODEL_FOLDER and (folder.parent / PLAN_FILE).is_file():
            folder = folder.parent
        plan, passed = read_plan(plan_file), list[str]()
        searched = unrepaired(plan).key()

        def read(path: Path, belongs: Callable[[Finding], bool] = lambda found: True) -> Finding | None:
            if not path.is_file():
                return None
            found = read_json(path, path.name)
            if not isinstance(found, dict):
                raise ArtefactError(f"{path} is no JSON object")
            try:
                if belongs(found):
                    return found
            except (KeyError, TypeError) as error:
                raise ArtefactError(f"{path} is not what its name says: {error} is missing") from error
            passed.append(f"{path.name} is of another plan")
            return None

        return Findings(
            folder=folder,
            plan=plan,
            profile=_profile(folder, plan, profile, passed),
            explanation=_of_plan(plan_file.parent, folder, searched, passed),
            evaluation=read(folder / EVALUATION_FILE, lambda found: found["checkpoint"]["plan"] == plan.key()),
            bench=read(folder / BENCH_FILE, lambda found: found["configuration"]["plan"] == plan.key()),
            summary=read(folder / SUMMARY_FILE),
            audit=read(
                (profile or folder / PROFILE_FOLDER) / AUDIT_FILE,
                lambda found: found["profile"] == plan.provenance.get("profile"),
            ),
            front=_front(plan_file),
            passed_over=passed,
        )


def _of_plan(near: Path, folder: Path, key: str, passed: list[str]) -> Finding | None:
    """Returns the notes of the search that found a plan: those of its key, whatever the plan's file is called."""
    files = sorted({file for place in (near, folder) for file in place.glob(explanation_file(Path("*.json")).name)})
    for file in files:
        found = read_json(file, file.name)
        if isinstance(found, dict) and found.get("plan") == key:
            return found
    if files:
        passed.append(f"{files[0].name} is of another plan")
    return None


def _front(plan_file: Path) -> Finding | None:
    """Returns the front that lists a plan's file; None where none does."""
    for file in sorted(plan_file.parent.glob(front_file(Path("*.json")).name)):
        found = read_json(file, file.name)
        if isinstance(found, dict) and any(point["plan"] == plan_file.name for point in found["points"]):
            return found
    return None


def _profile(folder: Path, plan: Plan, given: Path | None, passed: list[str]) -> Profile | None:
    """Returns the profile that a plan was made from; None, with the reason in `passed`, where another one lies there."""
    path = given or folder / PROFILE_FOLDER
    if not path.is_dir():
        if given is not None:
            raise ArtefactError(f"{path} does not exist; give the folder that `moacompress profile` filled")
        return None
    try:
        profile = Profile.load(path)
    except MoaCompressError:
        if given is not None:
            raise
        passed.append(f"{path.name} cannot be read")
        return None
    wanted = plan.provenance.get("profile")
    if wanted is not None and profile.fingerprint != wanted:
        if given is not None:
            raise ArtefactError(f"{path} is the profile {profile.fingerprint}, and the plan was made from {wanted}")
        passed.append(f"{path.name} is not what the plan was made from")
        return None
    return profile


def report_file(findings: Findings) -> Path:
    """Returns where the page of a run goes by default."""
    return findings.folder / REPORT_FILE

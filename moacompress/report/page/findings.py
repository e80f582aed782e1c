"""All that is known of a plan: the plan itself, and what other commands left beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    SUMMARY_FILE,
    explanation_file,
    front_file,
)
from moacompress.core.errors import ArtefactError, MoaCompressError
from moacompress.core.files import read_json
from moacompress.exporter.exporting import unrepaired
from moacompress.models.source import is_compressed
from moacompress.models.stored_plan import read_plan, stored_plan
from moacompress.rules.budget import Budget, reference_length
from moacompress.rules.plan import Plan
from moacompress.rules.untrusted import WRONG_FORM, short

Finding = Mapping[str, Any]
EXPLANATIONS, FRONTS = explanation_file(Path("*.json")).name, front_file(Path("*.json")).name
"""Patterns of the names of files that are known by what they hold."""


@contextmanager
def reading_file(name: str) -> Iterator[None]:
    """Says in one sentence that a file beside a plan is not of the form that its name promises.

    Raises:
        ArtefactError: the block found something else than it wanted.
    """
    try:
        yield
    except WRONG_FORM as error:
        why = short(f"{type(error).__name__}: {error}")
        raise ArtefactError(f"{name} is not what its name says ({why}); make it again, or move it away") from error


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
        file: the plan was read from.
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
    file: Path = Path(PLAN_FILE)

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before any number, one sentence each."""
        if self.evaluation is None or not self.evaluation["checkpoint"].get("other_weights"):
            return []
        return [
            f"The weights that were evaluated are not those that the plan was made for: {EVALUATION_FILE} has the fingerprint "
            f"{self.evaluation['checkpoint'].get('weights')}, the plan {self.plan.model.weights_fingerprint}."
        ]

    @property
    def reference(self) -> int:
        """The reference length, tokens."""
        asked = [Budget.parse(text) for text in self.plan.budget.get("asked", [])]
        return reference_length(asked, self.plan.profiled_lengths)

    @property
    def model_name(self) -> str:
        """Name of the dense model, without where it lay.

        Raises:
            ArtefactError: the demo's file is damaged.
        """
        demo = self.folder / DEMO_FILE
        if demo.is_file():
            with reading_file(DEMO_FILE):
                return str(read_json(demo, DEMO_FILE).get("name", "the demo's model")).removesuffix(".gguf")
        return str(self.plan.provenance.get("source", "a model")).rstrip("/").rsplit("/", 1)[-1]

    @staticmethod
    def load(plan_file: Path, profile: Path | None = None) -> Findings:
        """Reads a plan, in a run's folder, in its `model` folder or somewhere else, and what is beside it.

        The profile is by default the one in the run's folder.

        Raises:
            PlanError: the plan cannot be read, or is not the one that the checkpoint in that folder runs.
            ArtefactError: a file is damaged, or the profile that was named is not the plan's.
        """
        folder = plan_file.parent
        if folder.name == MODEL_FOLDER and (folder.parent / PLAN_FILE).is_file():
            folder = folder.parent
        plan, passed = read_plan(plan_file), list[str]()
        key, searched = plan.key(), unrepaired(plan).key()
        replaced = _replaced_weights(folder, plan)

        def read(path: Path, belongs: Callable[[Finding], bool]) -> Finding | None:
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

        evaluation = read(folder / EVALUATION_FILE, lambda found: found["checkpoint"]["plan"] == key)
        if evaluation is not None and evaluation["checkpoint"].get("weights") in replaced:
            passed.append(f"{EVALUATION_FILE} is of weights that the checkpoint no longer has")
            evaluation = None
        return Findings(
            folder=folder,
            plan=plan,
            profile=_profile(folder, plan, profile, passed),
            explanation=_of_plan(plan_file.parent, folder, searched, passed),
            evaluation=evaluation,
            bench=read(folder / BENCH_FILE, lambda found: found["configuration"]["plan"] == key),
            summary=read(folder / SUMMARY_FILE, lambda found: found.get("plan", key) == key),
            audit=read(
                (profile or folder / PROFILE_FOLDER) / AUDIT_FILE,
                lambda found: found["profile"] == plan.provenance.get("profile"),
            ),
            front=_front(plan_file, passed),
            passed_over=passed,
            file=plan_file,
        )


def _of_plan(near: Path, folder: Path, key: str, passed: list[str]) -> Finding | None:
    """Returns the notes of the search that found a plan: those of its key, whatever the plan's file is called."""
    others = []
    for file, found in _readable({file for place in (near, folder) for file in place.glob(EXPLANATIONS)}, passed):
        if found.get("plan") == key:
            return found
        others.append(file.name)
    if others:
        passed.append(f"{others[0]} is of another plan")
    return None


def _front(plan_file: Path, passed: list[str]) -> Finding | None:
    """Returns the front that lists a plan's file; None where none does."""
    for file, found in _readable(plan_file.parent.glob(FRONTS), passed):
        try:
            if any(point["plan"] == plan_file.name for point in found["points"]):
                return found
        except (KeyError, TypeError):
            passed.append(f"{file.name} lists no plans")
    return None


def _readable(files: Iterable[Path], passed: list[str]) -> Iterator[tuple[Path, Finding]]:
    """Yields the JSON objects of files in the order of their names; what is none is named in `passed`."""
    for file in sorted(files):
        try:
            found = read_json(file, file.name)
        except ArtefactError:
            found = None
        if isinstance(found, dict):
            yield file, found
        else:
            passed.append(f"{file.name} cannot be read")


def _replaced_weights(folder: Path, plan: Plan) -> list[str]:
    """Returns fingerprints of weights that the checkpoint of a run under a plan no longer has, as far as its notes tell."""
    try:
        model = next((place for place in (folder / MODEL_FOLDER, folder) if is_compressed(place)), None)
        stored = None if model is None else stored_plan(model)
    except MoaCompressError:  # no checkpoint that could have been evaluated as it is
        return []
    if stored is None or stored.key() != plan.key():
        return []
    replaced = [stored.model.weights_fingerprint] if stored.changed_weights else []
    heal = stored.provenance.get("heal")
    if isinstance(heal, dict) and heal.get("improved") and heal.get("train") != "gates":
        replaced.append(str(heal.get("from_weights")))
    return replaced


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

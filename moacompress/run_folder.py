"""The folder of a run: whose it is, what in it may be removed, and how long its steps took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from moacompress.calibration.profile.folder import clear_profile
from moacompress.calibration.profile.manifest import is_profile
from moacompress.core.artefact_names import (
    BENCH_FILE,
    DEMO_FILE,
    EVALUATION_FILE,
    MANIFEST_FILE,
    MODEL_FOLDER,
    PLAN_FILE,
    PROFILE_FOLDER,
    RECIPE_FILE,
    SECONDS_FILE,
    SUMMARY_FILE,
    of_compress,
    of_demo,
)
from moacompress.core.errors import ArtefactError, RecipeError
from moacompress.core.files import holds_something, is_within, read_json, remove, sweep_files, sweep_folders, write_json
from moacompress.core.lock_holders import own_file, own_folder
from moacompress.core.progress import Progress
from moacompress.models.source import is_compressed
from moacompress.recipe import Recipe
from moacompress.search.baselines.measured import check_baselines

Result = TypeVar("Result")


def inputs_of(recipe: Recipe) -> list[str]:
    """Returns what a run reads, where these are files or folders."""
    calibration = recipe.calibration
    paths = [source.path for source in calibration.sources]
    named = [recipe.model, calibration.text, *paths]
    return [name for name in named if name and Path(name).exists()]


def clear_run(out: Path, inputs: Iterable[str | Path]) -> None:
    """Removes all that a run left in a folder that this process owns, and nothing else; the next run reads the `inputs`.

    Raises:
        ArtefactError: a folder has the name of one of a run's, and none left it; one of the inputs would go too; or another
            process is at work on something in `out`.
    """
    profile = out / PROFILE_FOLDER
    going = refuse_foreign(out, inputs)
    with ExitStack() as owned:
        for name in (PLAN_FILE, EVALUATION_FILE, BENCH_FILE):
            owned.enter_context(own_file(out / name))
        if profile.exists():
            owned.enter_context(own_folder(profile))
            clear_profile(profile)
        for path in going:
            sweep_files(path)
            sweep_folders(path)
        remove([path for path in going if path.parent != profile])
    with suppress(OSError):  # there are other files in it
        profile.rmdir()


def refuse_foreign(out: Path, inputs: Iterable[str | Path]) -> list[Path]:
    """Returns all that a run leaves in a folder, where it may be removed; the next run reads the `inputs`.

    Raises:
        ArtefactError: a folder has the name of one of a run's, and none left it; or one of the inputs would go too.
    """
    profile = out / PROFILE_FOLDER
    going = [*of_compress(out), *(of_demo(out) if (out / DEMO_FILE).exists() else ())]
    for folder, is_ours in ((profile, is_profile), (out / MODEL_FOLDER, is_compressed)):
        # not even with --overwrite: a mistyped folder must not cost somebody's files
        if holds_something(folder) and not is_ours(folder):
            raise ArtefactError(f"{folder} exists already and no run left it; choose another folder for the run")
    check_baselines(out / PLAN_FILE)
    held = [path for path in going if path.exists() and not is_within(path, profile) and path != out / MODEL_FOLDER]
    if held and not (_is_begun(out / RECIPE_FILE) or (out / DEMO_FILE).exists()):
        raise ArtefactError(f"{held[0]} exists already and no run left it; choose another folder for the run")
    for name in inputs:
        for path in going:
            if is_within(name, path):
                raise ArtefactError(f"{name} would be removed with {path}; choose another folder for the run")
    return going


def check_place(out: Path, recipe: Recipe, from_scratch: bool) -> None:
    """Refuses a folder that holds another run, or with `from_scratch` one with files that no run left; nothing is changed.

    A run that failed before its first step left nothing that is missed.

    Raises:
        ArtefactError: it does.
    """
    if from_scratch:
        refuse_foreign(out, inputs_of(recipe))
    elif not _is_of(out, recipe):
        mark = out / RECIPE_FILE
        empty = (mark, out / SECONDS_FILE) if _is_begun(mark) else ()
        refuse_held(out, [path for path in of_compress(out) if path not in empty])


def begin_run(out: Path, recipe: Recipe, from_scratch: bool) -> None:
    """Makes a folder that `check_place` has let pass, and that this process owns, this run's."""
    if from_scratch:
        clear_run(out, inputs_of(recipe))
    for name in (RECIPE_FILE, SECONDS_FILE, SUMMARY_FILE):
        sweep_files(out / name)
    sweep_folders(out / MODEL_FOLDER)
    if not _is_of(out, recipe):
        remove([out / SECONDS_FILE])
        write_json(out / RECIPE_FILE, recipe.resolved())


def _is_of(out: Path, recipe: Recipe) -> bool:
    """Whether a folder is that of this very run; a key that the version which wrote its recipe did not know has its default.

    One whose recipe cannot be read is of another.
    """
    mark = out / RECIPE_FILE
    with suppress(RecipeError):
        # as it was written: without the password of the search's storage
        return mark.exists() and Recipe.from_dict(read_json(mark, "recipe")).resolved() == recipe.resolved()
    return False


def _is_begun(mark: Path) -> bool:
    """Whether a file is the recipe that a run leaves in its folder."""
    found = read_json(mark, "recipe") if mark.exists() else None
    return isinstance(found, dict) and {"model", "budget", "calibration"} <= found.keys()


def refuse_held(out: Path, paths: Iterable[Path]) -> None:
    """Refuses a folder that holds something of another run.

    Raises:
        ArtefactError: one of the paths is there. The manifest alone is no profile yet: `profile` says whether it may make one.
    """
    for path in paths:
        if path.exists() and path.name != MANIFEST_FILE:
            raise ArtefactError(
                f"{out} holds another run ({path.relative_to(out)}); choose another folder or pass --overwrite"
            )


class StepClock:
    """Begins each step's stage, and keeps its seconds on disk, so that a resumed run reports what the work took in all."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path, self._progress = path, progress
        found = read_json(path, "seconds") if path.exists() else {}
        if not isinstance(found, dict) or not all(isinstance(spent, int | float) for spent in found.values()):
            raise ArtefactError(f"{path} does not say what steps took; move it away, and they count from now on")
        self.seconds: dict[str, float] = found

    def run(self, step: str, work: Callable[[], Result]) -> Result:
        """Returns what a step's work returns."""
        self._progress.stage(step)
        begun = time.perf_counter()
        before = self.seconds.get(step, 0.0)
        try:
            return work()
        finally:
            self.seconds[step] = round(before + time.perf_counter() - begun, 1)
            write_json(self._path, self.seconds)

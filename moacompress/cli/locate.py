"""Where the artefacts of a run lie: verbs that take DIR accept the exported folder, or the run's folder around it."""

from __future__ import annotations

from pathlib import Path

from moacompress.errors import ArtefactError


def find_model_folder(path: Path) -> Path:
    """Returns the compressed checkpoint at `path` or in `path/model`.

    Raises:
        ArtefactError: there is none; says what to run.
    """
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and (folder / "plan.json").is_file():
            return folder
    what = "does not exist" if not path.exists() else "holds no compressed model (config.json and plan.json)"
    raise ArtefactError(f"{path} {what}; make one with `moacompress export` or `moacompress compress`")


def find_plan_file(path: Path) -> Path:
    """Returns the plan file at `path`, in that folder, or in its `model` folder.

    Raises:
        ArtefactError: there is none.
    """
    if path.is_file():
        return path
    for file in (path / "plan.json", path / "model" / "plan.json"):
        if file.is_file():
            return file
    what = "holds no plan.json" if path.exists() else "does not exist"
    raise ArtefactError(f"{path} {what}; make a plan with `moacompress search` or `moacompress compress`")

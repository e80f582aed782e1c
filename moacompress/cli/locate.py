"""Where the plan of a run lies: verbs that take a plan accept its file, or a folder that holds it."""

from __future__ import annotations

from pathlib import Path

from moacompress.core.errors import ArtefactError


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

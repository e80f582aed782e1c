"""Where the plan of a run lies: what takes a plan accepts its file, or a folder that holds it."""

from __future__ import annotations

from pathlib import Path

from moacompress.core.artefact_names import MODEL_FOLDER, PLAN_FILE
from moacompress.core.errors import ArtefactError
from moacompress.models.source import is_compressed


def find_plan_file(path: Path) -> Path:
    """Returns the plan file at `path`, in that folder, or in its `model` folder, for `read_plan`.

    In a compressed checkpoint it need not be there.

    Raises:
        ArtefactError: there is none.
    """
    if path.is_file():
        return path
    for file in (path / PLAN_FILE, path / MODEL_FOLDER / PLAN_FILE):
        if file.is_file() or is_compressed(file.parent):
            return file
    what = f"holds no {PLAN_FILE}" if path.exists() else "does not exist"
    raise ArtefactError(f"{path} {what}; make a plan with `moacompress search` or `moacompress compress`")

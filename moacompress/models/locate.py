"""Where the plan of a run lies: what takes a plan accepts its file, or a folder that holds it."""

from __future__ import annotations

from pathlib import Path

from moacompress.core.artefact_names import MODEL_FOLDER, PLAN_FILE
from moacompress.core.errors import ArtefactError
from moacompress.models.source import is_compressed
from moacompress.models.stored_plan import read_plan


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


def find_running_plan(path: Path) -> Path:
    """Returns `find_plan_file`, but of a run with a checkpoint the checkpoint's, which knows whether weights were changed.

    Raises:
        ArtefactError: there is none, or the two are not of one plan.
    """
    file, model = find_plan_file(path), path / MODEL_FOLDER
    if file != path / PLAN_FILE or not is_compressed(model):
        return file
    ours, runs = read_plan(file), read_plan(model / PLAN_FILE)
    if (ours.rules, ours.shares, ours.gates) != (runs.rules, runs.shares, runs.gates):
        raise ArtefactError(f"{file} is another plan than that which {model} runs; name one of the two")
    return model / PLAN_FILE

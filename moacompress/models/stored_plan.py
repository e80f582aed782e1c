"""Where the plan of a run or of a compressed checkpoint is, and which one counts.

That of a checkpoint is in its `config.json`, which `from_pretrained` runs. `plan.json` beside it is for people to read; where
it says something else, nobody can know which of the two is meant.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import MODEL_FOLDER, PLAN_FILE
from moacompress.core.errors import ArtefactError, PlanError
from moacompress.core.files import read_json
from moacompress.models.source import is_compressed
from moacompress.rules.plan import Plan

_NOTES = ("budget", "quality", "provenance")


def stored_plan(folder: Path) -> Plan:
    """Returns the plan of a compressed checkpoint, with the gates and shingles that lie beside it as files.

    Raises:
        ArtefactError: its config.json is not JSON.
        PlanError: the plan is damaged or newer than is known, or plan.json is another one.
    """
    file = folder / "config.json"
    stored = read_json(file, "config")["quantization_config"].get("plan")
    try:
        plan = Plan.from_dict(stored)
    except PlanError as error:
        raise PlanError(f"the plan in {file}: {error}") from error
    if not (folder / PLAN_FILE).is_file():
        return plan
    for_people = Plan.load(folder / PLAN_FILE)
    problem = plan_file_problem(folder, for_people, plan)
    if problem is not None:
        raise PlanError(problem)
    return replace(plan, gate_weights=for_people.gate_weights, seen=for_people.seen)


def stored_weights(quantization_config: Any) -> dict[str, str]:
    """Returns the layers whose weights are in blocks, with the names of the types, of a checkpoint's `quantization_config`.

    Layers and types may still be unknown: `models.block_layers.put_block_layers` refuses these.

    Raises:
        PlanError: they are no names.
    """
    found = quantization_config.get("weights") if isinstance(quantization_config, dict) else None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise PlanError("quantization_config.weights must name layers and their types of blocks, as text")
    return dict(found)


def checkpoint_weights(folder: Path) -> dict[str, str]:
    """Returns `stored_weights` of a compressed checkpoint.

    Raises:
        ArtefactError: its config.json is not JSON.
        PlanError: they are no names.
    """
    config = read_json(folder / "config.json", "config")
    return stored_weights(config.get("quantization_config") if isinstance(config, dict) else None)


def plan_file_problem(folder: Path, for_people: Plan, plan: Plan) -> str | None:
    """Returns how the plan in `plan.json` differs from that in `config.json`, and what to do; None where it does not."""
    lines = plan.diff(for_people) or [
        f"its {name} says something else" for name in _NOTES if getattr(plan, name) != getattr(for_people, name)
    ]
    if not lines:
        return None
    more = f" and {len(lines) - 1} more differences" if len(lines) > 1 else ""
    return (
        f"{folder / PLAN_FILE} is not the plan in config.json, which is the one that runs: {lines[0]}{more}; remove "
        f"{PLAN_FILE} to go by config.json, or export the plan that is meant (moacompress export MODEL PLAN -o DIR)"
    )


def read_plan(file: Path) -> Plan:
    """Returns the plan in a file; for `plan.json` in a compressed checkpoint, there or not, that of the checkpoint.

    Raises:
        PlanError: unreadable, not a valid plan, or another one than the checkpoint's.
    """
    if file.name == PLAN_FILE and is_compressed(file.parent):
        return stored_plan(file.parent)
    return Plan.load(file)


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

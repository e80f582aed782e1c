"""Export: a dense model and a plan become a folder that plain `from_pretrained` loads.

The folder is written aside, loaded and made to generate in a fresh process, and only then moved into place.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import PLAN_FILE, RECIPE_FILE
from moacompress.core.errors import ArtefactError, PlanError
from moacompress.core.files import new_folder, write_text
from moacompress.core.progress import Progress
from moacompress.exporter.card import model_card
from moacompress.exporter.fresh import Continuation, verify_fresh
from moacompress.models.source import SourceModel, is_compressed, load_source
from moacompress.recipe import shared_name
from moacompress.rules.plan import Plan

logger = logging.getLogger(__name__)

LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")


def export(
    model: str | Path | SourceModel,
    plan: Plan | str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a compressed checkpoint.

    Args:
        model: the dense model that the plan was made for (folder, hub id, `.gguf` file, or already loaded). One that is loaded
            in another dtype than the plan's is loaded again.
        plan: a plan or its file.
        out: the folder to make. One that holds an export of this plan is left as it is.
        overwrite: replace an existing model; any other folder is left alone.
        trust_remote_code: run modelling code that comes with the model.
        progress: is told of the steps.

    Returns:
        The folder.

    Raises:
        PlanError: the plan is not for this model.
        ArtefactError: `out` holds something else, or cannot be written; nothing is left half-written.
        MoaCompressError: a fresh process cannot load the written checkpoint, or computes something else with it.
    """
    from moacompress.runtime import attach, detach

    progress = progress or Progress()
    out = Path(out)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    reused = not overwrite and out.exists()
    if reused and not _is_export_of(out, plan):
        raise ArtefactError(f"{out} exists already and is not of this plan; choose another folder or pass --overwrite")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        # not even with --overwrite: a mistyped folder must not cost somebody's files
        raise ArtefactError(f"{out} exists already and is not a model; choose another folder")
    progress.start("export", 3)
    source = _loaded_in(plan.model.dtype, model, trust_remote_code)
    plan.check_model(source.shape, weights=source.weights_like)
    if reused:
        progress.done()
        return out
    plan = _shared(plan)
    progress.step("model loaded")
    with new_folder(out, overwrite) as aside:
        attach(source.model, plan)
        try:
            expected = write_checkpoint(source, plan, aside)
        finally:
            detach(source.model)
        progress.step("written")
        verify_fresh(aside, expected)
        progress.step("loaded and generated in a fresh process")
    progress.done()
    return out


def write_checkpoint(source: SourceModel, plan: Plan, folder: Path) -> Continuation:
    """Writes all files of a compressed checkpoint.

    Args:
        source: the model, under the plan; licence files are those that come with its `source`.
        plan: the plan.
        folder: an empty one.

    Returns:
        What a fresh process is to compute from the folder.

    Raises:
        ArtefactError: the folder cannot be written.
    """
    source.model.save_pretrained(folder)
    expected = Continuation.of(source, plan)
    source.tokenizer.save_pretrained(folder)
    plan.save(folder / PLAN_FILE)
    recipe = plan.provenance.get("recipe")
    if recipe is not None:
        write_text(folder / RECIPE_FILE, json.dumps(recipe, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "README.md", model_card(plan))
    for licence in licence_files(source.source):
        shutil.copyfile(licence, folder / licence.name)
    return expected


def _loaded_in(dtype: str, model: str | Path | SourceModel, trust_remote_code: bool) -> SourceModel:
    """Returns the dense model in a dtype: a loaded one as it is where it computes in that."""
    if isinstance(model, SourceModel):
        if model.computes_in == dtype:
            return model
        model = model.source
    return load_source(model, dtype=dtype, trust_remote_code=trust_remote_code)


def _shared(plan: Plan) -> Plan:
    """Returns the plan without the paths that plans of earlier versions hold: of each its last part."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [named(item) for item in value]
        return shared_name(value) if isinstance(value, str) else value

    return plan.with_notes(provenance=named(plan.provenance))


def exported_plan(folder: Path) -> Plan | None:
    """Returns the plan of a compressed checkpoint, or None if the folder is not one."""
    found = folder / PLAN_FILE
    return Plan.load(found) if found.is_file() and is_compressed(folder) else None


def save_dense(model: str | Path, out: str | Path, dtype: str = "auto") -> Path:
    """Writes a dense model as safetensors with its tokenizer and licence files, atomically.

    Args:
        model: hub id, folder, or `.gguf` file.
        out: the folder to make.
        dtype: of the weights that are written; "auto" for the model's own (`load_source`).
    """
    source = load_source(model, dtype=dtype)
    with new_folder(Path(out)) as aside:
        source.model.save_pretrained(aside)
        source.tokenizer.save_pretrained(aside)
        for licence in licence_files(source.source):
            shutil.copyfile(licence, aside / licence.name)
    return Path(out)


def licence_files(source: str) -> list[Path]:
    """Returns the licence and notice files that come with MODEL.

    For a folder these lie in it; for a `.gguf` file beside it or in the `*.dist-info` folder of the package it came in; for
    a hub id they are fetched, and a failure to do so is logged.
    """
    path = Path(source)
    if path.is_dir():
        return _matching(path)
    if path.is_file():
        return _matching(path.parent) or [
            file for info in sorted(path.parent.parent.glob("*.dist-info")) for file in _matching(info)
        ]
    try:
        from huggingface_hub import snapshot_download

        return _matching(Path(snapshot_download(source, allow_patterns=list(LICENCE_PATTERNS))))
    except Exception as error:  # the hub raises many kinds; a licence file is no reason to fail an export
        logger.warning("the licence files of %s could not be fetched: %s", source, error)
        return []


def _matching(folder: Path) -> list[Path]:
    found: Iterable[Path] = (file for pattern in LICENCE_PATTERNS for file in folder.glob(pattern))
    return sorted({file for file in found if file.is_file()})


def check_reusable(folder: Path, plan: Plan) -> bool:
    """Returns whether `folder` is a finished export of exactly this plan.

    Raises:
        PlanError: it is an export of another plan.
    """
    if not folder.exists():
        return False
    if not _is_export_of(folder, plan):
        raise PlanError(f"{folder} holds another model; choose another folder or pass --overwrite")
    return True


def _is_export_of(folder: Path, plan: Plan) -> bool:
    found = exported_plan(folder)
    return found is not None and _shared(found).to_dict() == _shared(plan).to_dict()

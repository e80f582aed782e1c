"""Export: a dense model and a plan become a folder that plain `from_pretrained` loads.

The folder is written aside, loaded and made to generate in a fresh process, and only then moved into place.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moacompress.core.artefact_names import MODEL_FOLDER, PLAN_FILE, RECIPE_FILE
from moacompress.core.errors import ArtefactError, BudgetError, PlanError, UsageError
from moacompress.core.files import holds_something, is_within, new_folder, sweep_folders, write_text
from moacompress.core.place import check_writable, writing_to
from moacompress.core.progress import Progress
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.stopwatch import Stopwatch
from moacompress.exporter.cache_settings import with_its_cache
from moacompress.exporter.card import CARD, model_card
from moacompress.exporter.dealt_heads import deal_heads
from moacompress.exporter.fresh import Continuation, verify_fresh
from moacompress.exporter.licences import licence_files
from moacompress.models.block_layers import weight_types
from moacompress.models.placement import check_in_memory
from moacompress.models.source import DENSE, KEEP, SourceModel, is_compressed, load_source
from moacompress.models.stored_plan import checkpoint_weights, stored_plan
from moacompress.models.weight_bytes import weight_bytes
from moacompress.repair.projections import with_weights
from moacompress.rules.budget import Budget, format_length
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach
from moacompress.runtime.gate import gates_of
from moacompress.runtime.hf.attaching import model_inputs
from moacompress.runtime.ready_model import load_for

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile
    from moacompress.repair.plans import Repaired

logger = logging.getLogger(__name__)

OPENING_SECONDS, BYTES_PER_SECOND = 5.0, 200e6
"""Of a fresh process that opens a checkpoint, and of reading or writing its weights."""


def export(
    model: str | Path | SourceModel,
    plan: Plan | str | Path,
    out: str | Path,
    *,
    weights: str = KEEP,
    head_weights: str | None = None,
    repair: Profile | str | Path | None = None,
    ranks: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a compressed checkpoint.

    Args:
        model: the dense model that the plan was made for (folder, hub id, `.gguf` file, or already loaded). One that is loaded
            in another dtype than the plan's is loaded again.
        plan: a plan or its file.
        out: the folder to make. One that holds an export of this plan, with the same repair and types of weights, is left as
            it is.
        weights: as `load_source` takes it, of a model that is not loaded yet; the plan must be of these weights.
        head_weights: as `load_source` takes it, of a model that is not loaded yet.
        repair: a finished profile of the model, or its folder: the output projections of attention are refitted with its
            samples, where that lowers measured KL; see `moacompress.repair.plans`. A loaded model has its own weights
            again afterwards.
        ranks: of tensor parallelism that the checkpoint is for: KV heads change places so that each has much the same bytes,
            and their weights with them; see `dealt_heads`. The checkpoint's plan is then of these weights.
        device: of a model that is not loaded yet: a torch device, or a device map. Repair takes one device.
        overwrite: replace a compressed checkpoint; any other folder is left alone, and one that holds the model, or is in it.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.
        progress: is told of the steps.

    Returns:
        The folder.

    Raises:
        PlanError: the plan is not for this model.
        UsageError: ranks that do not divide the KV heads, or beside a repair; or a device that is not here.
        ModelError: the profile is of another model; or weights are offloaded that the plan or the repair changes.
        DataError: the profile has too few samples to repair with.
        ArtefactError: `out` holds something else, or cannot be written; nothing is left half-written. Or the profile cannot be
            read.
        MoaCompressError: a fresh process cannot load the written checkpoint, or computes something else with it.
    """
    asked = ExportRequest(
        model, plan, Path(out), weights, head_weights, repair, ranks, device, overwrite, trust_remote_code
    )
    return write_export(asked, progress or Progress())


@dataclass(frozen=True)
class ExportRequest:
    """What an export is asked for: the arguments of `export`."""

    model: str | Path | SourceModel
    plan: Plan | str | Path
    out: Path
    weights: str = KEEP
    head_weights: str | None = None
    repair: Profile | str | Path | None = None
    ranks: int | None = None
    device: str = "cpu"
    overwrite: bool = False
    trust_remote_code: bool = False


class _Prepared(NamedTuple):
    """What an export is made of, once nothing is left that can be wrong with the request."""

    plan: Plan  # without notes of a checkpoint's weights; with its KV heads reordered where ranks are asked for
    changed: Mapping[str, Any]  # weights that move with the KV heads, by name
    profile: Profile | None  # to repair with
    source: SourceModel  # in the plan's dtype
    inputs: Iterable[str | Path]  # what the command reads, where it may replace something
    reused: bool  # whether this very export is there already


def write_export(asked: ExportRequest, progress: Progress) -> Path:
    """Does what `export` says, for a request."""
    out = asked.out
    if asked.ranks is not None and asked.repair is not None:
        raise UsageError("a repair fits weights where they are, and ranks move them; give one of --repair and --ranks")
    sweep_folders(out)
    progress.start("export", 3)
    plan, changed, profile, source, inputs, reused = _prepared(asked)
    if reused:
        progress.done()
        return out
    warn_of_budget(plan)
    if plan.quality.get("assumed_repaired") and profile is None:
        logger.warning(
            "the KL of this plan was measured with repaired weights, which this checkpoint will not have; export with "
            "--repair PROFILE"
        )
    progress.step("model loaded")
    if profile is not None:
        repaired = _repaired(asked, source, plan, profile, progress)
        plan = plan.with_notes(provenance={**plan.provenance, "repair": repaired.report})
        changed = repaired.weights
        progress.start("export", 2)
    with new_folder(out, asked.overwrite) as aside:
        with with_weights(source.model, changed), with_its_cache(source.model):
            attach(source.model, plan)
            try:
                expected = write_checkpoint(source, plan, aside)
            finally:
                detach(source.model)
        progress.step("written")
        verify_fresh(aside, expected, trust_remote_code=asked.trust_remote_code)
        progress.step("loaded and generated in a fresh process")
        check_place(out, inputs)  # this took a while
    progress.done()
    return out


def _prepared(asked: ExportRequest) -> _Prepared:
    """Loads and checks what an export is made of; nothing is written."""
    from moacompress.calibration.profile.store import Profile

    out, ranks = asked.out, asked.ranks
    check_writable(out)
    plan = _unhealed(unrepaired(asked.plan if isinstance(asked.plan, Plan) else Plan.load(asked.plan)))
    profile = Profile.load(asked.repair) if isinstance(asked.repair, str | Path) else asked.repair
    model = asked.model.source if isinstance(asked.model, SourceModel) else asked.model
    read = (model, profile.path if profile else "")
    inputs = [name for name in read if name and Path(name).exists()] if asked.overwrite else ()
    check_place(out, inputs)
    reused = not asked.overwrite and holds_something(out)
    if reused and ranks is None and not _is_export_of(out, plan, profile.fingerprint if profile else None):
        raise ArtefactError(
            f"{out} exists already and is not of this plan{_other_repair(out, plan)}; choose another folder or pass --overwrite"
        )
    source = _loaded_in(plan.model.dtype, asked)
    if profile is not None:
        check_in_memory(source.model, "a repair")
    if plan.shares:
        check_in_memory(source.model, "a plan whose layers share attention")
    plan.check_model(source.shape, weights=True)
    gates_of(plan, model_inputs(source.model))
    if reused and not _has_types(out, source, repaired=profile is not None):
        raise ArtefactError(
            f"{out} exists already and has weights of other types; choose another folder or pass --overwrite"
        )
    changed: Mapping[str, Any] = {}
    if ranks is not None:
        check_in_memory(source.model, "moving KV heads for ranks")
        plan, changed = deal_heads(source.model, plan, ranks)
        if reused and not _is_export_of(out, plan):
            raise ArtefactError(
                f"{out} exists already and is not of this plan for {ranks} ranks; choose another folder or pass --overwrite"
            )
    return _Prepared(plan, changed, profile, source, inputs, reused)


def estimate_export(asked: ExportRequest) -> Estimate:
    """Returns what an export would do, after all that `export` checks before it writes; the errors are the same."""
    out, watch = asked.out, Stopwatch("cpu")
    # an export begins with the same: of a .gguf file most of the time goes into the numbers that its blocks stand for
    loading, found = watch.once(lambda: _prepared(asked))
    warn_of_budget(found.plan)
    size = sum(weight_bytes(found.source.model).values())
    seconds = 0.0 if found.reused else loading + export_seconds(size)
    replaces, repairs = holds_something(out), found.profile is not None
    what = f"replace the checkpoint in {out}" if replaces else f"write {out}"
    beside = ", and a repair before it, which is not counted" if repairs else ""
    text = (
        f"It would {what}, about {readable_bytes(size)} of weights, in about {readable_seconds(seconds)}{beside}. "
        "Nothing was written."
    )
    return Estimate(
        seconds=seconds,
        slowdown=1.0 if found.reused else watch.slowdown,
        text=(f"{out} is an export of this plan already; it would be left as it is." if found.reused else text,),
        facts={
            "model": str(out),
            "exists": found.reused,
            "replaces": replaces,
            "weight_bytes": size,
            "repairs": repairs,
        },
    )


def export_seconds(weight_bytes: int) -> float:
    """Returns about how many seconds an export of a loaded model takes; two processes write, read and use its weights."""
    return 2 * (OPENING_SECONDS + weight_bytes / BYTES_PER_SECOND)


def check_place(out: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Refuses a place where no checkpoint may go, not even with `--overwrite`: a typo must not cost anyone files.

    Args:
        out: where the checkpoint is to go. Only a compressed one is ever replaced.
        inputs: files and folders that the command reads, where it may replace what is at `out`; none of them goes with it.

    Raises:
        ArtefactError: there is something else, a file system begins there, or one of the inputs lies in `out` or around it;
            links are followed.
    """
    if os.path.ismount(os.path.realpath(out)):
        raise ArtefactError(
            f"{out} is where a file system is mounted, so that no finished folder can be moved there; choose one in it, such "
            f"as {out / MODEL_FOLDER}"
        )
    if not holds_something(out):
        return
    if not _is_checkpoint(out):
        raise ArtefactError(f"{out} exists already and is not a compressed model; choose another folder")
    for name in inputs:
        parts = [name, *(Path(name).iterdir() if Path(name).is_dir() else ())]
        if is_within(out, name) or any(is_within(part, out) for part in parts):
            raise ArtefactError(f"{out} cannot be replaced: {name} is read by this command; choose another folder")


def _is_checkpoint(folder: Path) -> bool:
    try:
        return is_compressed(folder)
    except ArtefactError:  # a config that cannot be read
        return False


def _repaired(asked: ExportRequest, source: SourceModel, plan: Plan, profile: Profile, progress: Progress) -> Repaired:
    """Repairs in the dtype that was profiled in, which need not be the checkpoint's, with a loaded model if one has it."""
    from moacompress.repair.plans import repair_by_profile

    recipe = profile.recipe
    profile.check_model(source, "repair")
    dtype = source.computes_in if recipe.dtype == "auto" else recipe.dtype
    there = (one for one in (source, asked.model) if isinstance(one, SourceModel) and one.computes_in == dtype)
    loaded = next(there, None) or load_for(
        recipe.model_copy(update={"dtype": dtype}), source.source, trust_remote_code=asked.trust_remote_code
    )
    return repair_by_profile(loaded, plan, profile, progress)


def unrepaired(plan: Plan) -> Plan:
    """Returns a plan without the notes of a repair, which are of a checkpoint's weights and not of the plan."""
    return plan.with_notes(provenance={name: note for name, note in plan.provenance.items() if name != "repair"})


def _unhealed(plan: Plan) -> Plan:
    """Returns a plan without the notes of a heal of weights, which are of a checkpoint; those of gates are of the plan too."""
    heal = plan.provenance.get("heal")
    kept = {name: note for name, note in plan.provenance.items() if name != "heal"}
    if isinstance(heal, dict) and heal.get("train") == "gates":
        kept["heal"] = {**heal, "changed_weights": False}
    return plan.with_notes(provenance=kept)


def write_checkpoint(source: SourceModel, plan: Plan, folder: Path) -> Continuation:
    """Writes all files of a compressed checkpoint into an empty folder, and returns what a fresh process is to compute from it.

    The model is under the plan; licence files are those that come with its `source`.

    Raises:
        ArtefactError: the folder cannot be written.
    """
    with writing_to(folder):
        source.model.save_pretrained(folder)
    expected = Continuation.of(source, plan)
    source.tokenizer.save_pretrained(folder)
    plan.save(folder / PLAN_FILE)
    recipe = plan.provenance.get("recipe")
    if recipe is not None:
        write_text(folder / RECIPE_FILE, json.dumps(recipe, indent=1, ensure_ascii=False) + "\n")
    stored = weight_bytes(source.model) if weight_types(source.model) else None
    write_text(folder / CARD, model_card(plan, stored))
    for licence in licence_files(source.source):
        shutil.copyfile(licence, folder / licence.name)
    return expected


def _loaded_in(dtype: str, asked: ExportRequest) -> SourceModel:
    """Returns the dense model in a dtype: a loaded one as it is where it computes in that."""
    model = asked.model
    if isinstance(model, SourceModel):
        if model.computes_in == dtype:
            return model
        model = model.source
    return load_source(
        model,
        dtype=dtype,
        device=asked.device,
        weights=asked.weights,
        head_weights=asked.head_weights,
        trust_remote_code=asked.trust_remote_code,
    )


def warn_of_budget(plan: Plan) -> None:
    """Warns where a plan takes more than the budget that it was searched for, as codes do beside a smaller dtype."""
    lengths = sorted(map(int, plan.budget.get("bytes", ())))
    over: dict[int, int] = {}
    for text in plan.budget.get("asked", ()):
        with suppress(BudgetError):  # a form of budget that a plan of another version was found for
            for n, limit in Budget.parse(text).limits(plan.model, lengths).items():
                if plan.kv_bytes(n) > limit:
                    over[n] = min(limit, over.get(n, limit))
    if not over:
        return
    n, limit = max(over.items(), key=lambda item: plan.kv_bytes(item[0]) / item[1])
    dense = plan.model.dense_kv_bytes(n)
    logger.warning(
        "in %s the plan takes %.1f%% of the dense KV bytes at %s tokens, more than the %.1f%% of the budget %s: codes and "
        "their scales are as large as before, the dense numbers smaller",
        plan.model.dtype,
        100 * plan.kv_bytes(n) / dense,
        format_length(n),
        100 * limit / dense,
        ", ".join(map(str, plan.budget["asked"])),
    )


def exported_plan(folder: Path) -> Plan | None:
    """Returns the plan of a compressed checkpoint, or None if the folder is not one.

    Raises:
        PlanError: its plan.json is not the plan that its config.json runs.
    """
    return stored_plan(folder) if is_compressed(folder) else None


def save_dense(model: str | Path, out: str | Path, dtype: str = "auto", *, trust_remote_code: bool = False) -> Path:
    """Writes a dense model (hub id, folder or `.gguf` file) as safetensors with its tokenizer and licence files, atomically.

    `dtype` is that of the weights that are written, "auto" for the model's own.
    """
    source = load_source(model, dtype=dtype, weights=DENSE, trust_remote_code=trust_remote_code)
    with new_folder(Path(out)) as aside:
        source.model.save_pretrained(aside)
        source.tokenizer.save_pretrained(aside)
        for licence in licence_files(source.source):
            shutil.copyfile(licence, aside / licence.name)
    return Path(out)


def check_reusable(folder: Path, plan: Plan, repair: Profile | None = None) -> bool:
    """Returns whether `folder` is a finished export of exactly this plan, repaired with that profile or not at all.

    Raises:
        PlanError: it is an export of another plan.
    """
    if not folder.exists():
        return False
    if not _is_export_of(folder, plan, repair.fingerprint if repair else None):
        raise PlanError(f"{folder} holds another model; choose another folder or pass --overwrite")
    return True


def _is_export_of(folder: Path, plan: Plan, repaired_by: str | None = None) -> bool:
    found = exported_plan(folder)
    if found is None or unrepaired(found).to_dict() != unrepaired(plan).to_dict():
        return False
    return _repaired_by(found) == repaired_by


def _has_types(folder: Path, source: SourceModel, repaired: bool) -> bool:
    """Returns whether the weights of an export are in the blocks that a model's are in, but for those that were repaired."""
    found, own = checkpoint_weights(folder), weight_types(source.model)
    return found == own or (repaired and found.items() <= own.items())


def _repaired_by(plan: Plan) -> str | None:
    """Returns the fingerprint of the profile that an exported plan's weights were repaired with, or None."""
    notes = plan.provenance.get("repair")
    return str(notes.get("profile")) if isinstance(notes, dict) else None


def _other_repair(folder: Path, plan: Plan) -> str:
    """Returns what to add to "not of this plan" where only the repair differs."""
    found = exported_plan(folder)
    if found is None or not _is_export_of(folder, plan, _repaired_by(found)):
        return ""
    by = _repaired_by(found)
    return f" with this repair ({'it has none' if by is None else f'it was repaired with the profile {by}'})"

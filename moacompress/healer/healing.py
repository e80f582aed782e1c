"""Heal: a compressed checkpoint whose weights are distilled from the dense model, under its own plan.

The work folder beside the checkpoint (`core.artefact_names.heal_folder`) holds the answers, the Trainer's checkpoints, the
history and the best weights so far, until the new checkpoint is in place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.calibration.data.answers import AnswerStore
from moacompress.calibration.data.samples import fingerprint_ordered
from moacompress.calibration.profile.passes import KEEP_TOKENS
from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import (
    ANSWERS_FILE,
    HEAL_CHECKPOINTS_FOLDER,
    HEAL_FILE,
    HEAL_HISTORY_FILE,
    TEMPORARY,
    heal_folder,
    holder_of_folder,
    of_heal,
)
from moacompress.core.errors import ArtefactError
from moacompress.core.files import (
    check_no_link,
    holds_something,
    new_folder,
    read_json,
    remove,
    sweep_files,
    sweep_folders,
    write_json,
)
from moacompress.core.lock_holders import own_folder
from moacompress.core.place import check_writable, named_folder, writing_to
from moacompress.core.progress import SILENT, Progress
from moacompress.core.ranks import rank, world_size
from moacompress.core.shingles import Shingles
from moacompress.core.shown import Shown
from moacompress.core.statistics import estimate_row, mean, p_value_of_chosen, standard_error
from moacompress.exporter.cache_settings import with_its_cache
from moacompress.exporter.exporting import check_place, exported_plan, write_checkpoint
from moacompress.exporter.fresh import verify_fresh
from moacompress.healer.heal_history import Evaluated, HealHistory, last_checkpoint, load_best
from moacompress.healer.heal_request import HealRequest
from moacompress.healer.teacher import HeldOut, Teacher
from moacompress.healer.trained_weights import distilled_layers, make_trainable, put_written
from moacompress.healer.training_data import HealData, make_heal_data
from moacompress.models import processes
from moacompress.models.modules import attention_modules
from moacompress.models.source import SourceModel, context_length
from moacompress.recipe import Recipe
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.plan import Plan
from moacompress.runtime.checkpoint import load_checkpoint
from moacompress.runtime.gate import gates_on
from moacompress.runtime.hf.attaching import attach, detach, give_notes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HealResult(Shown):
    """A healed checkpoint.

    Attributes:
        folder: where it is.
        plan: its plan.
        losses: mean loss of every step; empty where the checkpoint was there already.
    """

    folder: Path
    plan: Plan
    losses: tuple[float, ...] = ()

    @property
    def notes(self) -> dict[str, Any]:
        """What the plan says of the heal."""
        found: dict[str, Any] = self.plan.provenance["heal"]
        return found


def heal(
    target: str | Path,
    out: str | Path,
    *,
    profile: str | Path | Profile | None = None,
    teacher: str | SourceModel | None = None,
    recipe: Recipe | None = None,
    allow_overlap: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> HealResult:
    """Distils the weights of a compressed model from the dense one, and writes them as a checkpoint of the same plan.

    Held-out KL is measured on the way, of the weights as they would be written; the best state is what is written. Where none
    is better than the start, the start is. Under `torchrun`, processes share the samples.

    Args:
        target: a compressed model, or the folder of a run with one under `model/`.
        out: the folder to make. One that this very heal made is left as it is, and one that was stopped resumes.
        profile: folder of the dense model's profile, whose validation samples are held out; by default the run's own.
        teacher: the dense model; by default the one that was profiled.
        recipe: `heal` and `seed` count, `device`, `dtype` (what is computed in) and `calibration.text` (where new prose is
            taken from).
        allow_overlap: train also on more than 1% of the held-out text; the notes say how much.
        overwrite: start from scratch: a checkpoint at `out`, and what a heal left beside it, are removed.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.
        progress: is told of the steps.

    Raises:
        UsageError: not a compressed model, no profile, nothing to train, a missing package, or float16.
        ModelError: the dense model is not there, or numbers that are not finite.
        PlanError: the dense model, or the profile, is not what the plan was made for.
        DataError: data that are missing, or that the held-out set uses too.
        ArtefactError: `out` is something else, cannot be written, or another process is at it.
        MoaCompressError: a fresh process cannot load the written checkpoint, or computes something else with it.
    """
    processes.join()
    out, progress = named_folder(out), progress or SILENT
    request = HealRequest.of(target, profile, teacher, recipe or Recipe(), trust_remote_code)
    sweep_folders(out)
    done = check_out(out, request, overwrite)
    alike = {"request to heal": request.key, f"state of {out}": "healed" if done is not None else "not healed"}
    processes.check_alike(alike)
    work = heal_folder(out)
    if done is not None:
        if rank() == 0:
            _clear(work, request)
        return done
    arguments = trainer_arguments(request, work)
    with own_folder(work) if rank() == 0 else nullcontext():
        if rank() == 0:
            _claim(work, request, overwrite)
        source = request.teacher  # all processes make the answers, and the first one keeps them
        store = AnswerStore(
            None if rank() else work / ANSWERS_FILE, source.shape.weights_fingerprint, source.computes_in
        )
        data = make_heal_data(request.profile, source, request.recipe, progress, store, allow_overlap)
        history, model = _trained(request, data, arguments, work, progress)
        plan = _noted(request, data, history, model)
        if request.heal.train == "gates" and history.best is not None:
            gates = _trained_gates(request, work) if rank() == 0 else None
            plan = plan.with_gates(processes.broadcast(gates))
        result = HealResult(out, plan, tuple(history.losses))
        if rank() == 0:
            _write(result, request, history, work, overwrite, progress)
    if rank() == 0:
        _tidy(work)
    processes.broadcast(None)  # no process ends before the checkpoint is there
    return result


def trainer_arguments(request: HealRequest, work: Path) -> Any:
    """Returns the arguments of transformers' Trainer; under `torchrun` they join the process group."""
    from moacompress.healer.heal_trainer import OneGpuArguments

    heal = request.heal
    arguments = OneGpuArguments(
        output_dir=str(work / HEAL_CHECKPOINTS_FOLDER),
        max_steps=heal.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=request.accumulation,
        learning_rate=request.learning_rate,
        weight_decay=0.0,
        gradient_checkpointing=request.longest > KEEP_TOKENS,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=request.compute == "bfloat16",
        use_cpu=request.recipe.device == "cpu",
        ddp_backend="gloo" if request.recipe.device == "cpu" and world_size() > 1 else None,
        ddp_timeout=24 * 3600,
        seed=request.recipe.seed,
        save_strategy="no",
        save_total_limit=2,
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,
    )
    _ = arguments.device
    return arguments


def check_out(out: Path, request: HealRequest, overwrite: bool) -> HealResult | None:
    """Refuses a place where this heal may not write, or whose work folder is another one's; nothing is changed.

    Returns what this very heal made, where it is there already.

    Raises:
        ArtefactError: something else is there.
    """
    if out.resolve() == request.checkpoint.folder.resolve():
        raise ArtefactError(f"{out} is the model that is to be healed; choose another folder")
    check_writable(out)
    check_place(out, request.places if overwrite else ())
    if overwrite or not holds_something(out):
        _is_begun(heal_folder(out), request, overwrite)
        return None
    plan = exported_plan(out)
    notes = None if plan is None else plan.provenance.get("heal")
    if plan is None or not isinstance(notes, dict) or notes.get("request") != request.key:
        raise ArtefactError(f"{out} exists already and is not of this heal; choose another folder or pass --overwrite")
    return HealResult(out, plan)


def _claim(work: Path, request: HealRequest, overwrite: bool) -> None:
    """Makes the work folder this heal's, or refuses it. This process owns it."""
    check_no_link(work / HEAL_CHECKPOINTS_FOLDER)
    _sweep(work)
    if _is_begun(work, request, overwrite):
        return
    mark = work / HEAL_FILE
    if overwrite or not mark.is_file():
        remove(of_heal(work))
    write_json(mark, {"request": request.key, "recipe": request.recipe.shared(request.teacher.source)["heal"]})


def _is_begun(work: Path, request: HealRequest, overwrite: bool) -> bool:
    """Returns whether a work folder is that of this very heal, to be taken up; refuses what no heal or another one left."""
    mark = work / HEAL_FILE
    if not mark.is_file():
        held = [path for path in work.iterdir() if path.suffix != TEMPORARY] if work.is_dir() else []
        if any(path != holder_of_folder(work) for path in held):
            raise ArtefactError(f"{work} exists already and no heal left it; choose another --out")
        return False
    if overwrite:
        return False
    found = read_json(mark, "heal")
    if isinstance(found, dict) and found.get("request") == request.key:
        return True
    if (work / HEAL_HISTORY_FILE).exists():
        raise ArtefactError(f"{work} holds another heal, which was stopped; choose another --out or pass --overwrite")
    return False


def _sweep(work: Path) -> None:
    """Removes what killed runs left of what they were writing or removing."""
    for path in of_heal(work):
        sweep_files(path)
        sweep_folders(path)


def _clear(work: Path, request: HealRequest) -> None:
    """Removes the work folder of this very heal, which was killed when its checkpoint was already there."""
    with suppress(ArtefactError):  # another heal's, or a live process's
        if work.is_dir() and (_is_begun(work, request, False) or not (work / HEAL_FILE).is_file()):
            with own_folder(work):
                pass
            _tidy(work)


def _tidy(work: Path) -> None:
    _sweep(work)
    remove(of_heal(work))
    if not any(work.iterdir()):
        work.rmdir()


def _trained(
    request: HealRequest, data: HealData, arguments: Any, work: Path, progress: Progress
) -> tuple[HealHistory, Any]:
    """Trains, or resumes from the last checkpoint; returns what happened, and the model as `make_trainable` made it."""
    import torch
    from transformers import PrinterCallback

    from moacompress.healer.heal_trainer import (
        HealCallback,
        HealParts,
        HealTrainer,
        TrainingProgress,
        as_batches,
        stopping,
    )

    heal = request.heal
    begun = last_checkpoint(work / HEAL_CHECKPOINTS_FOLDER)
    history = HealHistory.read(work)
    so_far = f"{begun.name if begun is not None else 'no checkpoint'}, {len(history.evaluations)} evaluations"
    processes.check_alike({f"view of {work}": so_far, "training data": data.fingerprint})
    teacher = Teacher(request.teacher.model)
    held_out = HeldOut(teacher, data.held_out)
    if history.start is None:  # of the checkpoint as it is: weights in blocks are still blocks
        progress.start("held-out KL at the start", 1)
        history.start = Evaluated(0, 0, held_out.kls(request.checkpoint.model))
        progress.step(f"{history.start.mean:.4g}")
        progress.done()
        if rank() == 0:
            history.write(work)
    model = make_trainable(request.checkpoint.model, request.plan, heal, request.recipe.seed)
    if history.finished:
        return history, model
    step = 0 if begun is None else int(begun.name.rpartition("-")[2])
    history.back_to(step)
    parts = HealParts(
        heal=heal,
        layers=distilled_layers(request.plan),
        teacher=teacher,
        held_out=held_out,
        dtype=getattr(torch, request.plan.model.dtype),
        history=history,
        training=TrainingProgress(heal, history.seconds if step else 0.0),
        work=work,
    )
    trainer = HealTrainer(parts, model=model, args=arguments, train_dataset=as_batches(data.training))
    trainer.done = parts.training.share(step)
    stop = threading.Event()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(HealCallback(parts, trainer, stop, progress))
    progress.start("healing", heal.steps)
    for _ in range(step):
        progress.step("done before")
    with stopping(stop), writing_to(work):
        trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
    if processes.broadcast(stop.is_set()):
        raise KeyboardInterrupt
    progress.done()
    return history, model


def _noted(request: HealRequest, data: HealData, history: HealHistory, model: Any) -> Plan:
    """Returns the plan with what was done in its notes."""
    assert history.start is not None
    heal, best = request.heal, history.best
    chosen = best or history.start
    apart = np.subtract(chosen.kls, history.start.kls).tolist()
    others = [found.kls for found in history.evaluations if found.step != chosen.step]
    notes = {
        "request": request.key,
        "objective": heal.objective,
        "train": heal.train,
        "improved": best is not None,
        "changed_weights": (best is not None and heal.train != "gates") or request.plan.changed_weights == "healed",
        "held_out_kl": {
            "before": _statistics(history.start.kls),
            "after": _statistics(chosen.kls),
            "difference": _statistics(apart)
            | {
                "ci95": estimate_row(*mean(apart))["ci95"],
                "p": p_value_of_chosen(chosen.kls, others, history.start.kls),
            },
            "samples": len(data.held_out),
            "evaluations": len(history.evaluations),
        },
        "best_step": best.step if best is not None else 0,
        "steps": len(history.losses),
        "tokens": history.tokens,
        "seconds": round(history.seconds, 1),
        "training_samples": len(data.training),
        "data": data.fingerprint,
        "held_out": fingerprint_ordered(data.held_out),
        "overlap": data.overlap,
        "profile": request.profile.fingerprint,
        "teacher": request.teacher.shape.weights_fingerprint,
        "from_weights": request.checkpoint.weights,
        "computes_in": request.compute,
        "learning_rate": request.learning_rate,
        "processes": world_size(),
        "evaluations": [{"step": found.step, "kl": found.mean} for found in [history.start, *history.evaluations]],
        "recipe": {**request.recipe.shared(request.teacher.source)["heal"], "seed": request.recipe.seed},
    }
    sizes = request.weight_bytes(model)
    if sizes is not None:
        notes["weight_bytes"] = {**sizes, "after": sizes["before"]} if best is None else sizes
    plan = request.plan.with_notes(provenance={**request.plan.provenance, "heal": notes})
    return plan if plan.seen is None else replace(plan, seen=Shingles.union([plan.seen, data.seen]))


def _trained_gates(request: HealRequest, work: Path) -> GateWeights:
    """Returns the gates of the best state; the model that was trained has them afterwards."""
    put_written(request.checkpoint.model, load_best(work))
    gates = gates_on(attention_modules(request.checkpoint.model), request.plan.gate_weights)
    assert gates is not None
    return gates


def _statistics(values: Sequence[float]) -> dict[str, float | None]:
    """Returns the mean of some numbers and its standard error, None of a single one."""
    return {"mean": float(np.mean(values)), "standard_error": standard_error(values)}


def _write(
    result: HealResult, request: HealRequest, history: HealHistory, work: Path, overwrite: bool, progress: Progress
) -> None:
    """Writes the checkpoint aside, loads it in a fresh process, and moves it into place."""
    folder, plan = request.checkpoint.folder, result.plan
    progress.start("writing the healed checkpoint", 2)
    fresh = load_checkpoint(folder, plan.model.dtype, "cpu", trust_remote_code=request.trust_remote_code)
    if history.best is None:
        logger.warning("no step lowered the held-out KL: %s gets the weights that %s has", result.folder, folder)
    elif plan.gates != request.plan.gates:  # a plan is of its gates
        attach(detach(fresh.model), plan)
    else:
        put_written(fresh.model, load_best(work))
    give_notes(fresh.model, plan)
    source = SourceModel(fresh.model, fresh.tokenizer, str(folder), plan.model, context_length(fresh.model))
    with new_folder(result.folder, overwrite) as aside, with_its_cache(source.model):
        expected = write_checkpoint(source, plan, aside)
        progress.step("written")
        verify_fresh(aside, expected, trust_remote_code=request.trust_remote_code)
        progress.step("loaded and generated in a fresh process")
        check_place(result.folder, request.places)  # this took a while
    progress.done()

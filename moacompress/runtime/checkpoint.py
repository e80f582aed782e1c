"""The compressed checkpoint that is evaluated: finding it, loading it, and putting other plans on its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import moacompress.runtime.hf.loading  # noqa: F401  (in case the entry point is switched off)
from moacompress.core.artefact_names import PLAN_FILE, PROFILE_FOLDER, gates_file
from moacompress.core.errors import DataError, MoaCompressError, ModelError, PlanError, UsageError, one_line
from moacompress.models.fingerprint import weights_fingerprint
from moacompress.models.modules import attention_modules
from moacompress.models.placement import checked_placement, input_device
from moacompress.models.source import (
    ROUNDING,
    check_family,
    context_length,
    find_model_folder,
    is_compressed,
    load_source,
    loses_bits,
)
from moacompress.models.stored_plan import stored_plan
from moacompress.rules.formats import DTYPE_BYTES, dtype_name
from moacompress.rules.plan import Plan
from moacompress.runtime.gate import other_gates
from moacompress.runtime.hf.attaching import attach, attached_plan, detach
from moacompress.runtime.linear import use_kernels

DENSE_GIVEN = (
    "{folder} is a model but not a compressed one; compress it first (`moacompress compress {folder} --budget 25% -o OUT`) and "
    "give OUT here"
)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded compressed checkpoint.

    Attributes:
        folder: where it lies.
        model: its weights; where they are the dense model's, the plan on them changes, see `put_on`.
        tokenizer: its tokenizer.
        plan: its plan.
        device: where the model was asked to be: a torch device, or a device map.
        dense: the dense model that the plan was made for, where the checkpoint's own weights are not that any more; None where
            they are.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    dense: PreTrainedModel | None = None
    device: str = "cpu"
    trust_remote_code: bool = False

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the weights."""
        return weights_fingerprint(self.model)

    @cached_property
    def dense_weights(self) -> str:
        """Fingerprint of the dense model's weights."""
        return self.weights if self.dense is None else weights_fingerprint(self.dense)

    @cached_property
    def has_other_weights(self) -> bool:
        """Whether the weights are not those that the plan was made for, and none of its notes says why they would not be."""
        given, dtype = self.plan.model.weights_fingerprint, str(self.model.dtype).removeprefix("torch.")
        if not given or self.plan.shares or self.plan.changed_weights or loses_bits(self.plan.model.dtype, dtype):
            return False
        return self.weights != given

    @property
    def _base(self) -> PreTrainedModel:
        return self.model if self.dense is None else self.dense

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """What scores depend on besides plan and prompt: weights, dtype, kind of device."""
        own = () if self.dense is None else (self.weights,)
        return self.dense_weights, *own, str(self.model.dtype), input_device(self.model).type

    def put_on(self, plan: Plan) -> PreTrainedModel:
        """Returns the dense model under `plan`."""
        return _under(self._base, plan)

    def as_stored(self) -> PreTrainedModel:
        """Returns the checkpoint's own weights under its own plan."""
        return _under(self.model, self.plan)

    def without_plan(self) -> PreTrainedModel:
        """Returns the dense model as transformers runs it."""
        return detach(self._base)

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Refuses prompts that are longer than what the model was made for.

        Raises:
            DataError: with both numbers.
        """
        context = context_length(self.model)
        if context and max(lengths) > context:
            raise DataError(
                f"prompts of {max(lengths):,} tokens were asked for; the model was made for at most {context:,}"
            )


def _under(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    current = attached_plan(model)
    if current is None or current.key() != plan.key():
        attach(detach(model), plan)
    return model


def compressed_folder(target: Path, of_dense: str = DENSE_GIVEN) -> Path:
    """Returns the compressed checkpoint that `target` is or holds under `model/`.

    `target`: the checkpoint, or the folder of a run. `of_dense`: what is said of a dense model, with its `{folder}`.

    Raises:
        UsageError: there is none; says what `target` is instead.
    """
    folder = find_model_folder(target)
    if folder is None:
        if not target.exists():
            raise UsageError(f"{target} does not exist; give a compressed model, or the folder of a run")
        raise UsageError(f"{target} is no compressed checkpoint and holds none under model/; no config.json was found")
    if not is_compressed(folder):
        raise UsageError(of_dense.format(folder=folder))
    return folder


def profile_folder(checkpoint: Path, given: str | Path | None) -> Path | None:
    """Returns the profile that is given, or else the one beside a checkpoint, as a run leaves it; None where there is none."""
    if given is not None:
        return Path(given)
    beside = (place / PROFILE_FOLDER for place in (checkpoint, checkpoint.parent))
    return next((place for place in beside if place.is_dir()), None)


def load_checkpoint(folder: Path, dtype: str, device: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Loads a compressed checkpoint.

    Args:
        folder: as `compressed_folder` returns it.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's.
        device: torch device, or a device map.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.

    Raises:
        UsageError: another dtype, or a device that is not here.
        PlanError: its plan is missing, damaged, or newer than is known; or plan.json or the gates beside it are others.
        ModelError: it cannot be loaded, or not without code of its own.
    """
    placed = checked_placement(device)
    dtype = dtype_name(dtype)
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPE_BYTES)}")
    plan = stored_plan(folder)
    check_family(folder, trust_remote_code)
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, trust_remote_code=trust_remote_code, **placed
        )
        model.eval().requires_grad_(False)
        if not placed:
            model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except MoaCompressError:
        raise
    except Exception as error:  # damaged files raise whatever their parsers raise
        raise ModelError(f"cannot load the compressed model {folder}: {one_line(error)}") from error
    plan = _with_own_gates(folder, model, plan)
    return Checkpoint(folder, model, tokenizer, plan, device=device, trust_remote_code=trust_remote_code)


def _with_own_gates(folder: Path, model: PreTrainedModel, plan: Plan) -> Plan:
    """Returns a checkpoint's plan with the gates of its weights at hand.

    Those of the file beside `plan.json` are the same, and of the layers too in which no rule selects.

    Raises:
        PlanError: they are not the same.
    """
    if plan.gate_weights is None:
        attached = attached_plan(model)
        return plan if attached is None else replace(attached, seen=plan.seen)
    layers = other_gates(attention_modules(model), plan.gate_weights, plan.model.dtype)
    if layers:
        file = gates_file(folder / PLAN_FILE)
        raise PlanError(
            f"the gates in {file} are not those in the checkpoint's weights, which are the ones that run: they differ in layer "
            f"{layers[0]}{f' and {len(layers) - 1} more' if layers[1:] else ''}; remove {file.name} to go by the weights, or "
            "export the plan that is meant (moacompress export MODEL PLAN -o DIR)"
        )
    return plan


def _rounding(plan: Plan) -> dict[str, str]:
    """Returns how the weights were rounded that a plan was made for, as `load_source` takes it."""
    notes = plan.quality.get("rounded_weights")
    notes = notes if isinstance(notes, dict) else {}
    found = {name: notes.get(name) for name in ("weights", "head_weights")}
    return {name: kind for name, kind in found.items() if isinstance(kind, str) and kind in ROUNDING}


def with_dense(checkpoint: Checkpoint, dense: str | Path) -> Checkpoint:
    """Returns a checkpoint with the dense model that its plan was made for.

    `dense`: hub id, folder, or `.gguf` file; loaded in the checkpoint's dtype.

    Raises:
        PlanError: it is another model than the plan was made for.
        ModelError, UsageError: it cannot be loaded.
    """
    dtype = str(checkpoint.model.dtype).removeprefix("torch.")
    source = load_source(
        dense,
        dtype=dtype,
        device=checkpoint.device,
        trust_remote_code=checkpoint.trust_remote_code,
        **_rounding(checkpoint.plan),
    )
    checkpoint.plan.check_model(source.shape, weights=True)
    use_kernels(source.model)
    return replace(checkpoint, dense=source.model)

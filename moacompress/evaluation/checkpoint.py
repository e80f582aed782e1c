"""The compressed checkpoint that is evaluated: finding it, loading it, and putting other plans on its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.artefact_names import PLAN_FILE
from moacompress.core.errors import DataError, MoaCompressError, ModelError, UsageError, one_line
from moacompress.models.fingerprint import weights_fingerprint, weights_like
from moacompress.models.source import find_model_folder, is_compressed
from moacompress.rules.formats import DTYPE_BYTES
from moacompress.rules.plan import WEIGHTS_VERSION, Plan, weights_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """A loaded compressed checkpoint.

    Attributes:
        folder: where it lies.
        model: its weights; the plan on them changes, see `put_on`.
        tokenizer: its tokenizer.
        plan: its plan.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the weights, in the newest version."""
        return weights_fingerprint(self.model)

    def weights_like(self, given: str) -> str:
        """Returns the fingerprint of the weights in the version of a given one; see `fingerprint.weights_like`."""
        return self.weights if weights_version(given) == WEIGHTS_VERSION else weights_like(self.model, given)

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """What scores depend on besides plan and prompt: weights, dtype, kind of device.

        Weights are known as to the plan, so that scores under a fingerprint of an older version are found again.
        """
        weights = self.weights_like(self.plan.model.weights_fingerprint)
        return weights, str(self.model.dtype), self.model.device.type

    @property
    def is_repaired(self) -> bool:
        """Whether an export refitted its weights to the plan."""
        notes = self.plan.provenance.get("repair")
        return isinstance(notes, dict) and notes.get("penalty") is not None

    def put_on(self, plan: Plan) -> PreTrainedModel:
        """Returns the model under `plan`; nothing is done where it runs under it already."""
        from moacompress.runtime import attach, detach
        from moacompress.runtime.hf.attaching import attached_plan

        current = attached_plan(self.model)
        if current is None or current.key() != plan.key():
            attach(detach(self.model), plan)
        return self.model

    def without_plan(self) -> PreTrainedModel:
        """Returns the dense model as transformers runs it."""
        from moacompress.runtime import detach

        return detach(self.model)

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Refuses prompts that are longer than what the model was made for.

        Raises:
            DataError: with both numbers.
        """
        context = int(getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 0)
        if context and max(lengths) > context:
            raise DataError(
                f"prompts of {max(lengths):,} tokens were asked for; the model was made for at most {context:,}"
            )


def compressed_folder(target: Path) -> Path:
    """Returns the compressed checkpoint that `target` is or holds under `model/`.

    Raises:
        UsageError: there is none; says what `target` is instead.
    """
    folder = find_model_folder(target)
    if folder is None:
        raise UsageError(f"{target} is no compressed checkpoint and holds none under model/; no config.json was found")
    if not is_compressed(folder):
        raise UsageError(
            f"{folder} is a model but not a compressed one; compress it first (`moacompress compress {folder} "
            "--budget 25% -o OUT`) and evaluate OUT, which measures the dense model too"
        )
    return folder


def load_checkpoint(folder: Path, dtype: str, device: str) -> Checkpoint:
    """Loads a compressed checkpoint.

    Args:
        folder: as `compressed_folder` returns it.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's.
        device: torch device.

    Raises:
        UsageError: another dtype.
        PlanError: its plan is missing, damaged, or newer than is known.
        ModelError: it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moacompress.runtime.hf.loading  # noqa: F401  (in case the entry point is switched off)

    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPE_BYTES)}")
    plan = Plan.load(folder / PLAN_FILE)
    weights_version(plan.model.weights_fingerprint)
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted).eval()
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except MoaCompressError:
        raise
    except Exception as error:  # damaged files raise whatever their parsers raise
        raise ModelError(f"cannot load the compressed model {folder}: {one_line(error)}") from error
    return Checkpoint(folder, model, tokenizer, plan)

"""Which weights a heal trains, and what a checkpoint would hold of them: merged, and in the checkpoint's own dtype."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moacompress.core.errors import UsageError
from moacompress.models.modules import decoder_layers
from moacompress.recipe import HealRecipe
from moacompress.rules.plan import Plan
from moacompress.runtime.gate import TokenGate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "reuse": 5e-5, "gates": 1e-3}
"""Largest learning rate where none is asked for."""


def check_installed(train: str) -> None:
    """Refuses to train where a package of the extra `heal` is missing.

    Args:
        train: what is trained, see `HealRecipe`.

    Raises:
        UsageError: names the package.
    """
    for name in ("accelerate", *(["peft"] if train == "lora" else [])):
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"heal needs the package {name}, which is not installed: `pip install 'moacompress[heal]'`"
            )


def reuse_layers(plan: Plan) -> tuple[int, ...]:
    """Returns the layers that share the attention of an earlier one."""
    return tuple(layer for layer, share in enumerate(plan.shares) if share is not None)


def distilled_layers(plan: Plan) -> tuple[int, ...]:
    """Returns the layers whose states are distilled: those that reuse attention, all where none does."""
    return reuse_layers(plan) or tuple(range(plan.model.layers))


def check_trainable(plan: Plan, train: str) -> None:
    """Refuses what there is nothing of.

    Raises:
        UsageError: layers that reuse attention, of a plan without any.
    """
    if train == "reuse" and not reuse_layers(plan):
        raise UsageError(
            "this plan shares no attention, so there are no reuse layers to train; use --train full or lora"
        )
    if train == "gates" and not plan.selects:
        raise UsageError(
            "no KV head of this plan keeps tokens by a gate, so there is none to train; use --train full or lora"
        )


def make_trainable(model: PreTrainedModel, plan: Plan, heal: HealRecipe, seed: int) -> Any:
    """Returns the model with the weights to be trained asking for gradients: itself, or with LoRA around it.

    Args:
        model: a model under a plan, all weights frozen.
        plan: the plan.
        heal: what is trained.
        seed: of what LoRA begins with.
    """
    if heal.train == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        chosen = LoraConfig(
            task_type="CAUSAL_LM", r=heal.rank, lora_alpha=2 * heal.rank, lora_dropout=0.0, target_modules="all-linear"
        )
        return get_peft_model(model, chosen)
    if heal.train == "gates":
        for module in model.modules():
            if isinstance(module, TokenGate):
                module.trained = True
                module.weight.requires_grad_(True)  # what a bias adds to all scores of a KV head chooses nothing
        return model
    parts = [model] if heal.train == "full" else [decoder_layers(model)[layer] for layer in reuse_layers(plan)]
    for part in parts:
        part.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, TokenGate):  # nothing that is trained depends on its scores but by which tokens are kept
            module.requires_grad_(False)
    return model


@dataclass(frozen=True)
class TrainedWeight:
    """A weight of the checkpoint that training changes.

    Attributes:
        name: in the checkpoint.
        parameter: the weight of the model that stands for it.
        lora: the LoRA layer around it, or None where it is trained itself.
    """

    name: str
    parameter: torch.nn.Parameter
    lora: Any = None

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns what a checkpoint in `dtype` would hold."""
        value = self.parameter.detach()
        if self.lora is not None:
            value = value.float() + self.lora.get_delta_weight(self.lora.active_adapters[0]).detach().float()
        return value.to(dtype)


def trained_weights(model: Any) -> list[TrainedWeight]:
    """Returns the weights that `make_trainable` chose, each once."""
    if not hasattr(model, "get_base_model"):
        return [TrainedWeight(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    from peft.tuners.lora import LoraLayer

    modules: Iterable[tuple[str, Any]] = model.get_base_model().named_modules()
    layers: list[tuple[str, Any]] = [(name, layer) for name, layer in modules if isinstance(layer, LoraLayer)]
    return [TrainedWeight(f"{name}.weight", layer.get_base_layer().weight, layer) for name, layer in layers]


@contextmanager
def as_written(model: Any, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """Yields the model as a checkpoint in `dtype` would be, LoRA merged; afterwards it is as it was, to the bit.

    Args:
        model: as `make_trainable` returned it.
        dtype: the checkpoint's: small steps are lost where it rounds them away, so it is measured with them rounded.
    """
    adapted = hasattr(model, "get_base_model")
    weights = trained_weights(model)
    before = [weight.parameter.data for weight in weights]
    try:
        for weight in weights:
            weight.parameter.data = weight.value(dtype).to(weight.parameter.dtype)
        with model.disable_adapter() if adapted else nullcontext():
            yield model.get_base_model() if adapted else model
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.parameter.data = data


def written_tensors(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint in `dtype` would hold of the trained weights, by name, on the host."""
    return {weight.name: weight.value(dtype).cpu().contiguous().clone() for weight in trained_weights(model)}

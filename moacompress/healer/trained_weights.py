"""Which weights a heal trains, and what a checkpoint would hold of them: merged, and in the checkpoint's own dtype."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from moacompress.core.errors import UsageError
from moacompress.models.block_layers import (
    BlockLinear,
    block_weights,
    dense_weight,
    kind_of,
    put_numbers,
    with_dense_weight,
)
from moacompress.models.modules import decoder_layers
from moacompress.recipe_sections import HealRecipe
from moacompress.rules.plan import Plan
from moacompress.runtime.gate import TokenGate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "reuse": 5e-5, "gates": 1e-3}
"""Largest learning rate where none is asked for."""


def check_installed(train: str) -> None:
    """Refuses to train where a package of the extra `heal` is missing.

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


def linear_layers(model: PreTrainedModel, modules: Sequence[str] | None = None) -> list[str]:
    """Returns the full names of the linear layers that LoRA is put around, not the output layer.

    By last names (`modules`) alone PEFT would also find experts that are one tensor and projections that a plan has no use for.
    """
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and (modules is None or name.rpartition(".")[2] in modules)
    ]


def check_trainable(plan: Plan, heal: HealRecipe, model: PreTrainedModel) -> None:
    """Refuses to train what the plan or the model does not have.

    Raises:
        UsageError: no layers that reuse attention, no gates, or linear layers that are not there or not for LoRA.
    """
    train = heal.train
    if heal.modules is not None:
        if train != "lora":
            raise UsageError(f"--modules names the layers that LoRA is trained in; it says nothing of --train {train}")
        layers = {name.rpartition(".")[2] for name in linear_layers(model)}
        unknown = sorted(set(heal.modules) - layers)
        if unknown:
            raise UsageError(
                f"the model has no linear layers called {unknown[0][:60]!r} to train; it has {', '.join(sorted(layers))}"
            )
    if train == "reuse" and not reuse_layers(plan):
        raise UsageError(
            "this plan shares no attention, so there are no reuse layers to train; use --train full or lora"
        )
    if train == "gates" and not plan.selects:
        raise UsageError(
            "no KV head of this plan keeps tokens by a gate, so there is none to train; use --train full or lora"
        )


def make_trainable(model: PreTrainedModel, plan: Plan, heal: HealRecipe, seed: int) -> Any:
    """Returns a frozen model under a plan with trained weights that ask for gradients: itself, or with LoRA around it."""
    if heal.train == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        chosen = LoraConfig(
            task_type="CAUSAL_LM",
            r=heal.rank,
            lora_alpha=2 * heal.rank,
            lora_dropout=0.0,
            target_modules=linear_layers(model, heal.modules),
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
        _train(part)
    for module in model.modules():
        if isinstance(module, TokenGate):  # nothing that is trained depends on its scores but by which tokens are kept
            module.requires_grad_(False)
    return model


def _train(part: torch.nn.Module) -> None:
    """Makes a part of a model ask for gradients; linear layers in blocks get numbers for that, in float32."""
    for module in [*part.modules()]:
        if isinstance(module, BlockLinear):
            put_numbers(module, dense_weight(module))
    for parameter in part.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class TrainedWeight:
    """A weight of the checkpoint that training changes."""

    name: str  # in the checkpoint
    parameter: torch.nn.Parameter  # of the model
    lora: Any = None  # the LoRA layer around it, where it is not trained itself
    blocks: BlockLinear | None = None  # the layer whose blocks it is in, where it is not of numbers

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        own = self.blocks
        return tuple(self.parameter.shape) if own is None else (own.out_features, own.in_features)

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns what a checkpoint in `dtype` would hold."""
        value = self.parameter.detach() if self.blocks is None else dense_weight(self.blocks)
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
    found = []
    for name, layer in layers:
        own = layer.get_base_layer()
        blocks = own if isinstance(own, BlockLinear) and kind_of(own) is not None else None
        found.append(TrainedWeight(f"{name}.weight", own.weight, layer, blocks))
    return found


@contextmanager
def as_written(model: Any, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """Yields the model as a checkpoint in `dtype` would be, LoRA merged; afterwards it is as it was, to the bit.

    Small steps are lost where the dtype rounds them away, so the model is measured with them rounded.
    """
    adapted = hasattr(model, "get_base_model")
    of_numbers, in_blocks = list[TrainedWeight](), list[TrainedWeight]()
    for weight in trained_weights(model):
        (of_numbers if weight.blocks is None else in_blocks).append(weight)
    before = [weight.parameter.data for weight in of_numbers]
    with ExitStack() as stack:
        try:
            for weight in of_numbers:
                weight.parameter.data = weight.value(dtype).to(weight.parameter.dtype)
            for weight in in_blocks:
                value = weight.value(dtype).to(_computes_in(model))
                stack.enter_context(with_dense_weight(cast(BlockLinear, weight.blocks), value))
            if adapted:
                stack.enter_context(model.disable_adapter())
            yield model.get_base_model() if adapted else model
        finally:
            for weight, data in zip(of_numbers, before, strict=True):
                weight.parameter.data = data


def _computes_in(model: Any) -> torch.dtype:
    """Returns the dtype of a model's own numbers; adapters have theirs."""
    own: torch.nn.Parameter = next(
        one for one in model.parameters() if one.is_floating_point() and not one.requires_grad
    )
    return own.dtype


def written_tensors(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint in `dtype` would hold of the trained weights, by name, on the host."""
    return {weight.name: weight.value(dtype).cpu().contiguous().clone() for weight in trained_weights(model)}


def put_written(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives a checkpoint's model what `written_tensors` returned; layers in blocks become plain linear layers of them."""
    held, kinds = model.state_dict(), block_weights(model)
    for name, tensor in tensors.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if name in kinds and isinstance(layer, BlockLinear):
            put_numbers(layer, tensor.to(layer.weight.device))
        else:
            held[name].copy_(tensor)

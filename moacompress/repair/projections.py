"""Closed-form repair: the weights of a model's attention outputs are refitted to what a plan leaves of its attention.

Under a plan a layer's attention gives O' where the dense model's gives O. The layer's output projection W becomes

    W' = W + D,   D = argmin sum_i |R_i - O'_i D|^2 + penalty * m * |D|^2,   R = (O W + b) - (O' W + b)

over tokens i of calibration samples, with m the mean diagonal of O'^T O'. So W' minimizes `|O W - O' W'|^2` with a ridge around
W, as least-squares reconstruction does in pruning (SparseGPT, arXiv 2301.00774, section 3). Layers are refitted in order: O'
comes from a model whose earlier layers are refitted already, O from the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import read_through, replaced
from moacompress.core.errors import ModelError
from moacompress.core.progress import SILENT, Progress
from moacompress.models.block_layers import dense_weight, kind_of, with_dense_weight
from moacompress.models.least_squares import Normal
from moacompress.models.modules import attention_modules, decoder_layers
from moacompress.models.placement import check_one_device, input_device
from moacompress.rules.plan import Plan
from moacompress.runtime.sharing.shared_keys import SHARED_KEYS, AnchorKeys

Weights = dict[str, Tensor]
"""Tensors by the name of the parameter that they are for."""


@dataclass(frozen=True)
class OutputProjection:
    """The linear layer that an attention module ends with.

    Attributes:
        name: of the module in the model.
        module: the module, a `Linear` or a `Conv1D` of transformers.
        dtype: what the model computes in.
    """

    name: str
    module: Any
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The weight as it multiplies rows from the right, `[inputs, outputs]`."""
        return self.module.weight.detach() if isinstance(self.module, Conv1D) else self._own().T

    def _own(self) -> Tensor:
        """The weight `[outputs, inputs]`, in the dtype that is computed in."""
        weight = dense_weight(self.module)
        return weight if kind_of(self.module) is None else weight.to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Returns what the module makes of rows, bias included."""
        y = x @ self.weight
        return y if self.module.bias is None else y + self.module.bias.detach()

    def changed(self, change: Tensor, dtype: torch.dtype) -> Weights:
        """Returns its parameters after a change, in the checkpoint's dtype.

        The change is float64 `[inputs, outputs]`, with one more row for the bias where there is one.
        """
        weight = (self.weight.double() + change[: len(self.weight)]).to(dtype)
        found = {
            f"{self.name}.weight": weight.contiguous() if isinstance(self.module, Conv1D) else weight.T.contiguous()
        }
        if self.module.bias is not None:
            found[f"{self.name}.bias"] = (self.module.bias.detach().double() + change[-1]).to(dtype)
        return found


@dataclass
class PassState:
    """How far a forward pass of a sample is.

    Attributes:
        returned: what the last layer returned.
        shared_keys: what anchors have shared to layers that share their attention; see `runtime.sharing.shared_keys`.
    """

    returned: Any = None
    shared_keys: AnchorKeys = field(default_factory=lambda: AnchorKeys(with_gradients=False))


class _Stop(Exception):
    """Ends a forward pass early."""


def output_projections(model: PreTrainedModel) -> list[OutputProjection]:
    """Returns the output projection of every layer's attention in a dense model: the last linear layer that it calls.

    Raises:
        ModelError: a layer that has none, or two layers that have the same.
    """
    names = {id(module): name for name, module in model.named_modules()}
    called: list[list[Any]] = [[] for _ in attention_modules(model)]

    def note(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: called[layer].append(module)

    with ExitStack() as stack:
        for layer, attention in enumerate(attention_modules(model)):
            for module in attention.modules():
                if isinstance(module, torch.nn.Linear | Conv1D):
                    stack.callback(module.register_forward_hook(note(layer)).remove)
        read_through(model, torch.zeros(2, dtype=torch.int64))
    for layer, modules in enumerate(called):
        if not modules:
            raise ModelError(f"the attention of layer {layer} calls no linear layer; it cannot be repaired")
    found = [OutputProjection(names[id(modules[-1])], modules[-1], model.dtype) for modules in called]
    if len({id(one.module) for one in found}) < len(found):
        raise ModelError("two layers have the same output projection; such a model cannot be repaired")
    return found


@contextmanager
def with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives a model other weights for the length of a `with`; those in place of blocks are stored as the numbers they are."""
    parameters = dict(model.named_parameters())
    in_blocks = {name for name in weights if parameters[name].dtype == torch.uint8}
    before = {name: parameters[name].detach().clone() for name in weights if name not in in_blocks}
    try:
        with ExitStack() as stack:
            for name in in_blocks:
                module: Any = model.get_submodule(name.rpartition(".")[0])
                stack.enter_context(with_dense_weight(module, weights[name].to(model.dtype)))
            _copy(parameters, {name: weights[name] for name in before})
            yield
    finally:
        _copy(parameters, before)


def _copy(parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)


def repaired_weights(
    model: PreTrainedModel,
    plan: Plan,
    samples: Sequence[Sample],
    penalties: Sequence[float],
    dtype: torch.dtype,
    progress: Progress = SILENT,
) -> list[Weights]:
    """Returns the refitted output projections of all layers, for every penalty: the weight of the ridge.

    Every sample goes through every layer once dense and, for every penalty, once and up to its output projection once more
    under the plan. Between layers one hidden state of every sample is kept for each of these. The model is dense again, with
    its own weights, afterwards. The checkpoint will hold the weights in `dtype`: layers see those before them rounded to it.
    """
    from moacompress import runtime

    projections = output_projections(model)
    check_one_device(model, "a repair")
    device = input_device(model)
    ids = [torch.from_numpy(np.ascontiguousarray(sample.input_ids, np.int64)) for sample in samples]
    dense = [PassState() for _ in samples]
    states = [[PassState() for _ in samples] for _ in penalties]
    found: list[Weights] = [{} for _ in penalties]
    progress.start("repairing", len(projections))
    try:
        for layer, projection in enumerate(projections):
            targets = []
            for number, tokens in enumerate(ids):
                targets.append(_through(model, tokens, layer, dense[number], projection))
            runtime.attach(model, plan)
            for index, penalty in enumerate(penalties):
                normal: Normal | None = None
                for number, tokens in enumerate(ids):
                    x = _attended(model, tokens, layer, states[index][number], projection)
                    residual = targets[number] - projection.product(x)
                    if projection.module.bias is not None:
                        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
                    normal = normal or Normal(x.shape[1], residual.shape[1], device)
                    normal.add(x, residual, x.new_ones(len(x)))
                assert normal is not None
                changed = projection.changed(normal.solve(penalty), dtype)
                found[index].update(changed)
                with with_weights(model, changed):
                    for number, tokens in enumerate(ids):
                        _through(model, tokens, layer, states[index][number], projection)
            runtime.detach(model)
            progress.step(f"layer {layer + 1} of {len(projections)}")
    finally:
        runtime.detach(model)
    progress.done()
    return found


def _through(model: PreTrainedModel, ids: Tensor, layer: int, state: PassState, projection: OutputProjection) -> Tensor:
    """Takes a pass of `ids`, int64 `[n]`, through one more layer; returns what its output projection gives, `[n, outputs]`."""
    kept: list[Any] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append(output)

    def end(module: Any, inputs: Any, output: Any) -> None:
        kept.append(output)
        raise _Stop

    handles = [
        projection.module.register_forward_hook(keep),
        decoder_layers(model)[layer].register_forward_hook(end),
    ]
    _run_until(model, ids, layer, state, handles)
    target: Tensor = kept[0]
    state.returned = kept[1]
    return target.reshape(-1, target.shape[-1])


def _attended(
    model: PreTrainedModel, ids: Tensor, layer: int, state: PassState, projection: OutputProjection
) -> Tensor:
    """Returns what a layer's output projection gets, `[n, inputs]`; arguments are those of `_through`."""
    kept: list[Tensor] = []

    def end(module: Any, inputs: Any) -> None:
        kept.append(inputs[0])
        raise _Stop

    _run_until(model, ids, layer, state, [projection.module.register_forward_pre_hook(end)])
    return kept[0].reshape(-1, kept[0].shape[-1])


def _run_until(model: PreTrainedModel, ids: Tensor, layer: int, state: PassState, handles: Sequence[Any]) -> None:
    """Runs a forward pass whose layers before `layer` return at once what the last of them did, until a hook ends it."""

    def given(*args: Any, **kwargs: Any) -> Any:
        return state.returned

    def passed_on(module: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, SHARED_KEYS: state.shared_keys} if SHARED_KEYS in kwargs else kwargs

    try:
        with ExitStack() as stack:
            decoder: Any = model.get_decoder()
            stack.callback(decoder.register_forward_pre_hook(passed_on, with_kwargs=True).remove)
            for module in decoder_layers(model)[:layer]:
                stack.enter_context(replaced(module, given))
            read_through(model, ids)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()

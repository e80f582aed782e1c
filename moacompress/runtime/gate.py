"""The gate of an attention layer: it scores tokens by what enters the layer, and its weights are saved with the model's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.kernels.gate_scores import rounded_scores, scored
from moacompress.models.placement import in_memory
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.plan import Plan
from moacompress.runtime import autocast


class TokenGate(nn.Module):
    """A linear probe for each KV head."""

    added_by_moacompress = True
    trained = False
    """Whether its weights learn: its scores then have gradients, which `from_pretrained`'s `requires_grad` does not ask for."""

    def __init__(
        self, kv_heads: int, inputs: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kv_heads, inputs, dtype=dtype, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(kv_heads, dtype=dtype, device=device), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns scores in 1/256, int16 `[rows, kv_heads, tokens]`; what is not a number is the least.

        `hidden`: what enters the layer's attention, `[rows, tokens, inputs]`.
        """
        return rounded_scores(gate_scores(hidden, self.weight, self.bias).transpose(1, 2))


NAME = "gate"
"""What it is called among the parts of an attention module."""


def put_gates(
    modules: Sequence[nn.Module],
    plan: Plan,
    inputs: int,
    dtype: torch.dtype,
    *,
    devices: Sequence[torch.device] | None = None,
    empty: bool = False,
) -> None:
    """Puts a gate on the attention of every layer in which a rule selects, in the dtype and on the device of its values.

    `dtype`: of the gates of a layer whose own weights are all in blocks. `devices`: on which each layer computes, where its
    weights may be offloaded; by default where they are. `empty`: whether their weights are to be read from a checkpoint, and
    not the plan's.

    Raises:
        PlanError: the gates are not at hand, or for another number of inputs.
        UnsupportedError: an attention module that has such a part already.
    """
    gates = None if empty else gates_of(plan, inputs)
    for layer, (module, rules) in enumerate(zip(modules, plan.rules, strict=True)):
        if not any(rule.selects for rule in rules):
            continue
        check_room([module])
        own = [*module.parameters()]
        of_dtype = next((parameter.dtype for parameter in own if parameter.is_floating_point()), dtype)
        gate = TokenGate(plan.model.kv_heads, inputs, of_dtype, own[0].device if devices is None else devices[layer])
        if gates is not None:
            with torch.no_grad():
                gate.weight.copy_(torch.from_numpy(gates.weight[layer]))
                gate.bias.copy_(torch.from_numpy(gates.bias[layer]))
        module.add_module(NAME, gate)


def gates_of(plan: Plan, inputs: int) -> GateWeights | None:
    """Returns the gates that a plan's KV heads choose by; None where none chooses.

    Raises:
        PlanError: the gates are not at hand, or for another number of inputs.
    """
    gates = plan.gate_weights
    if plan.selects and gates is None:
        raise PlanError(
            f"KV heads of the plan keep tokens that the gates {plan.gates} choose, and these are not at hand: they are in a "
            "file that the search writes beside the plan, plan.gates.safetensors for plan.json"
        )
    if gates is not None and gates.weight.shape[2] != inputs:
        raise PlanError(f"the gates take {gates.weight.shape[2]} numbers of a token, the model's layers get {inputs}")
    return gates


def check_room(modules: Sequence[nn.Module]) -> None:
    """Refuses attention modules on which no gate can be put.

    Raises:
        UnsupportedError: one has a part of that name.
    """
    for module in modules:
        if hasattr(module, NAME) and not isinstance(getattr(module, NAME), TokenGate):
            raise UnsupportedError(
                f"{type(module).__name__} has a part {NAME!r} of its own, so no gate can choose tokens there; profile without "
                "--gates, or search with --no-gates"
            )


def gates_on(modules: Sequence[nn.Module], others: GateWeights | None = None) -> GateWeights | None:
    """Returns the weights of the gates that are on attention modules; None where none has one.

    `others`: the weights of gates of layers that have none, zero by default.
    """
    gates = [getattr(module, NAME, None) for module in modules]
    there = [gate for gate in gates if isinstance(gate, TokenGate)]
    if not there:
        return None

    def stacked(name: str) -> npt.NDArray[np.float32]:
        found = np.zeros((len(gates), *getattr(there[0], name).shape), np.float32)
        if others is not None:
            found[:] = getattr(others, name)
        for layer, gate in enumerate(gates):
            if isinstance(gate, TokenGate):
                with in_memory(gate):
                    found[layer] = getattr(gate, name).detach().float().cpu().numpy()
        return found

    return GateWeights(stacked("weight"), stacked("bias"))


def other_gates(modules: Sequence[nn.Module], gates: GateWeights, dtype: str) -> list[int]:
    """Returns the layers whose gates are others than those given.

    `gates`: of all layers; of layers without a gate they are not looked at. `dtype`: that the modules' gates were saved in.
    """
    found = []
    for layer, module in enumerate(modules):
        gate = getattr(module, NAME, None)
        if not isinstance(gate, TokenGate):
            continue
        with in_memory(gate):
            for own, given in ((gate.weight, gates.weight[layer]), (gate.bias, gates.bias[layer])):
                rounded = torch.from_numpy(given).to(getattr(torch, dtype)).to(own.device, own.dtype)
                if not torch.equal(rounded, own.detach()):
                    found.append(layer)
                    break
    return found


def take_gates_off(modules: Sequence[nn.Module]) -> None:
    """Takes away what `put_gates` put there."""
    for module in modules:
        if isinstance(getattr(module, NAME, None), TokenGate):
            delattr(module, NAME)


def trained_scores(gate: nn.Module, hidden: Tensor) -> Tensor | None:
    """Returns what a gate that is being trained scores, not rounded, `[rows, kv_heads, tokens]`; None where it is not.

    Gradients reach its weights, and not what enters the layer.
    """
    if not (isinstance(gate, TokenGate) and gate.trained and torch.is_grad_enabled()):
        return None
    return _scored(hidden.detach(), gate.weight, gate.bias).transpose(1, 2)


def gate_scores(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns `weight . hidden + bias` in float32, `[..., kv_heads]`, without a gradient's way."""
    return _scored(hidden.detach(), weight.detach(), bias.detach())


def _scored(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not autocast.is_on(hidden):
        return scored(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):  # scores in bfloat16 would choose other tokens
        return scored(hidden, weight, bias)

"""What gates choose in a sample: for every rule that selects, how long each token is kept that has left the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moacompress.kernels.arguments import Choices
from moacompress.kernels.dispatch import backend_on_host
from moacompress.models.modules import attention_modules, given_hidden
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.gate import gate_scores, rounded_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEVER = (1 << 31) - 1


def choices_of(table: RuleTable, scores: Tensor) -> Choices | None:
    """Returns what rules choose in a sample; None where none of them selects.

    Args:
        table: the rules, of a layer without a window of its own, with a numpy array.
        scores: of the tokens, int16 `[kv_heads, tokens]`.
    """
    of_rule = np.full(len(table), -1, np.int64)
    ways: dict[tuple[int, int, int], int] = {}
    for number, rule in enumerate(table.rules):
        if rule.selects and not table.span.native_window[number]:
            of_rule[number] = ways.setdefault((rule.sink, rule.select_alpha, rule.select_beta_q), len(ways))
    if not ways:
        return None
    there = scores.cpu().numpy().astype(np.int64)
    turnover = backend_on_host().turnover
    gone = np.zeros((len(there), len(ways), there.shape[1]), np.int32)
    for (sink, alpha, beta_q), way in ways.items():
        for head, of_head in enumerate(there):
            gone[head, way, sink:] = np.minimum(turnover(of_head[sink:], alpha, beta_q).gone, _NEVER)
    return Choices(torch.from_numpy(gone), torch.from_numpy(of_rule))


@contextmanager
def choosing(
    model: PreTrainedModel,
    gates: GateWeights | None,
    table_of: Callable[[int], RuleTable],
    found: dict[int, Choices | None],
) -> Iterator[None]:
    """Writes down, as a sample goes through the model, what rules choose in every layer; a second time nothing is done anew.

    Args:
        model: dense.
        gates: of its layers; without them nothing is chosen.
        table_of: gives the rules of a layer.
        found: by layer; filled before the layer attends.
    """

    def keep(layer: int, gates: GateWeights) -> Callable[..., None]:
        weight, bias = (torch.from_numpy(part[layer]) for part in (gates.weight, gates.bias))

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer in found:
                return
            hidden = given_hidden(args, kwargs)[0]
            scores = gate_scores(hidden, weight.to(hidden.device), bias.to(hidden.device))
            found[layer] = choices_of(table_of(layer), rounded_scores(scores).T)

        return hook

    with ExitStack() as stack:
        for layer, module in enumerate(attention_modules(model) if gates is not None else ()):
            assert gates is not None
            stack.callback(module.register_forward_pre_hook(keep(layer, gates), with_kwargs=True).remove)
        yield

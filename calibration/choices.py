"""What gates choose in a sample: for every rule that selects, how long each token is kept that has left the window.

Of rules on offer that is asked of every KV head, and of the rules that a layer runs under of the KV head of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import Choices
from moacompress.kernels.dispatch import backend_on_host
from moacompress.models.modules import attention_modules, given_hidden
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.gate import gate_scores, rounded_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEVER = (1 << 31) - 1


def choices_of(table: RuleTable, scores: Tensor, plan: RuleTable | None = None) -> Choices | None:
    """Returns what rules choose in a sample; None where none of them selects.

    Args:
        table: the rules on offer, in their layer, with a numpy array.
        scores: of the tokens, int16 `[kv_heads, tokens]`.
        plan: the rule that each KV head runs under, likewise, or None for the dense model.
    """
    of_rule = np.full(len(table), -1, np.int64)
    ways: dict[tuple[int, int, int], int] = {}
    for number, rule in enumerate(table.rules):
        if rule.selects and not table.span.native_window[number]:
            of_rule[number] = ways.setdefault((rule.sink, rule.select_alpha, rule.select_beta_q), len(ways))
    own_rules = dict(enumerate(plan.rules)) if plan is not None and not plan.span.native_window.any() else {}
    if not ways and not any(rule.selects for rule in own_rules.values()):
        return None
    there = scores.cpu().numpy().astype(np.int64)
    gone = np.zeros((len(there), len(ways), there.shape[1]), np.int32)
    for (sink, alpha, beta_q), way in ways.items():
        for head, of_head in enumerate(there):
            gone[head, way, sink:] = _gone(of_head[sink:], alpha, beta_q)
    own = np.zeros(there.shape, np.int32)
    for head, rule in own_rules.items():
        if rule.selects:
            own[head, rule.sink :] = _gone(there[head, rule.sink :], rule.select_alpha, rule.select_beta_q)
    return Choices(torch.from_numpy(gone), torch.from_numpy(of_rule), torch.from_numpy(own) if own.any() else None)


def _gone(scores: Ints, alpha: int, beta_q: int) -> Ints:
    return np.minimum(backend_on_host().turnover(scores, alpha, beta_q).gone, _NEVER)


@contextmanager
def choosing(
    model: PreTrainedModel,
    gates: GateWeights | None,
    table_of: Callable[[int], RuleTable],
    plans: Sequence[RuleTable | None],
    found: dict[int, Choices | None],
) -> Iterator[None]:
    """Writes down, as a sample goes through the model, what rules choose in every layer; a second time nothing is done anew.

    Args:
        model: dense.
        gates: of its layers; without them nothing is chosen.
        table_of: gives the rules on offer of a layer.
        plans: the rule that each KV head of every layer runs under; see `Recording`.
        found: by layer; filled before the layer attends.
    """

    def keep(layer: int, gates: GateWeights) -> Callable[..., None]:
        weight, bias = (torch.from_numpy(part[layer]) for part in (gates.weight, gates.bias))

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer in found:
                return
            hidden = given_hidden(args, kwargs)[0]
            scores = gate_scores(hidden, weight.to(hidden), bias.to(hidden))  # in the dtype that a cache keeps them in
            found[layer] = choices_of(table_of(layer), rounded_scores(scores).T, plans[layer])

        return hook

    with ExitStack() as stack:
        for layer, module in enumerate(attention_modules(model) if gates is not None else ()):
            assert gates is not None
            stack.callback(module.register_forward_pre_hook(keep(layer, gates), with_kwargs=True).remove)
        yield

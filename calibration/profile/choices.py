"""What rules select in a sample: for every rule that selects, when each token outside the window is evicted.

It is asked of every KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import Choices
from moacompress.kernels.dispatch import backend_on_host
from moacompress.kernels.gate_scores import rounded_scores
from moacompress.models.modules import attention_modules, given_hidden
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import competing_tokens
from moacompress.runtime.gate import gate_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEVER = (1 << 31) - 1


def choices_of(table: RuleTable, scores: Tensor) -> Choices | None:
    """Returns what rules select in a sample by the scores of its tokens, int16 `[kv_heads, tokens]`; None where none selects.

    `table` has the rules on offer in a layer, of numpy.
    """
    of_rule = np.full(len(table), -1, np.int64)
    ways: dict[tuple[int, int, int], int] = {}
    for number, rule in enumerate(table.rules):
        if rule.selects and not table.span.native_window[number]:
            of_rule[number] = ways.setdefault((rule.sink, rule.select_alpha, rule.select_beta_q), len(ways))
    if not ways:
        return None
    there = scores.cpu().numpy().astype(np.int64)
    evicted = np.zeros((len(there), len(ways), there.shape[1]), np.int32)
    for way in range(len(ways)):
        first = int(np.flatnonzero(of_rule == way)[0])
        evicted[:, way] = _evicted(RuleTable(np.repeat(table.columns[:, [first]], len(there), axis=1)), there)
    return Choices(torch.from_numpy(evicted), torch.from_numpy(of_rule))


def _evicted(rules: RuleTable, scores: Ints) -> Any:
    """Returns when each KV head's rule evicts tokens as all leave the window, int32 `[kv_heads, tokens]`; 0 of sinks."""
    after = scores.shape[1] - rules.span.sink[None]
    tokens = competing_tokens(rules, np.zeros_like(after), np.maximum(after, 0))
    _, heads = tokens.rows_and_heads
    schedule = backend_on_host().eviction_schedule(tokens, rules, scores[heads, tokens.positions])
    found = np.zeros(scores.shape, np.int32)
    found[heads, tokens.positions] = np.minimum(schedule.evicted, _NEVER)
    return found


@contextmanager
def choosing(
    model: PreTrainedModel,
    gates: GateWeights | None,
    table_of: Callable[[int], RuleTable],
    found: dict[int, Choices | None],
) -> Iterator[None]:
    """Notes in `found`, by layer and before the layer attends, what rules select as a sample goes through the dense model.

    Where layers run again for a backward pass nothing is done. `table_of` gives the rules on offer in a layer. Without gates
    nothing is selected.
    """

    def keep(layer: int, gates: GateWeights) -> Callable[..., None]:
        weight, bias = (torch.from_numpy(part[layer]) for part in (gates.weight, gates.bias))

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer in found:
                return
            hidden = given_hidden(args, kwargs)[0]
            scores = gate_scores(hidden, weight.to(hidden), bias.to(hidden))  # in the dtype that a cache keeps them in
            found[layer] = choices_of(table_of(layer), rounded_scores(scores).T)

        return hook

    with ExitStack() as stack:
        for layer, module in enumerate(attention_modules(model) if gates is not None else ()):
            assert gates is not None
            stack.callback(module.register_forward_pre_hook(keep(layer, gates), with_kwargs=True).remove)
        yield

"""The gates of attention layers: they score tokens by what the projections of queries, keys and values get."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod, register_weight_loader_v2_supported_method
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.kernels.gate_scores import rounded_scores, scored


def holder_of(prefix: str) -> str:
    """Returns the name of what holds a layer: the same for attention and its projections, another one in a tower of images."""
    return prefix.rpartition(".")[0]


class LayerGate(nn.Module):
    """A linear probe for each KV head of a layer, of what enters it; its weights are not numbers until they are loaded.

    Attributes:
        scores: of the tokens that the layer computes now, int16 `[tokens, kv_heads]`; None until they are scored.
    """

    def __init__(self, kv_heads: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((kv_heads, inputs), torch.nan, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.full((kv_heads,), torch.nan, dtype=dtype), requires_grad=False)
        self.scores: torch.Tensor | None = None
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": default_weight_loader})

    def score(self, hidden: torch.Tensor) -> None:
        """Keeps the scores of tokens until they are attended from, by what enters the layer's attention, `[tokens, inputs]`."""
        self.scores = rounded_scores(scored(hidden, self.weight, self.bias))

    def take(self, tokens: int) -> torch.Tensor:
        """Returns the scores of the tokens that are attended from, int16 `[tokens, kv_heads]`, and keeps them no longer.

        So a graph that is compiled has them go from here to there, and nothing to keep at its end.

        Raises:
            UnsupportedError: they were not scored.
        """
        scores, self.scores = self.scores, None
        if scores is None or len(scores) != tokens:
            raise UnsupportedError(
                "vLLM cannot serve this model under a plan with gates: its queries, keys and values come of no layer of the "
                "kind QKVParallelLinear, so there is nothing that gates could score; search a plan without "
                "(`moacompress search --no-gates`)"
            )
        return scores

    def check_loaded(self, layer_name: str) -> None:
        """Refuses weights that the checkpoint does not have.

        Raises:
            PlanError: some are no numbers.
        """
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise PlanError(f"the checkpoint has no weights for the gate of {layer_name}; export it again")


@register_weight_loader_v2_supported_method
class ScoringLinearMethod(UnquantizedLinearMethod):
    """Projections as they are, whose inputs a gate scores: that of what holds them, if there is one when the model runs."""

    def __init__(self, gates: Mapping[str, LayerGate], holder: str) -> None:
        super().__init__()
        self.gates, self.holder = gates, holder

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the projections of `x`, `[tokens, inputs]`."""
        if self.holder in self.gates:
            self.gates[self.holder].score(x)
        found: torch.Tensor = super().apply(layer, x, bias)
        return found

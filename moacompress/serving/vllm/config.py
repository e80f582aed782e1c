"""The quantization config that vLLM makes of a checkpoint's config.json: it holds the plan, and takes attention layers over."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.models.utils import WeightsMapper

from moacompress.serving.vllm.attention import take_over
from moacompress.serving.vllm.base_config import BaseConfig
from moacompress.serving.vllm.gates import ScoringLinearMethod, holder_of
from moacompress.serving.vllm.served_plan import ServedPlan


class PlanConfig(BaseConfig):
    """What a checkpoint with a plan is to vLLM: a quantized one whose weights are as they are.

    Attributes:
        served: the plan.
    """

    def __init__(self, served: ServedPlan) -> None:
        super().__init__()
        self.served = served

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Puts the weights of gates where they are here, and leaves the plan's own file of them out, which lies beside."""
        return WeightsMapper(
            # not as parts of names, which a model's own mapper would have changed before
            orig_to_new_regex={
                re.compile(r"\.self_attn\.gate\."): ".self_attn.attn.plan_gate.",
                re.compile(r"^(weight|bias)$"): None,
            },
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PlanConfig:
        """Reads the plan; raises as `ServedPlan.read`."""
        return cls(ServedPlan.read(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Takes attention layers over, and leaves all others as they are."""
        if isinstance(layer, Attention):
            take_over(layer, prefix, self.served)
            return None
        if isinstance(layer, QKVParallelLinear) and self.served.plan.selects:
            return ScoringLinearMethod(self.served.gates, holder_of(prefix))
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register() -> None:
    """Tells vLLM of the config."""
    register_quantization_config("moacompress")(PlanConfig)

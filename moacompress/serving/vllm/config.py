"""The quantization config that vLLM makes of a checkpoint's config.json: it holds the plan, and takes attention layers over."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.models.utils import WeightsMapper

from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.rules.plan import Plan
from moacompress.serving.vllm.base_config import BaseConfig
from moacompress.serving.vllm.gates import LayerGate, ScoringLinearMethod, holder_of


class PlanConfig(BaseConfig):
    """What a checkpoint with a plan is to vLLM: a quantized one whose weights are as they are.

    Attributes:
        plan: of the checkpoint.
        class_layers: classes of its KV heads as layers of vLLM; None until the first attention layer is taken over.
        gates: those of attention layers, by the names of what holds these and their projections.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.class_layers: list[Any] | None = None
        self.gates: dict[str, LayerGate] = {}

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
        """Reads the plan.

        Raises:
            PlanError: it is missing, malformed or too new.
            UnsupportedError: it has layers that share attention, or the checkpoint has weights in blocks.
        """
        unknown = sorted(config.keys() - {"quant_method", "plan", "weights"})
        if unknown or "plan" not in config:
            what = f"an unknown entry, {unknown[0][:40]!r}" if unknown else "no plan"
            raise PlanError(f"quantization_config of the checkpoint has {what}; export it again, or update moacompress")
        if config.get("weights"):
            raise UnsupportedError(
                "vLLM cannot serve this checkpoint: its weights are in blocks of codes; export it with `--weights dense`, or "
                "serve it with `transformers serve`"
            )
        plan = Plan.from_dict(config["plan"])
        if plan.shares:
            raise UnsupportedError(
                "vLLM cannot serve the plan of this checkpoint: layers of it share attention; search a plan without "
                "(`moacompress search --share off`), or serve it with `transformers serve`"
            )
        return cls(plan)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Takes attention layers over, and leaves all others as they are."""
        if isinstance(layer, Attention):
            from moacompress.serving.vllm.attention import take_over

            take_over(layer, prefix, self)
            return None
        if isinstance(layer, QKVParallelLinear) and self.plan.selects:
            return ScoringLinearMethod(self.gates, holder_of(prefix))
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register() -> None:
    """Tells vLLM of the config."""
    register_quantization_config("moacompress")(PlanConfig)

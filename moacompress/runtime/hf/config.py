"""`quantization_config` of a compressed checkpoint: plan and types of weights, as transformers stores and reads them."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from moacompress.core.errors import PlanError
from moacompress.models.stored_plan import stored_weights
from moacompress.rules.plan import Plan

METHOD = "moacompress"


class MoaCompressConfig(QuantizationConfigMixin):
    """Holds the plan in `config.json` under `quantization_config`, and which weights are in blocks.

    `weights`: names of layers whose weights are in blocks, with the names of the types; see `models.block_layers`.

    Raises:
        PlanError: the plan is malformed, or something else stands beside it.
    """

    def __init__(
        self, plan: Plan | dict[str, Any] | None = None, weights: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        unknown = sorted(str(key) for key in kwargs if key != "quant_method")
        if unknown:
            raise PlanError(
                f"quantization_config has the unknown key {unknown[0][:60]!r}; known are plan, weights, quant_method"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.plan = plan if isinstance(plan, Plan) else Plan.from_dict(plan)
        self.weights = stored_weights({"weights": weights})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads the stored form; see `Plan.from_dict` for what is refused."""
        config = cls(**{str(key): value for key, value in config_dict.items()})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Returns the stored form."""
        weights = {"weights": dict(self.weights)} if self.weights else {}
        return {"quant_method": METHOD, **weights, "plan": self.plan.to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the stored form: nothing in it is a default."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"MoaCompressConfig(plan={self.plan.key()})"

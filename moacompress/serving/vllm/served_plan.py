"""The plan of the checkpoint that vLLM serves, and what its attention layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.rules.plan import Plan
from moacompress.serving.vllm.gates import LayerGate


@dataclass(eq=False)
class ServedPlan:
    """A plan under which vLLM runs a model.

    Attributes:
        plan: of the checkpoint.
        class_layers: classes of its KV heads as layers of vLLM; None until the first attention layer is taken over.
        gates: those of attention layers, by the names of what holds these and their projections.
    """

    plan: Plan
    class_layers: list[Any] | None = None
    gates: dict[str, LayerGate] = field(default_factory=dict)

    @staticmethod
    def read(config: dict[str, Any]) -> ServedPlan:
        """Reads the `quantization_config` of a checkpoint's config.json.

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
        return ServedPlan(plan)

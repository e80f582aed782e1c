"""Evaluation: what a compressed model still does, measured beside the dense one and the baselines at equal bytes.

`tasks` writes prompts. `baselines` says what is compared on them, `eviction` has known ways to evict tokens. `scoring` measures
prompts and long text, each once, and turns scores into rows. `lm_harness` runs another project's tasks. `runner` does it all,
`measurement` one task and length after the other. Nothing here changes a plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moacompress.evaluation.runner import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from moacompress.evaluation.runner import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

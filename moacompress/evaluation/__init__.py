"""Evaluation: what a compressed model still does, measured beside the dense one and the baselines at equal bytes.

Prompts: `tasks` (the registry), `cases` (one prompt), and a module for each family of tasks. Measuring: `checkpoint` (the
weights), `compared_models` (the plans on them), `scoring` (prompts), `text` (long text), `scores` (all of them, each measured
once), `lm_harness` (another project's tasks). Numbers: `retention`, `result_rows` and `text_rows` (results),
`thresholds`. `runner` does it all. Nothing here changes a plan.
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

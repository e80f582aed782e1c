"""Evaluation: what a compressed model still does, measured beside the dense one and a uniform window at equal bytes.

`tasks` makes the prompts, `scoring` scores one of them, `stats` puts intervals around the scores, `ledger` keeps them,
and `runner` does it all. Nothing here changes a plan.
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

"""Per-head KV-cache compression for language models: windows, integer codes and learned eviction, under a budget of bytes.

Importing this package is cheap: it imports neither torch nor transformers. Functions are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from _moacompress_autoload import autoload
from moacompress.core.version import own_version
from moacompress.report.notebook import register

if TYPE_CHECKING:
    from moacompress.bench.benchmark import benchmark
    from moacompress.calibration.profile.profiler import profile
    from moacompress.evaluation.runner import evaluate
    from moacompress.exporter.exporting import export
    from moacompress.healer.healing import heal
    from moacompress.in_place import applied, compress_
    from moacompress.pipeline import compress
    from moacompress.recipe import Recipe
    from moacompress.report.inspection import inspect
    from moacompress.rules.plan import Plan
    from moacompress.runtime import attach, detach
    from moacompress.search.audit.audit import audit
    from moacompress.search.study import find_plan

__all__ = [
    "Plan",
    "Recipe",
    "__version__",
    "applied",
    "attach",
    "audit",
    "benchmark",
    "compress",
    "compress_",
    "detach",
    "evaluate",
    "export",
    "find_plan",
    "heal",
    "inspect",
    "profile",
]

_HOMES = {
    "Plan": "moacompress.rules.plan",
    "Recipe": "moacompress.recipe",
    "applied": "moacompress.in_place",
    "attach": "moacompress.runtime",
    "audit": "moacompress.search.audit.audit",
    "benchmark": "moacompress.bench.benchmark",
    "compress": "moacompress.pipeline",
    "compress_": "moacompress.in_place",
    "detach": "moacompress.runtime",
    "evaluate": "moacompress.evaluation.runner",
    "export": "moacompress.exporter.exporting",
    "find_plan": "moacompress.search.study",
    "heal": "moacompress.healer.healing",
    "inspect": "moacompress.report.inspection",
    "profile": "moacompress.calibration.profile.profiler",
}

__version__ = own_version()

autoload()
register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

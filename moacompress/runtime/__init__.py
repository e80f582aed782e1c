"""The runtime: loading through transformers, the hooks on a model, the attention and its cache.

It needs a plan and nothing else of moacompress: no calibration, no search. What it offers is imported when it is asked for, so
that `runtime.compat` can say what is missing where the rest cannot be imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import transformers.modeling_utils

# First of all: the entry point imports `runtime.hf.loading` when something is taken from this module, which must not happen
# while one of our own modules is half imported.
getattr(transformers.modeling_utils, "PreTrainedModel", None)

if TYPE_CHECKING:
    from moacompress.runtime.cache.plan_cache import PlanCache
    from moacompress.runtime.hf.attaching import attach, detach
    from moacompress.runtime.hf.device_generation import generate_on_device
    from moacompress.runtime.hf.prefixes import keep_prefixes
    from moacompress.runtime.linear import use_kernels

__all__ = ["PlanCache", "attach", "detach", "generate_on_device", "keep_prefixes", "use_kernels"]

_HOMES = {
    "PlanCache": "moacompress.runtime.cache.plan_cache",
    "attach": "moacompress.runtime.hf.attaching",
    "detach": "moacompress.runtime.hf.attaching",
    "generate_on_device": "moacompress.runtime.hf.device_generation",
    "keep_prefixes": "moacompress.runtime.hf.prefixes",
    "use_kernels": "moacompress.runtime.linear",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("moacompress.runtime.hf.loading")  # registers where the entry point is switched off
    return getattr(importlib.import_module(_HOMES[name]), name)

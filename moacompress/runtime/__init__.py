"""The runtime: loading through transformers, the hooks on a model, the attention and its cache.

It needs a plan and nothing else of moacompress: no calibration, no search.
"""

# First, and alone: the entry point imports `runtime.loading` as soon as this module is executed, which must not happen
# while one of our own modules is half imported.
import transformers.modeling_utils  # noqa: F401

import moacompress.runtime.loading  # noqa: F401  registers with transformers where the entry point is switched off
from moacompress.runtime.attaching import attach, detach
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.linear import pack_weights

__all__ = ["PlanCache", "attach", "detach", "pack_weights"]

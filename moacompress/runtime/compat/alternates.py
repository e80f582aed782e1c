"""What differs between the tested versions of transformers: one constant each, chosen once, when this is imported.

Each says from which version on the new form holds. Once the oldest version in `versions.TESTED` has it, the constant is that
form, and the older one and what serves it alone go.
"""

from __future__ import annotations

from typing import Any

from moacompress.runtime.compat.versions import INSTALLED

CACHE = "cache" if INSTALLED >= (5, 24) else "past_key_values"
"""From 5.24: the argument of a model and of `generate` that takes a cache, and the output that holds it.

Models swallow an argument of another name, and run without it.
"""
CHOOSE_ATTENTION = "update_attn_implementation" if INSTALLED >= (5, 18) else "update_ep_plan"
"""From 5.18: method of a quantizer that may change a model's config before the model is built.

Before, the last one that was handed the config there was for expert parallelism.
"""

CHUNKS_CONTINUE = INSTALLED >= (5, 21)
"""From 5.21: `generate` reads a prompt in chunks from where the cache that it is given ends; before, from the first token."""
FP8_CACHE_SINCE = "5.21"
"""The minor version from which `QuantizedCache` has the backend "fp8"."""

CACHE_NAMES = tuple(dict.fromkeys((CACHE, "cache", "past_key_values", "layer_past")))
"""Keywords under which a model, not always transformers' own, hands a cache to its layers."""


def cache_argument(cache: Any) -> dict[str, Any]:
    """Returns the keywords that hand a cache to a model or to `generate`; none for None, then the model makes one."""
    return {} if cache is None else {CACHE: cache}


def returned_cache(outputs: Any) -> Any:
    """Returns the cache that a model or `generate` returned, None where it used none."""
    return getattr(outputs, CACHE)

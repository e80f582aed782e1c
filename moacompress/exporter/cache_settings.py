"""A model's own generation settings that would keep its checkpoint from using the plan's cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


@contextmanager
def with_its_cache(model: Any) -> Iterator[None]:
    """Makes a model's generation settings use the plan's cache for a while, and warns of those that would not."""
    changed: dict[tuple[int, str], Any] = {}
    for place, config in enumerate(_configs(model)):
        for name, wanted in (("use_cache", True), ("cache_implementation", None)):
            found = getattr(config, name, wanted)
            if found not in (wanted, None):
                changed[place, name] = found
                setattr(config, name, wanted)
    if changed:
        said = ", ".join(dict.fromkeys(f"{name}: {json.dumps(found)}" for (_, name), found in changed.items()))
        logger.warning(
            "the model's own settings, %s, would leave the plan's cache out; the checkpoint does not have them", said
        )
    try:
        yield
    finally:
        configs = _configs(model)  # a plan that was put on it has left it copies
        for (place, name), found in changed.items():
            setattr(configs[place], name, found)


def _configs(model: Any) -> tuple[Any, Any, Any]:
    return model.config, model.config.get_text_config(decoder=True), model.generation_config

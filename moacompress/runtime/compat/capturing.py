"""The hooks of transformers that capture hidden states: when they do something.

The first forward that is asked for hidden states (`output_hidden_states=True`) puts hooks on the layers that stay there; in a
forward that is not asked they do nothing, and a layer is as it was.
"""

from __future__ import annotations

from typing import Any

from moacompress.runtime.compat import private_names

_NAMES = private_names.resolve(private_names.OUTPUT_CAPTURING).__globals__
_active = private_names.resolve(private_names.ACTIVE_COLLECTOR)


def is_capturing() -> bool:
    """Returns whether the running forward captures something."""
    return bool(_active.get())


def are_foreign(hooks: dict[int, Any]) -> bool:
    """Returns whether some forward hook of a module is not one that captures."""
    return not all(getattr(hook, "__globals__", None) is _NAMES for hook in hooks.values())


def do_something(hooks: dict[int, Any]) -> bool:
    """Returns whether forward hooks of a module, of which there are some, do something in the running forward."""
    return is_capturing() or are_foreign(hooks)

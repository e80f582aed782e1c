"""What installed packages add: objects that they name in an entry point group of ours.

Only packages that somebody installed are looked at, and only where what they add is asked for. No file, plan or checkpoint can
name one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

logger = logging.getLogger(__name__)

TASKS = "moacompress.tasks"
"""Tasks of the evaluation, as `moacompress.evaluation.tasks.registry.EvaluationTask`."""
BACKENDS = "moacompress.backends"
"""Kernels, as subclasses of `moacompress.kernels.backend.Backend`."""
BASELINES = "moacompress.baselines"
"""Ways to evict tokens that a plan is measured against, as classes of `moacompress.evaluation.eviction.baseline`."""
FORMATS = "moacompress.formats"
"""Formats of keys and values, as instances of `moacompress.kernels.kv_format.KVFormat`."""
SCORERS = "moacompress.scorers"
"""Scores that gates can be fitted to, as classes of `moacompress.calibration.gates.scorers.Scorer`."""


@functools.cache
def plugins(group: str) -> tuple[tuple[str, Any], ...]:
    """Returns the names and objects of a group, by name; what cannot be loaded is left out with a warning."""
    found = []
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            found.append((entry.name, entry.load()))
        except Exception as error:  # whatever another package fails with, ours goes on
            logger.warning("%s of %s cannot be loaded and is left out: %s", entry.name, entry.value, error)
    return tuple(found)


def named_plugins(group: str, kind: str, fits: Callable[[Any], bool], taken: Callable[[str], bool]) -> dict[str, Any]:
    """Returns the objects of a group by the `name` that each has; what is not to be used is left out with a warning.

    `kind` says in warnings what such an object is; its last word is what the name is of. `fits` says
    whether an object is one, and `taken` whether a name is another's already.
    """
    found: dict[str, Any] = {}
    for entry, given in plugins(group):
        what = f"{entry}, an entry point of {group},"
        if not fits(given):
            logger.warning("%s is no %s and is left out: %r", what, kind, given)
        elif given.name in found or taken(given.name):
            noun = kind.rpartition(" ")[2]
            logger.warning("%s has the name of another %s, %s, and is left out", what, noun, given.name)
        else:
            found[given.name] = given
    return found

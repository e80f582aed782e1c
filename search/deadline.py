"""When a search has to stop."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass
class Deadline:
    """The time that a search may take; it is asked before every piece of work that may be left out.

    Attributes:
        started: `time.monotonic()` from which the time counts.
        timeout: seconds; None for no end.
        stopped: whether it was asked after its end, so that something was left out.
    """

    started: float
    timeout: float | None = None
    stopped: bool = False

    def over(self) -> bool:
        """Returns whether the time is up."""
        if self.timeout is None or time.monotonic() - self.started <= self.timeout:
            return False
        if not self.stopped:
            logger.info("the search stops: %g seconds are over", self.timeout)
        self.stopped = True
        return True

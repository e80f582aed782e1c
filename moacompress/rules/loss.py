"""How much worse a plan may be than the dense model: what a search of the smallest budget goes by."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moacompress.core.errors import UsageError
from moacompress.core.statistics import SMALLEST


@dataclass(frozen=True)
class Loss:
    """How much worse a plan may be.

    Attributes:
        text: as it was given.
        kl: nats. A share p stands for `log(1 + p)`: KL is the expected rise of the negative log-likelihood of what the
            dense model says, so its perplexity then rises by that share at most.
    """

    text: str
    kl: float

    @staticmethod
    def parse(text: str) -> Loss:
        """Reads `1%` or `0.01`.

        Raises:
            UsageError: anything else, or not above 0.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
        share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
        if not 0 < share <= 1:
            raise UsageError(f"loss {text!r} is not understood; write '1%' or '0.01', above 0 and at most 100%")
        return Loss(text.strip(), math.log1p(share))


def check_loss_samples(loss: Loss, samples: int) -> None:
    """Refuses a loss that too few validation samples judge: an upper bound of the mean KL has to be within it.

    Raises:
        UsageError: there are fewer than a bound takes.
    """
    if samples < SMALLEST:
        raise UsageError(
            f"a loss of {loss.text} is held with 95% confidence, which takes at least {SMALLEST} validation samples, and there "
            f"{'is' if samples == 1 else 'are'} {samples}; profile with --validation-samples {SMALLEST} or more; 12 give a "
            "closer bound, and so a smaller budget"
        )

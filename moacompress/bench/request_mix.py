"""A mix of requests, as a server gets them: the same seed gives the same ones everywhere.

Lengths are drawn from a log-normal distribution, as lengths of real requests are spread: most are short, few are very long.
Requests come all at once, or at random times of a given mean rate (a Poisson process). It needs the standard library alone, so
that every server is measured with the same requests.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from moacompress.core.errors import UsageError


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution of lengths in tokens, cut at both ends.

    Attributes:
        median: half of the requests are shorter.
        spread: standard deviation of the logarithm; at 0 all are of the median.
        least: shortest.
        most: longest.
    """

    median: int
    spread: float
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        """Returns a length."""
        drawn = round(math.exp(rng.gauss(math.log(self.median), self.spread)))
        return min(max(drawn, self.least), self.most)


PROMPTS = Lengths(512, 0.7, 32, 1536)
"""Of prompts: 10% up to 210 tokens, half from 320 to 820, 10% from 1,260 on; 620 in the mean."""
ANSWERS = Lengths(128, 0.6, 8, 512)
"""Of answers: 10% up to 60 tokens, half from 85 to 190, 10% from 275 on; 150 in the mean."""


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        prompt_tokens: of its prompt.
        new_tokens: of its answer, which never ends sooner.
        arrival: seconds after the first one.
    """

    prompt_tokens: int
    new_tokens: int
    arrival: float = 0.0

    @property
    def tokens(self) -> int:
        """Of prompt and answer."""
        return self.prompt_tokens + self.new_tokens


def requests(
    seed: int, count: int, *, prompt: Lengths | int = PROMPTS, new: Lengths | int = ANSWERS, rate: float | None = None
) -> list[Request]:
    """Returns requests in the order in which they arrive.

    Args:
        seed: of lengths and times.
        count: requests.
        prompt: lengths of prompts in tokens, or one for all.
        new: lengths of answers in tokens, or one for all.
        rate: mean requests a second; None for all at once.

    Raises:
        UsageError: a number that is not above 0.
    """
    fixed = [length for length in (prompt, new) if isinstance(length, int)]
    if count < 1 or any(length < 1 for length in fixed) or (rate is not None and not rate > 0):
        raise UsageError("a mix of requests has at least 1 request, lengths of at least 1 token and a rate above 0")
    lengths, times = random.Random(f"lengths {seed}"), random.Random(f"times {seed}")
    found, now = [], 0.0
    for number in range(count):
        if rate is not None and number:
            now += times.expovariate(rate)
        found.append(Request(_drawn(prompt, lengths), _drawn(new, lengths), now))
    return found


def _drawn(length: Lengths | int, rng: random.Random) -> int:
    return length if isinstance(length, int) else length.draw(rng)

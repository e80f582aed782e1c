"""Times of passes by a clock that is known, and what is told of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moacompress.estimate import stopwatch
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.rates import REPEATS, TimedRates
from moacompress.runtime.compat.alternates import CACHE


class Clock:
    """Goes by when told to; another process has so many times the seconds of this one beside it."""

    def __init__(self, beside: float) -> None:
        self.now, self._beside = 0.0, beside

    def thread_time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now * (1 + self._beside)


class Model(torch.nn.Module):
    """Takes a tenth of a second a token and 1 ms for every cached one; the very first pass takes an hour more."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock, self.read = clock, list[int]()

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, **given: Any) -> SimpleNamespace:
        cache = given.get(CACHE, 0)
        self._clock.now += input_ids.shape[1] / 10 + cache / 1000 + 3600 * (not self.read)
        self.read.append(input_ids.shape[1])
        return SimpleNamespace(**{CACHE: cache + input_ids.shape[1]})


@pytest.mark.parametrize("beside", [0.0, 6.0])
def test_passes_are_timed_as_they_are_alone_and_once(beside: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(beside)
    monkeypatch.setattr(stopwatch, "time", clock)
    model = Model(clock)
    rates = TimedRates(model, "cpu")
    for _ in range(2):
        assert rates.step(2000) == pytest.approx(0.1 + 2.0)
        assert [rates.forward(50), rates.forward(2000)] == pytest.approx([5.0, 200.0])
    assert model.read == [16, 2000, *[1] * (1 + REPEATS), 50, *[1] * (1 + REPEATS)]
    assert rates.watch.slowdown == pytest.approx(1 + beside)


def test_an_estimate_says_that_the_machine_is_busy() -> None:
    for slowdown, wanted in ((1.2, False), (26.0, True)):
        found = Estimate(seconds=540.0, text=["about 9 min."], facts={"answers": 20}, slowdown=slowdown)
        assert ("The machine is busy" in found.line()) == wanted
        assert found.to_dict() == {"estimate": True, "answers": 20, "seconds": 540.0, "slowdown": slowdown}
    assert found.line().startswith("about 9 min. ")
    assert "would be about 3.9 h" in found.line()

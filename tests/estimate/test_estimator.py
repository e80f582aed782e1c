"""Times of passes by a clock that is known, what follows for longer ones, and what is told of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moacompress.estimate import stopwatch
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.estimator import LONG_SECONDS, Estimator
from moacompress.estimate.stopwatch import REPEATS
from moacompress.estimate.work import Kind, Work, answers
from moacompress.runtime.compat.alternates import CACHE


class Clock:
    """Goes by when told to; another process has so many times the seconds of this one beside it."""

    def __init__(self, beside: float = 0.0) -> None:
        self.now, self._beside = 0.0, beside

    def thread_time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now * (1 + self._beside)


class Model(torch.nn.Module):
    """Takes so many seconds a token, a pair of tokens, and a cached token; the very first pass takes an hour more."""

    def __init__(self, clock: Clock, token: float = 0.1, pair: float = 0.0, cached: float = 0.001) -> None:
        super().__init__()
        self._clock, self.read = clock, list[int]()
        self._token, self._pair, self._cached = token, pair, cached

    def seconds(self, tokens: int) -> float:
        return self._token * tokens + self._pair * tokens * (tokens + 1) / 2

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, **given: Any) -> SimpleNamespace:
        cache = given.get(CACHE, 0)
        self._clock.now += self.seconds(input_ids.shape[1]) + cache * self._cached + 3600 * (not self.read)
        self.read.append(input_ids.shape[1])
        return SimpleNamespace(**{CACHE: cache + input_ids.shape[1]})


@pytest.mark.parametrize("beside", [0.0, 6.0])
def test_passes_are_timed_as_they_are_alone_and_once(beside: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(beside)
    monkeypatch.setattr(stopwatch, "time", clock)
    model = Model(clock, 0.01)
    estimator = Estimator(model, "cpu")
    for _ in range(2):
        assert estimator.one(Kind.STEP, 2000) == pytest.approx(0.01 + 2.0)
        assert [estimator.one(Kind.FORWARD, n) for n in (50, 2000)] == pytest.approx([0.5, 20.0])
    assert model.read == [16, 2000, 1, 50, *[1] * REPEATS]  # short work is timed several times
    assert estimator.watch.slowdown == pytest.approx(1 + beside)


def test_long_passes_follow_from_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    model = Model(clock, 0.001, 1e-5, 0.001)
    samples: list[tuple[int, int]] = []

    def sample(tokens: int, targets: int) -> None:
        samples.append((tokens, targets))
        clock.now += 3 * model.seconds(tokens)

    estimator = Estimator(model, "cpu", {Kind.SAMPLE: sample}, windows=(None, None), longest=300)
    for tokens in (100, 900, 8192):
        assert estimator.one(Kind.FORWARD, tokens) == pytest.approx(model.seconds(tokens))
        assert estimator.one(Kind.STEP, tokens) == pytest.approx(0.001 + 1e-5 + tokens * 0.001)
        assert estimator.one(Kind.SAMPLE, tokens, 7) == pytest.approx(3 * model.seconds(tokens))
        assert estimator.one(Kind.RERUN, tokens) == pytest.approx(model.seconds(tokens))
    assert max(model.read) == 900
    assert model.seconds(512) < LONG_SECONDS < model.seconds(900)
    assert [*dict.fromkeys(samples)] == [(100, 7), (128, 7), (256, 7)]


def test_a_prompt_of_native_windows_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    model = Model(clock, 0.02)
    assert Estimator(model, "cpu", windows=(64,)).one(Kind.FORWARD, 8192) == pytest.approx(0.02 * 8192)


def test_work_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    estimator = Estimator(Model(clock), "cpu")
    work = [*answers(50, 4, 10, "answers"), Work(Kind.FORWARD, 10, 3, stage="passes")]
    step = 0.1 + 50 * 0.001
    assert estimator.seconds(work) == pytest.approx(4 * (5 + 10 * step) + 3 * 1.0)
    assert estimator.seconds([]) == 0


def test_an_estimate_says_that_the_machine_is_busy() -> None:
    for slowdown, wanted in ((1.2, False), (26.0, True)):
        found = Estimate(seconds=540.0, text=["about 9 min."], facts={"answers": 20}, slowdown=slowdown)
        assert ("The machine is busy" in found.line()) == wanted
        assert found.to_dict() == {"estimate": True, "answers": 20, "seconds": 540.0, "slowdown": slowdown}
    assert found.line().startswith("about 9 min. ")
    assert "would be about 3.9 h" in found.line()

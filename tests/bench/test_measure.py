"""Turns of timing: who is timed when, and what the clock sees."""

from moacompress.bench.measure import interleave
from tests.clock import Clock


class Spy:
    def __init__(self, name, log, clock, takes):
        self.name, self.log, self.clock, self.takes = name, log, clock, takes

    def prepare(self):
        self.log.append(f"prepare {self.name}")
        self.clock.now += 100.0

    def run(self):
        self.log.append(f"run {self.name}")
        self.clock.now += self.takes


def test_sides_take_turns_and_only_what_runs_is_timed():
    clock, log, turns = Clock(), [], []
    spies = {name: Spy(name, log, clock, takes) for name, takes in (("plan", 1.0), ("dense", 2.5))}
    found = interleave(spies, 3, clock, lambda: turns.append(len(log)))
    there, back = ([f"{do} {name}" for name in names for do in ("prepare", "run")] for names in (spies, [*spies][::-1]))
    assert log == [*there, *back, *there]  # no side always runs after the same one
    assert found == {"plan": [1.0] * 3, "dense": [2.5] * 3}
    assert turns == [4, 8, 12]

"""What a class of KV heads frees is what no rule of it sees, and what it holds is no more than is said."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moacompress.rules.windows import BLOCK, Span, block_runs
from moacompress.serving.vllm.freed_blocks import freed_blocks

LONGEST = 2300


def some_spans(rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Returns spans of a class at random: one native window for all."""
    native = rng.choice((0, 0, 40, 500))
    return tuple(
        (rng.choice((0, 4, 16, 64)), rng.choice((0, 7, 100, 5000)), rng.choice((0, 100, 700, 1024)), 16, native)
        for _ in range(rng.choice((1, 2, 5)))
    )


@pytest.mark.parametrize("seed", range(6))
def test_freed_is_what_no_rule_sees(seed):
    """By the definition of blocks that a rule touches, at every length; and it only grows."""
    spans = some_spans(random.Random(seed))
    freed, before = freed_blocks(spans), set[int]()
    for n in [*range(1, 300), *range(300, LONGEST, 7)]:
        seen = set[int]()
        for span in spans:
            for begin, end in block_runs(n, Span(*span)):
                seen |= set(range(begin, end))
        blocks, now = -(-n // BLOCK), freed.at(n)
        assert [not now.holds(block) for block in range(blocks)] == [block in seen for block in range(blocks)]
        assert now.count(blocks) == blocks - len(seen)
        assert freed.held(n) == len(seen)
        gone = set(range(blocks)) - seen
        assert gone >= before
        before = gone


@pytest.mark.parametrize("seed", range(6))
def test_no_way_to_compute_a_prompt_holds_more(seed):
    rng = random.Random(seed)
    freed = freed_blocks(some_spans(rng))
    for _ in range(50):
        n, in_flight = rng.randint(1, LONGEST), rng.choice((1, 16, 100, 256, 4096))
        most, computed = 0, 0
        while computed < n:
            chunk = min(rng.randint(1, in_flight), n - computed)
            blocks = -(-(computed + chunk) // BLOCK)
            most = max(most, blocks - freed.at(computed + 1).count(blocks))
            computed += chunk
        assert most <= freed.most_held(n, in_flight)
        assert freed.most_held(n, in_flight) >= freed.held(n)


def test_lengths_far_apart_are_the_same_as_near_ones():
    freed = freed_blocks(((4, 20, 300, 16, 0),))
    (_, sinks), (window, _) = block_runs(np.arange(1, 5000), Span(4, 20, 300, 16))
    for n in (4999, 1, 1023, 1024, 1025, 3000):
        assert freed.at(n)[1:] == (sinks[n - 1], max(window[n - 1], sinks[n - 1]))

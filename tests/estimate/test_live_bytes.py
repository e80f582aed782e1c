"""Bytes that are alive: of which tensors they are, and where a line of them leads."""

from __future__ import annotations

import gc

import torch

from moacompress.estimate.live_bytes import Line, LiveBytes


def test_live_bytes_are_those_of_tensors_that_something_keeps() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        view = weight.view(10, 100).t()
        assert live.now == 0
        double = weight * 2
        assert (live.now, live.peak) == (4000, 4000)
        double.mul_(2)
        half = double[:500]
        del double
        gc.collect()
        assert live.now == 4000  # the view keeps it
        exp = weight.exp()
        result = exp.square()
        del exp
        assert live.now == 12_000  # autograd keeps it
        del result, half, view
        gc.collect()
        assert live.now == 0
        assert live.peak == 12_000


def test_a_line_leads_on() -> None:
    assert Line.through((128, 192), [1000 + 8 * 128, 1000 + 8 * 192]).at(4096) == 1000 + 8 * 4096

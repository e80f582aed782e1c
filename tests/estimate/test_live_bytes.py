"""Bytes that are alive: of which tensors they are, and where a line of them leads."""

from __future__ import annotations

import gc

import torch

from moacompress.estimate.live_bytes import LiveBytes, extrapolated_bytes


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


def test_bytes_are_extrapolated() -> None:
    line = {n: 1000 + 8 * n for n in (128, 192)}
    assert extrapolated_bytes(line, 4096) == 1000 + 8 * 4096
    assert extrapolated_bytes(line, 100) == 1000 + 8 * 100
    square = {n: 1000 + 8 * n + 2 * n**2 for n in (128, 256, 384)}
    assert extrapolated_bytes(square, 4096) == 1000 + 8 * 4096 + 2 * 4096**2
    falling = {128: 900, 256: 1000, 384: 1050}  # what is held by a window grows less and less
    assert extrapolated_bytes(falling, 640) == 1150
    assert extrapolated_bytes({128: 900, 192: 800}, 4096) == 800

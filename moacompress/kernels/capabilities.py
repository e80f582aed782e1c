"""What a backend says of itself: what it can do, whether it runs here, and how long its phases took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do beside `decode` and `prefill`.

    Attributes:
        prefill_gradients: `prefill` without a cache has gradients.
        traced: `prefill` without a cache, and its gradients, can be in a graph of `torch.compile`.
        cached_gradients: `decode`, and `prefill` over a cache, have gradients.
        decode_selecting: `Backend.decode_selecting`.
        step: `Backend.step`.
        ring: `Backend.bind_ring`.
        step_layer: `Backend.step_layer`.
        stack: `Backend.read_layers`.
        linear: `Backend.linear`.
        linear_blocks: `Backend.linear_blocks` reads the blocks as they lie, without a dense copy of a few outputs at a time.
        profile: `Backend.profile_backward`.
        trace: `Backend.start_trace`.
        outside_formats: keeps formats of installed packages, as `KVPart` does.
    """

    prefill_gradients: bool = False
    traced: bool = False
    cached_gradients: bool = False
    decode_selecting: bool = False
    step: bool = False
    ring: bool = False
    step_layer: bool = False
    stack: bool = False
    linear: bool = False
    linear_blocks: bool = False
    profile: bool = False
    trace: bool = False
    outside_formats: bool = False


class Status(NamedTuple):
    """Whether a backend can run in this process.

    Attributes:
        reason: why it cannot, and what to do; or why it is there.
        isa: instruction set or card that it runs on, or None.
    """

    works: bool
    reason: str
    isa: str | None = None


class PhaseTime(NamedTuple):
    """The time of one phase of steps.

    Attributes:
        seconds: on the threads that made the steps.
        busy: in which any thread was at work in it, added up over all threads, s.
    """

    seconds: float
    busy: float

"""What a step will run, as a list that is timed on a machine or counted for a model: how many passes of which kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """A kind of pass of a model."""

    FORWARD = "reads a prompt"
    STEP = "one more token behind a prompt"
    SAMPLE = "a forward pass and all backward passes of a profiled sample"
    RERUN = "all layers once more, in a backward pass that did not keep what they computed"
    GATE_SAMPLE = "a forward pass and all backward passes of a sample that gates are trained on"
    TEACHER = "a forward pass of the dense model in a heal"
    HELD_OUT = "a forward pass of the healed model, compared with the teacher's logits"
    TRAINING = "a forward and a backward pass of the healed model"


@dataclass(frozen=True)
class Work:
    """Passes of one kind and length.

    Attributes:
        kind: which.
        tokens: that each reads.
        count: how many; a mean may have a fraction.
        targets: tokens whose logits are computed.
        stage: of the step that it is part of.
    """

    kind: Kind
    tokens: int
    count: float
    targets: int = 1
    stage: str = ""


def answers(tokens: int, count: float, new_tokens: float, stage: str = "") -> list[Work]:
    """Returns the work of answering so many prompts, each of `tokens`, with `new_tokens` per answer."""
    return [
        Work(Kind.FORWARD, tokens, count, 1, stage),
        Work(Kind.STEP, tokens, count * new_tokens, 1, stage),
    ]

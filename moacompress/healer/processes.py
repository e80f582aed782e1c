"""The processes of one training run, as `torchrun` starts them: who is first, and what all of them agree on."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def rank() -> int:
    """Returns the number of this process; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def agreed(value: Any) -> Any:
    """Returns what the first process gave, in all of them; every process must call it."""
    if world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def gathered(numbers: dict[int, float]) -> dict[int, float]:
    """Returns the numbers of all processes together; every process must call it."""
    if world_size() == 1:
        return numbers
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, numbers)
    return {key: value for part in parts for key, value in part.items()}

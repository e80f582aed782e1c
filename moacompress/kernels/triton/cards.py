"""What a card lets a program have, by the name of its architecture: tile sizes follow from it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

KIB = 1024


class Card(NamedTuple):
    """A kind of card.

    Attributes:
        shared: bytes of shared memory that a program may have.
        large: whether a program of a chunk has 64 queries, not 32: where sums of products are not all in registers of a warp of
            32 lanes.
        lanes: of a warp.
        interpreted: whether it is none, but the interpreter, which has room for anything.
    """

    shared: int
    large: bool
    lanes: int = 32
    interpreted: bool = False


CARDS = {
    "sm_80": Card(163 * KIB, large=False),
    "sm_86": Card(99 * KIB, large=False),
    "sm_87": Card(163 * KIB, large=False),
    "sm_89": Card(99 * KIB, large=False),
    "sm_90": Card(227 * KIB, large=True),
    "sm_100": Card(227 * KIB, large=True),
    "sm_103": Card(227 * KIB, large=True),
    "sm_110": Card(227 * KIB, large=True),
    "sm_120": Card(99 * KIB, large=False),
    "sm_121": Card(99 * KIB, large=False),
    "gfx942": Card(64 * KIB, large=True, lanes=64),
    "gfx950": Card(160 * KIB, large=True, lanes=64),
}
"""By the names of their architectures."""
TENSOR_MEMORY = ("sm_100", "sm_103", "sm_110")
"""Cards whose products with 64 queries go through memory of their own."""
TRITON = (3, 9)
"""Version that is known to compile the kernels for that; 3.6 does not."""
OTHER = Card(99 * KIB, large=False)
"""Any other."""
WITHOUT = Card(227 * KIB, large=True, interpreted=True)
"""What the interpreter runs on."""


@lru_cache
def card_of(device: torch.device) -> Card:
    """Returns what a device lets a program have."""
    if device.type != "cuda":
        return WITHOUT
    if torch.version.hip:
        return named(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    return named("sm_{}{}".format(*torch.cuda.get_device_capability(device)))


def named(architecture: str) -> Card:
    """Returns what cards of an architecture let a program have, compiled by the Triton that is here."""
    card = CARDS.get(architecture, OTHER)
    if architecture not in TENSOR_MEMORY:
        return card
    import triton

    found = tuple(map(int, triton.__version__.split(".")[:2]))
    return card._replace(large=card.large and found >= TRITON)

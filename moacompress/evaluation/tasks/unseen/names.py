"""Names that no pool of calibration has: of places and families, put together from parts, and of speakers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_FIRST = """
Ald Ash Barn Beck Bex Bram Brock Cald Carl Chal Cold Dal Dun Eld Far Fen Gar Gos Hal Hart Hat Holm Hurst Kel Ken Kirk
Lang Lin Mal Mar Mel Mil Nor Nun Ock Pen Pick Rad Ren Rush Sal Sel Stan Thorn Wad Wal Wes Wick
"""
_MIDDLE = ("", "en", "er", "ing")
_LAST = """
bourne bridge brook burgh bury by combe cote croft dale den don fell field ford gate ham hampton holt hurst land
ley low mere minster more ness port shaw stead stoke thorpe ton wall water well wick wood worth
"""
_SPEAKERS = """
Abdul Agnes Anita Bjorn Carmen Cedric Chloe Dmitri Edith Esther Farida Felix Gloria Greta Hamid Helga Hugo Ingrid Irene
Ivan Jorge Judith Kenji Lars Leila Lucia Magnus Marta Mei Nadia Nigel Olga Omar Pedro Priya Rafael Rosa Samir Sofia Tariq
Ursula Viktor Wanda Yusuf Zelda
"""
SPEAKERS = tuple(_SPEAKERS.split())
_PARTS = (_FIRST.split(), _MIDDLE, _LAST.split())
NAMES = len(_PARTS[0]) * len(_PARTS[1]) * len(_PARTS[2])
"""How many names of places and families there are."""


def draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """Returns `count` different names such as `Ashenford`."""
    shape = tuple(len(parts) for parts in _PARTS)
    picks = zip(*np.unravel_index(rng.choice(NAMES, size=count, replace=False), shape), strict=True)
    return ["".join(parts[int(at)] for parts, at in zip(_PARTS, pick, strict=True)) for pick in picks]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Returns one of the options."""
    return options[int(rng.integers(len(options)))]

"""The centres that are subtracted from keys before they are coded: one per KV head, in float16, as a plan holds them.

Attention's softmax sees no difference, as long as all keys of a KV head lose the same one; codes round what is left. So any
centre is exact, and the mean of the keys rounds best.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from moacompress.core.arrays import Floats32
from moacompress.core.errors import PlanError

NUMBER = np.dtype("<f2")
LARGEST = float(np.finfo(NUMBER).max)

Centre = bytes
"""Of one KV head: its numbers one after the other; empty of one without."""
Centres = tuple[tuple[Centre, ...], ...]
"""`centres[layer][kv_head]`."""


def as_centres(centres: Any) -> Centres:
    """Returns centres `[layers, kv_heads, head_dim]`, finite, as a plan holds them.

    What float16 cannot hold becomes its largest number. A KV head of zeros has none.
    """
    numbers = np.clip(np.asarray(centres, np.float64), -LARGEST, LARGEST).astype(NUMBER)
    return tuple(tuple(head.tobytes() if head.any() else b"" for head in layer) for layer in numbers)


def centre_numbers(row: Sequence[Centre], head_dim: int) -> Floats32 | None:
    """Returns the centres of a layer, float32 `[kv_heads, head_dim]`, 0 of a KV head without; None where none has one."""
    if not any(row):
        return None
    found = np.zeros((len(row), head_dim), np.float32)
    for head, centre in enumerate(row):
        if centre:
            found[head] = np.frombuffer(centre, NUMBER)
    return found


def check_centres(centres: Centres, layers: int, kv_heads: int, head_dim: int) -> None:
    """Refuses centres that are not of a model's KV heads.

    Raises:
        PlanError: names the layer.
    """
    if len(centres) != layers:
        raise PlanError(f"there are centres of keys of {len(centres)} layers, not {layers}")
    for layer, row in enumerate(centres):
        if len(row) != kv_heads or any(len(centre) not in (0, head_dim * NUMBER.itemsize) for centre in row):
            raise PlanError(f"the centres of layer {layer} are not those of {kv_heads} KV heads of {head_dim} numbers")


def to_text(centre: Centre) -> str | None:
    """Returns the JSON form of a centre: base64, or None for none."""
    return base64.b64encode(centre).decode("ascii") if centre else None


def from_text(text: str | None, head_dim: int, where: str) -> Centre:
    """Reads the JSON form of a centre; `where` is what a message calls it.

    Raises:
        PlanError: it is something else, of another size, or not finite.
    """
    if text is None:
        return b""
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise PlanError(f"{where} is no base64") from None
    if len(found) != head_dim * NUMBER.itemsize:
        raise PlanError(
            f"{where} has {len(found)} bytes, not the {head_dim * NUMBER.itemsize} of {head_dim} float16 numbers"
        )
    if not np.isfinite(np.frombuffer(found, NUMBER)).all():
        raise PlanError(f"{where} has numbers that are not finite")
    return found


def to_texts(centres: Centres) -> list[list[str | None]]:
    """Returns the JSON form of the centres of all layers; empty of none."""
    return [[to_text(centre) for centre in row] for row in centres]


def from_texts(texts: Any, layers: int, kv_heads: int, head_dim: int) -> Centres:
    """Reads what `to_texts` returned; empty where no KV head has one.

    Raises:
        PlanError: they are of another model, or are not centres.
        TypeError: they are not lists of texts.
    """
    found = tuple(
        tuple(from_text(text, head_dim, f"key_centre of layer {layer} KV head {head}") for head, text in enumerate(row))
        for layer, row in enumerate(texts)
    )
    if found:
        check_centres(found, layers, kv_heads, head_dim)
    return found if any(map(any, found)) else ()

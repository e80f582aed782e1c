"""A format of keys and values that another package adds: one class, kept by the reference in plain PyTorch.

The package names an instance in its entry points, in the group `moacompress.formats`. Compiled backends keep ours alone: a plan
with another format is refused by name, and runs with `MOACOMPRESS_KERNEL=reference`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

from moacompress.core.errors import UnsupportedError
from moacompress.rules.formats import FORMATS, OUTSIDE_CODE, Outside, find_code


class KVFormat(ABC):
    """How a vector, a key after its rotary embedding or a value, is kept as bytes.

    A vector's bytes depend on that vector alone, never on its neighbours: so chunks, batches and forks keep the same. One with
    a NaN or an infinity must come back with a NaN.

    Attributes:
        name: in plans and recipes: small letters, digits and dashes.
        bits: of a number, about, 1 to 16; reports show them.
    """

    name: str
    bits: int

    @abstractmethod
    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of a vector, all that `encode` keeps of it.

        Args:
            dim: its numbers.
            dtype: the model's.
        """

    @abstractmethod
    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns what is kept, uint8 `[tokens, vector_bytes]`, of vectors `[tokens, dim]` in any float dtype."""

    @abstractmethod
    def decode(self, kept: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the vectors that bytes stand for, float32 `[tokens, dim]`, of uint8 `[tokens, vector_bytes]`."""


def outside_of(code: int) -> KVFormat | None:
    """Returns the format of an installed package that has a code; None for one of ours."""
    if code < OUTSIDE_CODE:
        return None
    found = find_code(code)
    assert isinstance(found, Outside)
    given: KVFormat = found.given
    return given


def encoded(format: KVFormat, vectors: torch.Tensor, size: int) -> torch.Tensor:
    """Returns what a format keeps of vectors, uint8 `[tokens, size]`.

    Raises:
        UnsupportedError: it keeps something else than it says.
    """
    kept = format.encode(vectors)
    if kept.dtype != torch.uint8 or tuple(kept.shape) != (len(vectors), size):
        raise UnsupportedError(
            f"the format {format.name} encodes {len(vectors)} vectors as {kept.dtype} {[*kept.shape]}; by its vector_bytes it "
            f"is uint8 {[len(vectors), size]}"
        )
    return kept


def decoded(format: KVFormat, kept: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns the vectors that bytes stand for, float32 `[..., dim]`, of uint8 `[..., bytes]`.

    Raises:
        UnsupportedError: the format gives something else.
    """
    flat = kept.reshape(-1, kept.shape[-1])
    found = format.decode(flat, dim)
    if found.dtype != torch.float32 or tuple(found.shape) != (len(flat), dim):
        raise UnsupportedError(
            f"the format {format.name} decodes {len(flat)} vectors as {found.dtype} {[*found.shape]}, not as float32 "
            f"{[len(flat), dim]}"
        )
    return found.view(*kept.shape[:-1], dim)


def rounded_by(format: KVFormat, x: torch.Tensor) -> torch.Tensor:
    """Returns vectors as a format keeps them, float32 `[..., dim]`; without a gradient's way."""
    flat = x.detach().reshape(-1, x.shape[-1])
    size = format.vector_bytes(x.shape[-1], str(x.dtype).removeprefix("torch."))
    return decoded(format, encoded(format, flat, size), x.shape[-1]).view(x.shape)


def check_codes(codes: Sequence[int], head: int, known: Sequence[int]) -> None:
    """Refuses formats of the keys and values of a KV head that a backend does not keep, by their codes.

    Raises:
        UnsupportedError: says which.
    """
    if not set(codes) <= set(known):
        raise UnsupportedError(f"KV head {head} has the formats {[*codes]}; known are {[*known]}")


def refuse_outside(names: Iterable[str], kernel: str, instead: str) -> None:
    """Refuses formats of installed packages for what keeps ours alone, a `kernel`, and says what to do `instead`.

    Raises:
        UnsupportedError: names the format, and what runs it.
    """
    other = next((name for name in names if name not in FORMATS), None)
    if other is not None:
        raise UnsupportedError(
            f"the format {other} is of an installed package, and {kernel} keeps {', '.join(FORMATS)} alone; {instead}"
        )

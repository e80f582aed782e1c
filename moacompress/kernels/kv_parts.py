"""Where keys or values lie in the memory of cache blocks: one part of a block holds those of its 16 tokens, in one format.

Native numbers lie one token after the other, `[blocks, 16, dim]`. Codes, scales and zero points lie as `docs/formats.md` says,
`[blocks, bytes]`; `kernels/cpu/formats.h` has the same, and tests hold the bytes equal. Of a format of an installed package a
vector's bytes lie together, one token after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from moacompress.kernels.kv_format import decoded, encoded, outside_of
from moacompress.kernels.reference.codes import Codes, decode, encode, pack, rotated, unpack
from moacompress.rules.formats import VECTOR_NUMBERS, Format, find_code
from moacompress.rules.windows import BLOCK

QUAD = 4
"""Bytes of a token, or tokens, whose codes lie side by side: what processors multiply at once."""


class KVPart(NamedTuple):
    """A format for keys, or for values, of one size.

    Attributes:
        code: of the format, as in a rule table.
        dim: numbers of a vector.
        dtype: the model's.
        values: whether they are values.
    """

    code: int
    dim: int
    dtype: torch.dtype
    values: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code; 0 of native numbers."""
        return self._format.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the K or V part of a block."""
        return BLOCK * self._vector

    @property
    def _vector(self) -> int:
        """Bytes of a token, of codes with scale and zero point."""
        return self._format.vector_bytes(self.dim, str(self.dtype).removeprefix("torch."))

    @property
    def _format(self) -> Format:
        return find_code(self.code)

    @property
    def _token(self) -> int:
        """Bytes of the codes of a token."""
        return self._vector - VECTOR_NUMBERS

    def new(self, blocks: int, device: torch.device) -> torch.Tensor:
        """Returns memory of so many blocks, not initialised."""
        if not self.bits:
            return torch.empty(blocks, BLOCK, self.dim, dtype=self.dtype, device=device)
        return torch.empty(blocks, self.nbytes, dtype=torch.uint8, device=device)

    def write(self, memory: torch.Tensor, slots: torch.Tensor, vectors: torch.Tensor) -> None:
        """Writes tokens `[tokens, dim]` into memory as of `new`, whose blocks may lie apart.

        `slots` are block * 16 + place in the block, int64 `[tokens]`.
        """
        if not self.bits:
            memory[slots // BLOCK, slots % BLOCK] = vectors
            return
        outside = outside_of(self.code)
        if outside is not None:
            self._tokens(memory)[slots // BLOCK, slots % BLOCK] = encoded(outside, vectors, self._vector)
            return
        found, blocks, places = encode(vectors, self.bits), slots // BLOCK, slots % BLOCK
        packed = pack(found.codes, self.bits)
        packed = pad(packed, (0, self._token - packed.shape[-1]))
        codes, at = self._codes(memory, blocks, places)
        codes[at] = packed if self.values else packed.unflatten(-1, (-1, QUAD))
        numbers = self._numbers(memory)
        for side, part in enumerate((found.scale, found.zero)):
            numbers[blocks, side, places] = part[:, 0]

    def move(self, source: torch.Tensor, slots: torch.Tensor, target: torch.Tensor, to: torch.Tensor) -> None:
        """Copies tokens as they are kept, from `slots` of one memory to slots `to` of another, or of the same."""
        if not self.bits:
            target[to // BLOCK, to % BLOCK] = source[slots // BLOCK, slots % BLOCK]
            return
        if outside_of(self.code) is not None:
            self._tokens(target)[to // BLOCK, to % BLOCK] = self._tokens(source)[slots // BLOCK, slots % BLOCK]
            return
        (codes, at), (new, into) = (
            self._codes(memory, where // BLOCK, where % BLOCK) for memory, where in ((source, slots), (target, to))
        )
        new[into] = codes[at]
        self._numbers(target)[to // BLOCK, :, to % BLOCK] = self._numbers(source)[slots // BLOCK, :, slots % BLOCK]

    def read(self, memory: torch.Tensor, blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Returns tokens: native ones as they are, float32 of codes, in the basis of the vectors, `[..., dim]`.

        `blocks` is int64 `[...]`; `places`, in the blocks, broadcasts to it.
        """
        if not self.bits:
            return memory[blocks, places]
        outside = outside_of(self.code)
        if outside is not None:
            return decoded(outside, self._tokens(memory)[blocks, places], self.dim)
        return rotated(decode(self.kept(memory, blocks, places)))

    def kept(self, memory: torch.Tensor, blocks: torch.Tensor, places: torch.Tensor) -> Codes:
        """Returns the codes of tokens, as `read` finds them."""
        places = places.expand_as(blocks)
        codes, at = self._codes(memory, blocks, places)
        packed = codes[at].reshape(*blocks.shape, self._token)
        scale, zero = (self._numbers(memory)[blocks, side, places][..., None] for side in range(2))
        return Codes(unpack(packed, self.bits, self.dim), scale, zero)

    def _tokens(self, memory: torch.Tensor) -> torch.Tensor:
        """Returns a view of all tokens of a format of an installed package, uint8 `[blocks, 16, bytes of a vector]`."""
        tokens: torch.Tensor = memory.unflatten(1, (BLOCK, self._vector))
        return tokens

    def _codes(
        self, memory: torch.Tensor, blocks: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | slice, ...]]:
        """Returns a view of all codes, and an index of those of tokens, `[tokens, bytes]` or `[tokens, bytes / 4, 4]`."""
        codes = memory[:, : BLOCK * self._token]
        if self.values:
            return codes.unflatten(1, (QUAD, self._token, QUAD)), (blocks, places // QUAD, slice(None), places % QUAD)
        return codes.unflatten(1, (self._token // QUAD, BLOCK, QUAD)), (blocks, slice(None), places)

    def _numbers(self, memory: torch.Tensor) -> torch.Tensor:
        """Returns a view of scales and zero points, float16 `[blocks, 2, 16]`."""
        numbers: torch.Tensor = memory[:, BLOCK * self._token :].view(torch.float16).unflatten(1, (2, BLOCK))
        return numbers

    def fits(self, memory: torch.Tensor) -> bool:
        """Whether memory is of such parts."""
        if not self.bits:
            return memory.dtype == self.dtype and memory.shape[1:] == (BLOCK, self.dim)
        return memory.dtype == torch.uint8 and memory.shape[1:] == (self.nbytes,)


def read_tokens(
    segments: Sequence[torch.Tensor], kv_part: KVPart, ids: torch.Tensor, places: torch.Tensor
) -> torch.Tensor | None:
    """Returns tokens of a pool, `[rows, heads, tokens, dim]`, or None where a block is in no segment of such parts.

    Block ids, int64 `[rows, heads, tokens]` and at least 0, count through segments of other formats too; `places`, `[tokens]`,
    are those in the blocks.
    """
    if len(segments) == 1 and kv_part.fits(segments[0]):
        return kv_part.read(segments[0], ids, places) if int(ids.max()) < len(segments[0]) else None
    found = torch.empty(
        *ids.shape, kv_part.dim, dtype=torch.float32 if kv_part.bits else kv_part.dtype, device=segments[0].device
    )
    first, left, places = 0, ids.numel(), places.expand_as(ids)
    for segment in segments:
        inside = (ids >= first) & (ids < first + len(segment))
        if kv_part.fits(segment):
            found[inside] = kv_part.read(segment, ids[inside] - first, places[inside])
            left -= int(inside.sum())
        first += len(segment)
    return None if left else found

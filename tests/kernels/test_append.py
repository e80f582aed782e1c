"""Tokens of a chunk into blocks of a pool: every backend writes the bytes of the definition, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels import backend as protocol
from moacompress.kernels.backend import Backend
from moacompress.kernels.kv_parts import KVPart
from tests import gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (1, 9, 16, 20, 33, 64, 80, 96, 100, 128, 192, 256)
BLOCKS = 24
CPU = torch.device("cpu")


@pytest.fixture(params=["reference", "cpu", *gpu.PLACES])
def backend(request: pytest.FixtureRequest, use_backend: Callable[[str], Any]) -> Any:
    return use_backend(request.param)


def edge_values(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Puts among vectors `[..., dim]` what rounding must not stumble over, and makes them large or small."""
    rows, heads, columns, _ = x.shape

    def some() -> torch.Tensor:
        return x[rng.randrange(rows), rng.randrange(heads), rng.randrange(columns)]

    x *= rng.choice((1, 1, 3e4 if x.dtype == torch.float16 else 1e30, 1e-4))
    for constant in (0.0, -0.0, 1.0, 1e-5):
        some()[:] = constant
    for number in (torch.nan, torch.inf, -torch.inf, -0.0):
        some()[0] = number
    some()[:] = torch.arange(x.shape[-1]) % 4  # many of its codes lie half way
    return x


def segments_of(rng: random.Random, kv_part: KVPart, other: KVPart, cuts: list[int]) -> list[torch.Tensor]:
    """Memory of `BLOCKS` blocks in segments, one of another format; blocks lie apart in some."""
    found = []
    for begin, end in zip([0, *cuts], [*cuts, BLOCKS], strict=True):
        memory = (other if begin == cuts[0] else kv_part).new(2 * (end - begin), CPU)
        memory.view(torch.uint8).fill_(7)
        found.append(memory[::2] if rng.random() < 0.3 else memory[: end - begin])
    return found


@pytest.mark.parametrize("seed", range(15))
def test_bytes_are_those_of_the_definition(seed: int, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For steps and chunks, some tokens of them, however they lie; values alone too."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    monkeypatch.setattr(protocol, "TOKENS_AT_ONCE", 7)
    dtype, values_alone = DTYPES[seed % 3], seed % 5 == 4
    parts = [KVPart(rng.choice((0, 1, 2, 3)), rng.choice(DIMS), dtype, values=side) for side in (False, True)]
    others = [KVPart((part.code + 1) % 3, 36, dtype, part.values) for part in parts]
    rows, heads, columns = rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.choice((1, 1, 5, 40))
    chunk = []
    for part in parts:
        laid = torch.randn(rows, columns, heads, part.dim + 3, dtype=dtype)[..., 1:-2].transpose(1, 2)
        chunk.append(edge_values(rng, laid if rng.random() < 0.5 else laid.contiguous()))
    cuts = sorted(rng.sample(range(4, BLOCKS, 4), 2))
    memory = [segments_of(rng, part, other, cuts) for part, other in zip(parts, others, strict=True)]
    expected = [[segment.clone() for segment in side] for side in memory]
    free = [slot for slot in range(BLOCKS * 16) if not cuts[0] <= slot // 16 < cuts[1]]
    count = rng.randint(1, min(rows * heads * columns, len(free)))
    sources, slots = (torch.tensor(rng.sample(of, count)) for of in (range(rows * heads * columns), free))
    for part, vectors, side in [*zip(parts, chunk, expected, strict=True)][values_alone:]:
        first = 0
        for segment in side:
            at = (slots >= first) & (slots < first + 16 * len(segment))
            pairs, column = sources[at] // columns, sources[at] % columns
            if len(column):
                part.write(segment, slots[at] - first, vectors[pairs // heads, pairs % heads, column])
            first += 16 * len(segment)
    key_part, key, keys = (None, None, []) if values_alone else (parts[0], chunk[0], memory[0])
    where = {"sources": sources, "slots": slots}
    backend.append((key_part, parts[1]), key, chunk[1], keys=keys, values=memory[1], **where)
    for side, wanted in zip(memory, expected, strict=True):
        for segment, other in zip(side, wanted, strict=True):
            assert torch.equal(segment.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_no_tokens(backend: Any) -> None:
    part = KVPart(0, 4, torch.float32)
    memory, nothing = torch.zeros(1, 16, 4), torch.zeros(0, dtype=torch.int64)
    chunk = torch.ones(1, 1, 1, 4)
    backend.append((part, part), chunk, chunk, keys=[memory], values=[memory], sources=nothing, slots=nothing)
    assert not memory.any()


def test_blocks_of_other_formats_are_refused(use_backend: Callable[[str], Backend]) -> None:
    parts = KVPart(1, 16, torch.float32), KVPart(1, 16, torch.float32, values=True)
    memory, chunk = [part.new(4, CPU) for part in parts], torch.ones(1, 1, 1, 16)
    for slot, values in ((64, [memory[1]]), (-1, [memory[1]]), (0, [torch.zeros(4, 16, 16)])):
        where = {"sources": torch.tensor([0]), "slots": torch.tensor([slot])}
        with pytest.raises(UnsupportedError, match="or is of other formats"):
            use_backend("triton").append(parts, chunk, chunk, keys=memory[:1], values=values, **where)

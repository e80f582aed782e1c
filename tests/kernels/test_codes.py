"""Codes are those of docs/formats.md, byte for byte, and lose no more than half a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.codes import LARGEST, decode, encode, pack, rotated, unpack
from moacompress.kernels.reference.rounding import BITS as BITS_OF
from moacompress.kernels.reference.rounding import round_to, rounded
from moacompress.rules.formats import FORMATS, find_code

DIMS = (1, 2, 5, 6, 16, 24, 64, 80, 96, 112, 128, 256)
BITS = (4, 6, 8)
NATIVE, INT8, INT6, INT4 = (FORMATS[name].code for name in ("native", "int8", "int6", "int4"))


def by_the_page(x: np.ndarray, bits: int) -> tuple[list[int], np.float16, np.float16]:
    """One vector, number by number, as the page says it."""
    d, levels = len(x), (1 << bits) - 1
    b = d & -d
    y = x.astype(np.float32)
    s = 1
    while s < b:
        for i in range(d):
            if not i & s:
                y[i], y[i + s] = np.float32(y[i] + y[i + s]), np.float32(y[i] - y[i + s])
        s *= 2
    if b > 1:
        y = y * np.float32(1 / np.sqrt(b))

    def kv_part(number: np.float32) -> np.float16:
        return np.float16(min(max(number, np.float32(-LARGEST)), np.float32(LARGEST)))

    zero, scale = kv_part(y.min()), kv_part(np.float32((y.max() - y.min()) / np.float32(levels)))
    if not scale:
        return [0] * d, scale, zero
    inverse = np.float32(1) / np.float32(scale)
    codes = np.clip(np.rint((y - np.float32(zero)) * inverse), 0, levels)
    return codes.astype(int).tolist(), scale, zero


def draw(rng: np.random.Generator, dim: int, count: int = 20) -> torch.Tensor:
    """Vectors of very different sizes, some far from zero, some with a channel that is much larger than the others."""
    x = rng.standard_normal((count, dim)) * 10.0 ** rng.integers(-9, 6, (count, 1)) + rng.integers(-3, 4, (count, 1))
    x[::5, 0] *= 300
    return torch.from_numpy(x).float()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_they_are_those_of_the_page(dim: int, bits: int) -> None:
    x = draw(np.random.default_rng(dim), dim)
    found = encode(x, bits)
    for row, vector in enumerate(x.numpy()):
        codes, scale, zero = by_the_page(vector.copy(), bits)
        assert found.codes[row].tolist() == codes
        assert found.scale[row].numpy().tobytes() == scale.tobytes()
        assert found.zero[row].numpy().tobytes() == zero.tobytes()


def test_golden_bytes() -> None:
    """Codes, scale and zero point of three vectors, as they lie in memory."""
    x = torch.tensor([[0.5, -1.0, 2.0, 0.25, -3.0, 1.5, 0.0, 7.0], [1.0] * 8, [0.0] * 8])
    found = {}
    for bits in BITS:
        kept = encode(x, bits)
        parts = (pack(kept.codes, bits), kept.scale.view(torch.uint8), kept.zero.view(torch.uint8))
        found[bits] = [[part[row].numpy().tobytes().hex() for part in parts] for row in range(3)]
    assert found == {
        8: [
            ["b51d00844affa753", "9d28", "f4c3"],
            ["ff00000000000000", "ae21", "0000"],
            ["0000000000000000", "0000", "0000"],
        ],
        6: [
            ["2d070021123f291500000000", "ab30", "f4c3"],
            ["3f0000000000000000000000", "bf29", "0000"],
            ["000000000000000000000000", "0000", "0000"],
        ],
        4: [["4bf2a058", "e738", "f4c3"], ["0f000000", "0932", "0000"], ["00000000", "0000", "0000"]],
    }


@pytest.mark.parametrize("dim", [1, 16, 20, 64])
def test_six_bits_lie_in_three_rows(dim: int) -> None:
    """Bit by bit, as the page says it."""
    codes = torch.randint(64, (3, dim), dtype=torch.uint8)
    row = 4 * -(-dim // 16)
    wanted = torch.zeros(3, 3 * row, dtype=torch.uint8)
    for vector in range(3):
        for i in range(dim):
            code, (part, byte) = int(codes[vector, i]), divmod(i, row)
            for other in range(3):
                if part in (other, 3):
                    wanted[vector, other * row + byte] |= code if part == other else (code >> 2 * other & 3) << 6
    assert torch.equal(pack(codes, 6), wanted)
    assert torch.equal(unpack(wanted, 6, dim), codes)


@pytest.mark.parametrize("bits", BITS)
def test_edge_values(bits: int) -> None:
    nan = float("nan")
    x = torch.tensor([[5.0] * 8, [1e-9] * 7 + [0.0], [nan] + [1.0] * 7, [float("inf")] + [1.0] * 7, [3e7] + [-3e7] * 7])
    kept = encode(x, bits)
    decoded = decode(kept)
    assert kept.scale[0] >= 0
    assert torch.allclose(rotated(decoded[:1]), x[:1], atol=1e-2)
    assert kept.scale[1] == 0
    assert not kept.codes[1:4].any()
    assert kept.scale[2:4].isnan().all()
    assert kept.zero[2:4].isnan().all()
    assert decoded[2:4].isnan().all()
    assert (kept.scale.view(torch.int16)[2:4] == 0x7E00).all()
    assert kept.zero[4] == -LARGEST
    assert decoded[4].isfinite().all()


@pytest.mark.parametrize("dim", [1, 5, 16, 33, 64])
def test_zeros_of_both_signs_have_no_sign(dim: int) -> None:
    """Whichever of them a minimum or a maximum returns."""
    x = torch.tensor([[0.0, -0.0] * dim, [-0.0, 0.0] * dim, [0.0, 0.0] * dim, [-0.0, -0.0] * dim])[:, :dim]
    kept = encode(x, 8)
    assert not kept.codes.any()
    assert not kept.scale.view(torch.int16).any()
    assert not kept.zero.view(torch.int16).any()


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("code", [INT8, INT6, INT4])
@pytest.mark.parametrize("dim", [5, 16, 24, 96, 128])
def test_a_block_lies_as_the_page_says(dim: int, code: int, values: bool) -> None:
    kv_part = KVPart(code, dim, torch.bfloat16, values)
    x = torch.randn(48, dim).to(torch.bfloat16)
    memory = kv_part.new(3, x.device).fill_(255)
    order = torch.randperm(48)
    kv_part.write(memory, order, x[order])
    kept = encode(x, kv_part.bits)
    wide = {8: 4 * -(-dim // 4), 6: 12 * -(-dim // 16), 4: 4 * -(-dim // 8)}[kv_part.bits]
    assert kv_part.nbytes == memory.shape[1] == 16 * wide + 64 == 16 * find_code(code).vector_bytes(dim, "bfloat16")
    packed = pack(kept.codes, kv_part.bits)
    packed = torch.nn.functional.pad(packed, (0, wide - packed.shape[1]))
    wanted = torch.full_like(memory, 255)
    for token in range(48):
        block, t = divmod(token, 16)
        for b in range(wide):
            at = 4 * wide * (t // 4) + 4 * b + t % 4 if values else 64 * (b // 4) + 4 * t + b % 4
            wanted[block, at] = packed[token, b]
        for side, part in enumerate((kept.scale, kept.zero)):
            begin = 16 * wide + 32 * side + 2 * t
            wanted[block, begin : begin + 2] = part[token].view(torch.uint8)
    assert torch.equal(memory, wanted)
    blocks, places = torch.arange(3)[:, None].expand(3, 16), torch.arange(16)
    assert torch.equal(kv_part.read(memory, blocks, places).view(48, dim), rotated(decode(kept)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_head_is_rounded_to_its_own_format(dtype: torch.dtype) -> None:
    """And the gradient passes straight through."""
    assert BITS_OF == {INT8: 8, INT6: 6, INT4: 4}
    x, pulled = (torch.randn(2, 4, 5, 24).to(dtype) for _ in range(2))
    found = rounded(x.requires_grad_(), [INT4, NATIVE, INT8, INT6])
    assert found.dtype == torch.float32
    for head, bits in enumerate((4, None, 8, 6)):
        alone = x[:, head].float() if bits is None else round_to(x[:, head], bits)
        assert torch.equal(found[:, head], alone)
    assert torch.equal(torch.autograd.grad(found, x, pulled.float())[0], pulled)
    with pytest.raises(ValueError, match="2 formats for 4 KV heads"):
        rounded(x, [INT8, INT4])

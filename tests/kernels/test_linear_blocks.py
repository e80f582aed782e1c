"""Products of a few rows with weights in blocks: equal to float64, and the same to the bit whatever else is computed beside."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import linear

from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, dequantized

pytestmark = pytest.mark.usefixtures("isa")
"""Skips where the kernels cannot run, and leaves the best instruction set behind."""

CPU = CpuBackend()
KINDS = list(WEIGHT_TYPES.values())
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""What a result may be off by, as a share of itself."""
SUMMING = 4e-6
"""What its sum may be off by, as a share of the sum of absolute products: codes are multiplied with 128 added to them."""
FEW_ROWS = 4
"""More rows of bfloat16 are multiplied in tiles, where there are any."""
every_kind = pytest.mark.parametrize("kind", KINDS, ids=WEIGHT_TYPES)


def in_tiles(isa, dtype, rows):
    """Whether so many rows meet dequantized weights, in tiles."""
    return isa == library.TILES and dtype == torch.bfloat16 and rows > FEW_ROWS


def bound(x, weight, expected, dtype, dequantized=False):
    """How far results may be from the product in float64; `dequantized` weights were rounded to the dtype."""
    products = linear(x.double().abs(), weight.abs())
    return ROUNDING[dtype] * expected.abs() + (SUMMING + dequantized * ROUNDING[dtype] / 4) * products + 1e-7


@pytest.mark.seeds(420)
def test_random_products(seed, isa, poisoned_memory, random_blocks):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name = library.ISAS[seed % len(library.ISAS)]
    isa(name)
    dtype, kind = library.DTYPES[seed // 5 % 3], KINDS[seed // 15 % 7]
    size = rng.choice([(), (0,), (1,), (2,), (3, 1), (5,), (2, 4), (9,), (3, 6), (33,), (16,), (300,)])
    inputs, outputs = kind.numbers * rng.choice([0, 1, 2, 3, 7, 18]), rng.choice([0, 1, 3, 4, 18, 65])
    x = torch.randn(*size, inputs).to(dtype)
    if rng.random() < 0.3:
        x = torch.randn(*size, 2 * inputs).to(dtype)[..., ::2]
    blocks = random_blocks(kind, outputs, inputs=inputs)
    bias = torch.randn(outputs).to(dtype) if rng.random() < 0.5 else None
    found = torch.ops.moacompress_cpu.linear_blocks(x, blocks, kind.code, bias)
    weight = dequantized(blocks, kind, torch.float64)
    expected = linear(x.double(), weight, None if bias is None else bias.double())
    assert found.dtype == dtype
    assert found.shape == expected.shape
    allowed = bound(x, weight, expected, dtype, in_tiles(name, dtype, x.shape[:-1].numel()))
    assert bool(((found.double() - expected).abs() <= allowed).all())


@every_kind
@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("dtype", library.DTYPES)
def test_what_is_expanded_is_the_reference_to_the_bit(name, dtype, kind, isa, threads, poisoned_memory, random_blocks):
    isa(name)
    for outputs, blocks_a_row in ((1, 1), (19, 5), (40, 18)):
        blocks = random_blocks(kind, outputs, inputs=blocks_a_row * kind.numbers)
        for count in (1, 3):
            threads(count)
            found = torch.empty(outputs, blocks_a_row * kind.numbers, dtype=dtype)
            torch.ops.moacompress_cpu.expand_blocks(blocks, kind.code, found)
            assert torch.equal(found, dequantized(blocks, kind, dtype))


@every_kind
@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("dtype", library.DTYPES)
def test_threads_and_other_rows_change_no_bit(name, dtype, kind, isa, threads, random_blocks):
    isa(name)
    x, blocks = torch.randn(11, 512).to(dtype), random_blocks(kind, 77, inputs=512)
    product = torch.ops.moacompress_cpu.linear_blocks
    alone = torch.cat([product(row[None], blocks, kind.code, None) for row in x])
    many = product(x, blocks, kind.code, None)
    assert torch.equal(many, alone) or in_tiles(name, dtype, len(x))
    for count in (1, 17):
        threads(count)
        for rows in range(1, 12):
            wanted = many if in_tiles(name, dtype, rows) else alone
            assert torch.equal(product(x[:rows], blocks, kind.code, None), wanted[:rows])
        assert torch.equal(product(x, blocks[5:7].contiguous(), kind.code, None), many[:, 5:7])


@every_kind
def test_tiles_are_products_with_dequantized_weights(kind, isa, threads, random_blocks):
    """Of more rows, outputs and inputs than are worked on at a time; the rows beside one change nothing of it."""
    if library.TILES not in library.ISAS:
        pytest.skip("no x86")
    isa(library.TILES)
    x, blocks, bias = (
        torch.randn(300, 1280).bfloat16(),
        random_blocks(kind, 1100, inputs=1280),
        torch.randn(1100).bfloat16(),
    )
    weight = dequantized(blocks, kind, torch.bfloat16).double()
    expected, products = linear(x.double(), weight, bias.double()), linear(x.double().abs(), weight.abs())
    product = torch.ops.moacompress_cpu.linear_blocks
    found = product(x, blocks, kind.code, bias)
    assert bool(((found.double() - expected).abs() <= 8e-3 * expected.abs() + 4e-6 * products).all())
    for count, rows in ((2, 300), (1, 5), (3, 257)):
        threads(count)
        assert torch.equal(product(x[-rows:], blocks, kind.code, bias), found[-rows:])


@every_kind
@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_a_large_number_takes_no_more_than_last_bits_from_those_beside_it(name, kind, rows, size, isa, random_blocks):
    """Where inputs are made whole numbers these are of 15 bits and a sign at least, for 32 numbers at a time."""
    isa(name)
    x, blocks = torch.randn(rows, 512).bfloat16(), random_blocks(kind, 18, inputs=512)
    x[:, 100] *= size
    weight = dequantized(blocks, kind, torch.float64)
    found = torch.ops.moacompress_cpu.linear_blocks(x, blocks, kind.code, None)
    expected = linear(x.double(), weight)
    lost = 2.0**-15 * x.double().unflatten(-1, (-1, 32)).abs().amax(-1) @ weight.unflatten(-1, (-1, 32)).abs().sum(-1).T
    allowed = bound(x, weight, expected, x.dtype) + lost
    assert bool(((found.double() - expected).abs() <= allowed).all())


@every_kind
@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("rows", [7, 21])
def test_nan_reaches_its_row_or_its_output_alone(name, kind, rows, isa, random_blocks):
    isa(name)
    for dtype in library.DTYPES:
        x, blocks = torch.randn(rows, 512).to(dtype), random_blocks(kind, 18, inputs=512)
        before = torch.ops.moacompress_cpu.linear_blocks(x, blocks, kind.code, None)
        x[3, 511] = float("nan")
        at = 208 if kind.name == "Q6_K" else 0
        blocks[9, at : at + 2] = 255  # the scale of the first block
        found = torch.ops.moacompress_cpu.linear_blocks(x, blocks, kind.code, None)
        spoilt = torch.zeros(rows, 18, dtype=torch.bool)
        spoilt[3] = spoilt[:, 9] = True
        assert torch.equal(found.isnan(), spoilt)
        assert torch.equal(found[~spoilt], before[~spoilt])


@every_kind
@pytest.mark.parametrize("dtype", library.DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_the_backend_is_the_reference(kind, dtype, rows, random_blocks, monkeypatch):
    """With a few rows and with many, and its gradients."""
    monkeypatch.setattr("moacompress.kernels.block_products.NUMBERS_AT_ONCE", 5 * 768)
    blocks, bias = random_blocks(kind, 33, inputs=768), torch.randn(33).to(dtype)
    x = torch.randn(rows, 768).to(dtype)
    weight = dequantized(blocks, kind, torch.float64)
    expected = linear(x.double(), weight, bias.double())
    rounding = (
        linear(x.double().abs(), weight.abs()) * ROUNDING[dtype] / 4
    )  # of the weights, where they are dequantized
    for backend in (CPU, REFERENCE):
        found = backend.linear_blocks(x, blocks, kind, bias)
        assert bool(((found.double() - expected).abs() <= bound(x, weight, expected, dtype) + rounding).all())
    x.requires_grad_()
    along = torch.randn(rows, 33).to(dtype)
    mine, wanted = (
        torch.autograd.grad(backend.linear_blocks(x, blocks, kind, bias), x, along)[0] for backend in (CPU, REFERENCE)
    )
    assert torch.allclose(mine, wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("x", "blocks", "kind", "message"),
    [
        ((2, 64), (4, 39), 3, r"weight has the shape \[4, 39\], not \[any, 40\]"),
        ((2, 64), (4, 40, 1), 3, "weight has the shape"),
        ((2, 33), (4, 20), 3, "33 inputs are no multiple of the 32 numbers of a block"),
        ((2, 64), (4, 40), 8, "weight 0 is of the kind 8; known are 0 to 7"),
        ((2, 64), (4, 40), -1, "weight 0 is of the kind -1"),
        ((2, 64), (4, 40), 0, "the kind is 0, which is none of blocks"),
    ],
)
def test_refusals(x, blocks, kind, message):
    given = torch.zeros(blocks, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moacompress_cpu.linear_blocks(torch.zeros(x), given, kind, None)
    if "inputs" in message or "kind" in message or "39" in message:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moacompress_cpu.expand_blocks(given, kind, torch.zeros(4, x[1]))


def test_more_refusals():
    blocks = torch.zeros(4, 40, dtype=torch.uint8)
    for wrong, message in ((blocks.char(), "another dtype"), (torch.zeros(40, 4, dtype=torch.uint8).t(), "contiguous")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moacompress_cpu.linear_blocks(torch.zeros(2, 64), wrong, 3, None)
    for result, message in (
        (torch.zeros(3, 64), "4 rows of blocks for 3 outputs"),
        (torch.zeros(64), r"the result has the shape \[64\]"),
        (torch.zeros(4, 64).double(), "float32, bfloat16 or float16"),
        (torch.zeros(64, 4).t(), "the result must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.moacompress_cpu.expand_blocks(blocks, 3, result)


def test_the_fakes_have_the_shapes_of_the_real_ones(random_blocks):
    kind = WEIGHT_TYPES["Q8_0"]
    blocks, checks = random_blocks(kind, 5, inputs=64), ("test_schema", "test_faketensor")
    arguments = (torch.randn(2, 3, 64), blocks, kind.code, torch.randn(5))
    torch.library.opcheck(torch.ops.moacompress_cpu.linear_blocks.default, arguments, test_utils=checks)
    arguments = (blocks, kind.code, torch.zeros(5, 64))
    torch.library.opcheck(torch.ops.moacompress_cpu.expand_blocks.default, arguments, test_utils=checks)
    for compiled in (False, True):
        arguments = (torch.randn(20, 64, requires_grad=True), blocks, kind.code, torch.randn(5), compiled)
        torch.library.opcheck(torch.ops.moacompress_blocks.linear.default, arguments)

"""Products with plain weights and with weights in blocks: as in float64, and the same to the bit whatever else is computed."""

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

OPS = torch.ops.moacompress_cpu
CPU = CpuBackend()
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""What a result may be off by, as a share of itself."""
SUMMING = 4e-6
"""What its sum may be off by, as a share of the sum of absolute products: codes are multiplied with 128 added to them."""
FEW_ROWS = 4
"""More rows of bfloat16 are multiplied in tiles, where there are any."""
BLOCKS = [*WEIGHT_TYPES.values()]
every_set = pytest.mark.parametrize("name", library.ISAS)
every_dtype = pytest.mark.parametrize("dtype", library.DTYPES)
every_type = pytest.mark.parametrize("kind", BLOCKS, ids=WEIGHT_TYPES)
plain_too = pytest.mark.parametrize("kind", [None, *BLOCKS], ids=["plain", *WEIGHT_TYPES])


@pytest.fixture
def random_weight(random_blocks):
    """Returns a random weight, plain or in blocks of a type."""

    def draw(kind, outputs, inputs, dtype):
        return torch.randn(outputs, inputs).to(dtype) if kind is None else random_blocks(kind, outputs, inputs=inputs)

    return draw


def product(x, weight, kind, bias=None):
    return OPS.linear(x, weight, bias) if kind is None else OPS.linear_blocks(x, weight, kind.code, bias)


def exact(weight, kind):
    return weight.double() if kind is None else dequantized(weight, kind, torch.float64)


def in_tiles(isa, dtype, rows):
    """Whether so many rows are multiplied in tiles: by weights that are rounded to the dtype, where these are in blocks."""
    return isa == library.TILES and dtype == torch.bfloat16 and rows > FEW_ROWS


def bound(x, weight, expected, dtype, dequantized=False):
    """How far results may be from the product in float64; `dequantized` weights were rounded to the dtype."""
    products = linear(x.double().abs(), weight.abs())
    return ROUNDING[dtype] * expected.abs() + (SUMMING + dequantized * ROUNDING[dtype] / 4) * products + 1e-7


@pytest.mark.parametrize("in_blocks", [False, True], ids=["plain", "blocks"])
@pytest.mark.seeds(420)
def test_random_products(seed, in_blocks, isa, poisoned_memory, random_weight):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, dtype = library.ISAS[seed % len(library.ISAS)], library.DTYPES[seed // 5 % 3]
    isa(name)
    kind = BLOCKS[seed // 15 % 7] if in_blocks else None
    size = rng.choice([(), (0,), (1,), (2,), (3, 1), (5,), (2, 4), (9,), (3, 6), (33,), (64,), (70,), (300,)])
    inputs, outputs = rng.choice([0, 1, 7, 16, 31, 32, 64, 100, 577, 1536]), rng.choice([0, 1, 3, 4, 18, 65, 193, 700])
    if in_blocks:
        inputs, outputs = kind.numbers * rng.choice([0, 1, 2, 3, 7, 18]), min(outputs, 65)
    x = torch.randn(*size, inputs).to(dtype)
    if rng.random() < 0.3:
        x = torch.randn(*size, 2 * inputs).to(dtype)[..., ::2]
    weight, bias = random_weight(kind, outputs, inputs, dtype), torch.randn(outputs).to(dtype)
    bias = bias if rng.random() < 0.5 else None
    found = product(x, weight, kind, bias)
    expected = linear(x.double(), exact(weight, kind), None if bias is None else bias.double())
    assert found.dtype == dtype
    assert found.shape == expected.shape
    allowed = bound(x, exact(weight, kind), expected, dtype, in_tiles(name, dtype, x.shape[:-1].numel()))
    assert bool(((found.double() - expected).abs() <= allowed).all())


@every_type
@every_set
@every_dtype
def test_what_is_expanded_is_the_reference_to_the_bit(name, dtype, kind, isa, threads, poisoned_memory, random_blocks):
    isa(name)
    for outputs, blocks_a_row in ((1, 1), (19, 5), (40, 18)):
        blocks = random_blocks(kind, outputs, inputs=blocks_a_row * kind.numbers)
        for count in (1, 3):
            threads(count)
            found = torch.empty(outputs, blocks_a_row * kind.numbers, dtype=dtype)
            OPS.expand_blocks(blocks, kind.code, found)
            assert torch.equal(found, dequantized(blocks, kind, dtype))


@plain_too
@every_set
@every_dtype
def test_threads_and_other_rows_change_no_bit(name, dtype, kind, isa, threads, random_weight):
    """From five rows on tiles multiply them, so there are two ways to sum up: each is the same whatever is beside."""
    isa(name)
    for inputs in (512,) if kind else (200, 96):  # tiles take multiples of 32
        x, bias = torch.randn(64, inputs).to(dtype), torch.randn(77).to(dtype)
        weight = random_weight(kind, 77, inputs, dtype)
        alone = torch.cat([product(row[None], weight, kind, bias) for row in x[:11]])
        many = product(x, weight, kind, bias)
        assert torch.equal(many[:11], alone) or in_tiles(name, dtype, len(x))
        if kind is None:
            torch.testing.assert_close(many[:11], alone, atol=4e-2, rtol=2e-2)
        for count in (1, 2, 17):
            threads(count)
            for rows in range(1, 12):
                wanted = many if in_tiles(name, dtype, rows) else alone
                assert torch.equal(product(x[:rows], weight, kind, bias), wanted[:rows])
            for first, rows in ((0, 64), (3, 16), (40, 17), (1, 63)):
                few = product(x[first : first + rows], weight[5:53].contiguous(), kind, bias[5:53].contiguous())
                assert torch.equal(few, many[first : first + rows, 5:53])


@every_type
def test_tiles_are_products_with_dequantized_weights(kind, isa, threads, random_blocks):
    """Of more rows, outputs and inputs than are worked on at a time; the rows beside one change nothing of it."""
    if library.TILES not in library.ISAS:
        pytest.skip("no x86")
    isa(library.TILES)
    x, bias = torch.randn(300, 1280).bfloat16(), torch.randn(1100).bfloat16()
    blocks = random_blocks(kind, 1100, inputs=1280)
    weight = dequantized(blocks, kind, torch.bfloat16).double()
    expected, products = linear(x.double(), weight, bias.double()), linear(x.double().abs(), weight.abs())
    found = product(x, blocks, kind, bias)
    assert bool(((found.double() - expected).abs() <= 8e-3 * expected.abs() + 4e-6 * products).all())
    for count, rows in ((2, 300), (1, 5), (3, 257)):
        threads(count)
        assert torch.equal(product(x[-rows:], blocks, kind, bias), found[-rows:])


@every_type
@every_set
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_a_large_number_takes_no_more_than_last_bits_from_those_beside_it(name, kind, rows, size, isa, random_blocks):
    """Where inputs are made whole numbers these are of 15 bits and a sign at least, for 32 numbers at a time."""
    isa(name)
    x, blocks = torch.randn(rows, 512).bfloat16(), random_blocks(kind, 18, inputs=512)
    x[:, 100] *= size
    weight = dequantized(blocks, kind, torch.float64)
    expected = linear(x.double(), weight)
    lost = 2.0**-15 * x.double().unflatten(-1, (-1, 32)).abs().amax(-1) @ weight.unflatten(-1, (-1, 32)).abs().sum(-1).T
    allowed = bound(x, weight, expected, x.dtype) + lost
    assert bool(((product(x, blocks, kind).double() - expected).abs() <= allowed).all())


@plain_too
@every_set
@pytest.mark.parametrize("rows", [1, 7, 21])
def test_nan_reaches_its_row_or_its_output_alone(name, kind, rows, isa, random_weight):
    isa(name)
    for dtype in library.DTYPES:
        x, weight = torch.randn(rows, 512).to(dtype), random_weight(kind, 18, 512, dtype)
        before = product(x, weight, kind)
        x[rows // 2, 511] = float("nan")
        if kind is None:
            weight[9, 0] = float("nan")
        else:
            at = 208 if kind.name == "Q6_K" else 0
            weight[9, at : at + 2] = 255  # the scale of the first block
        found, spoilt = product(x, weight, kind), torch.zeros(rows, 18, dtype=torch.bool)
        spoilt[rows // 2] = spoilt[:, 9] = True
        assert torch.equal(found.isnan(), spoilt)
        assert torch.equal(found[~spoilt], before[~spoilt])


@every_type
@every_dtype
@pytest.mark.parametrize("rows", [1, 40])
def test_the_backend_is_the_reference(kind, dtype, rows, random_blocks, monkeypatch):
    """With a few rows and with many, and its gradients."""
    monkeypatch.setattr("moacompress.kernels.block_products.NUMBERS_AT_ONCE", 5 * 768)
    blocks, bias = random_blocks(kind, 33, inputs=768), torch.randn(33).to(dtype)
    x, along = torch.randn(rows, 768).to(dtype), torch.randn(rows, 33).to(dtype)
    weight = dequantized(blocks, kind, torch.float64)
    expected = linear(x.double(), weight, bias.double())
    allowed = bound(x, weight, expected, dtype, dequantized=True)
    for backend in (CPU, REFERENCE):
        assert bool(((backend.linear_blocks(x, blocks, kind, bias).double() - expected).abs() <= allowed).all())
    x.requires_grad_()
    mine, wanted = (
        torch.autograd.grad(backend.linear_blocks(x, blocks, kind, bias), x, along)[0] for backend in (CPU, REFERENCE)
    )
    assert torch.allclose(mine, wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * float(wanted.abs().max()))


X, WEIGHT, BYTES = torch.zeros(2, 64), torch.zeros(4, 64), torch.zeros(4, 40, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        ("linear", (X, torch.zeros(4, 5), None), r"weight has the shape \[4, 5\], not \[any, 64\]"),
        ("linear", (X, WEIGHT.bfloat16(), None), "another dtype"),
        ("linear", (X, torch.zeros(64, 4).t(), None), "weight must be contiguous"),
        ("linear", (X, WEIGHT, torch.zeros(3)), "bias has the shape"),
        ("linear", (torch.zeros(()), WEIGHT, None), r"the input has the shape \[\]"),
        ("linear_blocks", (X, BYTES[:, :39].contiguous(), 3, None), r"weight has the shape \[4, 39\], not \[any, 40\]"),
        ("linear_blocks", (torch.zeros(2, 33), BYTES, 3, None), "33 inputs are no multiple of the 32 numbers"),
        ("linear_blocks", (X, BYTES, 8, None), "weight 0 is of the kind 8; known are 0 to 7"),
        ("linear_blocks", (X, BYTES, 0, None), "the kind is 0, which is none of blocks"),
        ("expand_blocks", (BYTES, 3, WEIGHT[:3]), "4 rows of blocks for 3 outputs"),
        ("expand_blocks", (BYTES, 3, WEIGHT.double()), "float32, bfloat16 or float16"),
        ("expand_blocks", (BYTES, 3, torch.zeros(64, 4).t()), "the result must be contiguous"),
        ("expand_blocks", (BYTES, -1, WEIGHT), "weight 0 is of the kind -1"),
    ],
)
def test_refusals(call, given, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, call)(*given)


def test_the_fakes_have_the_shapes_of_the_real_ones(random_blocks):
    kind = WEIGHT_TYPES["Q8_0"]
    blocks, checks = random_blocks(kind, 5, inputs=64), ("test_schema", "test_faketensor")
    x, bias = torch.randn(2, 3, 64), torch.randn(5)
    torch.library.opcheck(OPS.linear.default, (x, torch.randn(5, 64), bias), test_utils=checks)
    torch.library.opcheck(OPS.linear_blocks.default, (x, blocks, kind.code, bias), test_utils=checks)
    torch.library.opcheck(OPS.expand_blocks.default, (blocks, kind.code, torch.zeros(5, 64)), test_utils=checks)
    for compiled in (False, True):
        arguments = (torch.randn(20, 64, requires_grad=True), blocks, kind.code, torch.randn(5), compiled)
        torch.library.opcheck(torch.ops.moacompress_blocks.linear.default, arguments)

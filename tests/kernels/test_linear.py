"""Products of a few rows: equal to torch's in float64, and the same to the bit whatever else is computed beside."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import linear

from moacompress.kernels.cpu import library

pytestmark = pytest.mark.usefixtures("isa")
"""Skips where the kernels cannot run, and leaves the best instruction set behind."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.seeds(300)
def test_random_products(seed, isa, poisoned_memory):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    isa(library.ISAS[seed % len(library.ISAS)])
    dtype = library.DTYPES[seed // 5 % 3]
    size = rng.choice([(), (0,), (1,), (2,), (3, 1), (5,), (2, 4), (9,), (3, 6), (33,), (64,), (70,)])
    inputs, outputs = rng.choice([0, 1, 7, 16, 31, 32, 64, 100, 577, 1536]), rng.choice([0, 1, 3, 4, 18, 64, 193, 700])
    x = torch.randn(*size, inputs, dtype=dtype)
    if rng.random() < 0.3:
        x = torch.randn(*size, 2 * inputs, dtype=dtype)[..., ::2]
    weight = torch.randn(outputs, inputs, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype) if rng.random() < 0.5 else None
    found = torch.ops.moacompress_cpu.linear(x, weight, bias)
    expected = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == dtype
    assert found.shape == expected.shape
    bound = TOLERANCE[dtype] * (1 + expected.abs() + inputs**0.5 / 4)
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("dtype", library.DTYPES)
def test_threads_and_other_rows_change_no_bit(name, dtype, isa, threads):
    isa(name)
    x, weight, bias = torch.randn(11, 200).to(dtype), torch.randn(333, 200).to(dtype), torch.randn(333).to(dtype)
    alone = torch.cat([torch.ops.moacompress_cpu.linear(row[None], weight, bias) for row in x])
    for count in (1, 2, 17):
        threads(count)
        for rows in range(1, 12):
            assert torch.equal(torch.ops.moacompress_cpu.linear(x[:rows], weight, bias), alone[:rows])
        some = torch.ops.moacompress_cpu.linear(x, weight[5:7].contiguous(), bias[5:7].contiguous())
        assert torch.equal(some, alone[:, 5:7])


@pytest.mark.skipif("avx512_amx" not in library.ISAS, reason="this processor has no tiles")
def test_rows_of_tiles_change_no_bit_of_each_other(isa, threads):
    """From five rows on tiles multiply them, so there are two ways to sum up: each is the same whatever is beside."""
    isa("avx512_amx")
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((64, 96), (333, 96), (333,)))
    for count in (1, 2, 17):
        threads(count)
        all_rows = torch.ops.moacompress_cpu.linear(x, weight, bias)
        for first, rows in ((0, 5), (3, 16), (40, 17), (1, 63)):
            some = x[first : first + rows]
            assert torch.equal(torch.ops.moacompress_cpu.linear(some, weight, bias), all_rows[first : first + rows])
            fewer = torch.ops.moacompress_cpu.linear(some, weight[:48].contiguous(), bias[:48].contiguous())
            assert torch.equal(fewer, all_rows[first : first + rows, :48])
        alone = torch.cat([torch.ops.moacompress_cpu.linear(row[None], weight, bias) for row in x])
        assert torch.equal(torch.ops.moacompress_cpu.linear(x[:4], weight, bias), alone[:4])
        torch.testing.assert_close(all_rows, alone, atol=4e-2, rtol=2e-2)


@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("dtype", library.DTYPES)
def test_nan_reaches_its_row_or_its_output_alone(name, dtype, isa):
    isa(name)
    for rows, inputs, outputs in ((1, 7, 5), (3, 64, 33), (11, 200, 18), (20, 96, 40)):
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        before = torch.ops.moacompress_cpu.linear(x, weight, None)
        x[rows // 2, inputs - 1] = weight[outputs // 2, 0] = float("nan")
        found, spoilt = torch.ops.moacompress_cpu.linear(x, weight, None), torch.zeros(rows, outputs, dtype=torch.bool)
        spoilt[rows // 2] = spoilt[:, outputs // 2] = True
        assert torch.equal(found.isnan(), spoilt)
        assert torch.equal(found[~spoilt], before[~spoilt])


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), None, r"weight has the shape \[4, 5\], not \[any, 3\]"),
        (torch.zeros(2, 3), torch.zeros(4, 3, 1), None, "weight has the shape"),
        (torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.bfloat16), None, "another dtype"),
        (torch.zeros(2, 3), torch.zeros(3, 4).t(), None, "weight must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), "bias has the shape"),
        (torch.zeros(2, 3).double(), torch.zeros(4, 3).double(), None, "float32, bfloat16 or float16"),
        (torch.zeros(()), torch.zeros(4, 3), None, r"the input has the shape \[\]"),
    ],
)
def test_refusals(x, weight, bias, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moacompress_cpu.linear(x, weight, bias)


def test_the_fake_has_the_shape_of_the_real_one():
    arguments = (torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5))
    torch.library.opcheck(
        torch.ops.moacompress_cpu.linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )

"""Products with codes as they lie, in float16: a code in the low bits of 1024 is a number already, and nothing is converted.

A code c of 8 bits at most, written into the mantissa of float16's 1024, is 1024 + c. Products take those numbers, and what 1024
adds is taken off again by sums that are there anyway. Queries and weights are divided by a power of their row first, so that
they are numbers of float16 too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton.tiles import LEAST_UNIT, UNIT, code_bytes, code_words, scale_and_zero
from moacompress.rules import windows

BLOCK = tl.constexpr(windows.BLOCK)
MAGIC = tl.constexpr(0x64006400)
"""1024 in both halves of a word, in float16."""
OFFSET = tl.constexpr(1024.0)


@triton.jit
def halves(pairs):
    """Returns the codes in the low bytes of both halves of words, `[..., words]`, as float16 `[..., words, 2]`, 1024 more."""
    both = pairs | MAGIC
    low = both.to(tl.int16).to(tl.float16, bitcast=True)
    high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def code_halves(words, BITS: tl.constexpr):
    """Returns the four codes of words, or their low nibbles, `[..., words, 2, 2]` as of `halves`, then the high nibbles."""
    if BITS == 4:
        low = tl.join(halves(words & 0x000F000F), halves((words >> 8) & 0x000F000F))
        high = tl.join(halves((words >> 4) & 0x000F000F), halves((words >> 12) & 0x000F000F))
    else:
        low = tl.join(halves(words & 0x00FF00FF), halves((words >> 8) & 0x00FF00FF))
        high = low
    return low, high


@triton.jit
def key_halves(words, offset, place, there, BYTES: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr):
    """Returns keys' codes, or their low nibbles, as float16, 1024 more, `[tokens, 4 * WORDS]`, then the high nibbles."""
    found = code_words(words + (offset * (UNIT // 4) + place), there, BYTES // 4, BLOCK, WORDS, BITS)
    low, high = code_halves(found, BITS)
    return low.reshape(found.shape[0], 4 * WORDS), high.reshape(found.shape[0], 4 * WORDS)


@triton.jit
def value_halves(words, offset, quad, there, BYTES: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Returns values' codes, or their low nibbles, as float16, 1024 more, `[4 * quads, WIDTH]`, then the high nibbles."""
    found = code_words(words + (offset * (UNIT // 4) + quad * BYTES), there, BYTES, 1, WIDTH, BITS)
    low, high = code_halves(found, BITS)
    low = tl.permute(low, (0, 2, 3, 1)).reshape(4 * found.shape[0], WIDTH)
    high = tl.permute(high, (0, 2, 3, 1)).reshape(4 * found.shape[0], WIDTH)
    return low, high


@triton.jit
def codes_in(numbers, dtype: tl.constexpr):
    """Returns what is multiplied: codes and 1024 in float16, and codes alone in float32, whose sums would feel it."""
    if dtype == tl.float32:
        numbers = numbers.to(tl.float32) - OFFSET
    return numbers


@triton.jit
def offset_in(dtype: tl.constexpr):
    """Returns what `codes_in` has more than codes."""
    offset = OFFSET
    if dtype == tl.float32:
        offset = 0.0
    return offset


@triton.jit
def largest_of(x):
    """Returns the largest number of each row, without its sign, float32 `[rows]`."""
    return tl.max(tl.abs(x.to(tl.float32)), 1)


@triton.jit
def divided(x, by):
    """Returns rows divided by numbers that are not below 0, float32; by 1 instead of 0."""
    return x.to(tl.float32) / tl.where(by == 0, 1.0, by)[:, None]


@triton.jit
def code_scores(
    query,
    query_high,
    query_sum,
    Keys,
    offset,
    place,
    there,
    seen,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):
    """Products of queries with keys that have codes, float32 `[rows, tokens]`; arguments are those of `tiles.cached_scores`.

    Queries are float16 or float32; of 4 bits `query` is the first half and `query_high` the second.
    """
    BYTES: tl.constexpr = code_bytes(DIM, BITS)
    low, high = key_halves(Keys.to(tl.pointer_type(tl.int32)), offset, place, there, BYTES, WIDTH // 4, BITS)
    score = tl.dot(query, tl.trans(codes_in(low, query.dtype)), input_precision="ieee")
    if BITS == 4:
        score = tl.dot(query_high, tl.trans(codes_in(high, query.dtype)), score, input_precision="ieee")
    scale, zero = scale_and_zero(Keys.to(tl.pointer_type(tl.float16)), offset, place, seen, BYTES)
    return score * scale[None, :] + query_sum[:, None] * (zero - offset_in(query.dtype) * scale)[None, :]


@triton.jit
def add_halves(
    out,
    out_high,
    zeros,
    unit,
    weight,
    shrunk,
    read,
    Values,
    offset,
    place,
    quad_offset,
    quad,
    quad_there,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Adds weighted values that have codes; arguments are those of `tiles.add_codes`, and it returns the same.

    Here the weights `[rows, tokens]` are 0 where tokens do not count, `unit` is kept for every dtype, and `zeros` has what 1024
    in codes takes off too.
    """
    BYTES: tl.constexpr = code_bytes(DIM, BITS)
    scale, zero = scale_and_zero(Values.to(tl.pointer_type(tl.float16)), offset, place, read, BYTES)
    wanted = weight * scale[None, :]
    before = unit * shrunk
    unit = tl.maximum(tl.maximum(before, tl.max(wanted, 1)), LEAST_UNIT)
    inverse = 1 / unit
    scaled = (wanted * inverse[:, None]).to(dtype)
    # the zero points are weighed by what the codes are: their errors cancel
    real = scale > 0
    of_codes = tl.where(real, zero / tl.where(real, scale, 1.0), 0.0) - offset_in(dtype)
    alone = tl.where(real, 0.0, zero)
    found = tl.sum(scaled.to(tl.float32) * of_codes[None, :], 1) * unit
    zeros = zeros * shrunk + found + tl.sum(weight * alone[None, :], 1)
    low, high = value_halves(Values.to(tl.pointer_type(tl.int32)), quad_offset, quad, quad_there, BYTES, WIDTH, BITS)
    change = before * inverse
    out = tl.dot(scaled, codes_in(low, dtype), out * change[:, None], input_precision="ieee")
    if BITS == 4:
        out_high = tl.dot(scaled, codes_in(high, dtype), out_high * change[:, None], input_precision="ieee")
    return out, out_high, zeros, unit

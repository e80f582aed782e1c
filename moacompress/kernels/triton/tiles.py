"""What kernels do with a tile of tokens: read it from cache blocks, and add it to a softmax.

Codes are multiplied as they are: scales and zero points go into scores and weights (`docs/formats.md`), and int4 is two
products of half the size. Of what is not in 4 bits the second half is a number that is not used.

Kernels share these names for their arguments:

- Keys, Values: the first segment of the pool whose keys, or values, are of the launch's format; where scores are written, Kept
  is that of scores, int16
- KeyPlaces, ValuePlaces, ScorePlaces: where every block lies from there on, in units of 16 bytes, int64 `[blocks]`
- Table: block ids, integers `[rows, kv_heads, width]`; with RING, Rings say where blocks lie in it, see `ring_of`
- Lengths: tokens of the rows, int64 `[rows]`; Taken: whether each row is given a token, int64 `[rows]`
- Rules: the columns of a rule table, int64 `[columns, kv_heads]`
- scaling, softcap: factor on the scores, and, with SOFTCAP, their bound by tanh
- G: query heads of a KV head; GROUP: the same as a side of a product, as HEAD is of HEAD_DIM or of the bytes of a key, and
  VALUE of VALUE_DIM
- KEY_BITS, VALUE_BITS: of a code, 0 of native numbers; KEY_NORM, VALUE_NORM: factor of a rotation
- WIDE: whether products are in float32; TILE: tokens of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton import work_lists
from moacompress.rules import windows

BLOCK = tl.constexpr(windows.BLOCK)
UNIT = tl.constexpr(work_lists.UNIT)
LEAST_UNIT = tl.constexpr(1e-37)
"""Of sums of values that have codes: it has an inverse."""


@triton.constexpr_function
def code_bytes(dim, bits):
    """Returns the bytes of the codes of a vector of `dim` numbers: whole words of 4, see `docs/formats.md`."""
    return (dim + 15) // 16 * 12 if bits == 6 else (dim * bits + 31) // 32 * 4


@triton.jit
def visible_bounds(n, sink, alpha, beta_q, min_window, native_window):
    """Returns `first, sink_end, start` of `rules.windows.visible_intervals`, of one KV head in int64."""
    native_first = tl.maximum(n - native_window, 0)
    first = tl.where(native_window > 0, native_first, 0)
    window = tl.minimum(n, tl.maximum(min_window, alpha + ((beta_q * n) >> 10)))
    start = tl.maximum(n - window, first)
    sink_end = tl.minimum(tl.maximum(sink, first), start)
    return first, sink_end, start


@triton.jit
def ring_of(Rings, head, kv_heads, RING: tl.constexpr):
    """Returns how many blocks of sinks a KV head's table begins with, and how many its ring behind them has."""
    sinks = 0
    size = 1
    if RING:
        sinks = tl.load(Rings + head).to(tl.int32)
        size = tl.load(Rings + kv_heads + head).to(tl.int32)
    return sinks, size


@triton.jit
def in_ring(block, sinks, size, RING: tl.constexpr):
    """Returns where a table has a block; see `ring_of`."""
    if RING:
        number = block.to(tl.int32)
        block = tl.where(number < sinks, number, sinks + (number - sinks) % size)
    return block


@triton.jit
def code_words(at, there, COUNT: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Returns COUNT words of codes, or single bytes, that lie STEP apart from `at` on, int32 `[tokens, WIDTH]`, then 0.

    Bytes have a code of 8 bits or two of 4 bits. Of 6 bits there are COUNT / 3 more: what three words have of the fourth part
    is put together behind them, so that each byte is a code.
    """
    w = tl.arange(0, WIDTH)[None, :]
    start = at[:, None]
    there = there[:, None]
    if BITS == 6:
        ROW: tl.constexpr = COUNT // 3
        last = (w >= COUNT) & (w < COUNT + ROW)
        first = tl.where(last, w - COUNT, w)
        x = tl.load(start + first * STEP, mask=there & (w < COUNT + ROW), other=0).to(tl.int32)
        y = tl.load(start + (first + ROW) * STEP, mask=there & last, other=0).to(tl.int32)
        z = tl.load(start + (first + 2 * ROW) * STEP, mask=there & last, other=0).to(tl.int32)
        fourth = ((x >> 6) & 0x03030303) | ((y >> 4) & 0x0C0C0C0C) | ((z >> 2) & 0x30303030)
        found = tl.where(last, fourth, x & 0x3F3F3F3F)
    else:
        found = tl.load(start + w * STEP, mask=there & (w < COUNT), other=0).to(tl.int32)
    return found


@triton.jit
def key_words(words, offset, place, there, BYTES: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr):
    """Returns the bytes of keys' codes as int32 `[tokens, 4 * WORDS]`; each four of a token lie beside those of the next."""
    found = code_words(words + (offset * (UNIT // 4) + place), there, BYTES // 4, BLOCK, WORDS, BITS)
    shift = (tl.arange(0, 4) * 8)[None, None, :]
    return ((found[:, :, None] >> shift) & 255).reshape(found.shape[0], 4 * WORDS)


@triton.jit
def value_words(words, offset, quad, there, BYTES: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Returns the bytes of values' codes as int32 `[4 * quads, WIDTH]`; a byte of four tokens lies beside their next."""
    found = code_words(words + (offset * (UNIT // 4) + quad * BYTES), there, BYTES, 1, WIDTH, BITS)
    shift = (tl.arange(0, 4) * 8)[None, :, None]
    return ((found[:, None, :] >> shift) & 255).reshape(4 * found.shape[0], WIDTH)


@triton.jit
def value_bytes(start, offset, place, there, BYTES: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """As `value_words`, of tokens that may lie anywhere: int32 `[tokens, WIDTH]`."""
    at = start + (offset * UNIT + place // 4 * (4 * BYTES) + place % 4)
    return code_words(at, there, BYTES, 4, WIDTH, BITS)


@triton.jit
def scale_and_zero(halves, offset, place, visible, BYTES: tl.constexpr):
    """Returns the scales and zero points of tokens, float32; they lie behind the codes of the block's 16 tokens."""
    at = halves + offset * (UNIT // 2) + BYTES * (BLOCK // 2) + place
    scale = tl.load(at, mask=visible, other=0.0).to(tl.float32)
    return scale, tl.load(at + BLOCK, mask=visible, other=0.0).to(tl.float32)


@triton.jit
def native_numbers(pool, offset, place, there, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Returns native numbers of tokens, `[tokens, WIDTH]`, 0 where there are none."""
    d = tl.arange(0, WIDTH)
    item_bytes: tl.constexpr = pool.dtype.element_ty.primitive_bitwidth // 8
    at = pool + (offset * (UNIT // item_bytes) + place * DIM)[:, None] + d[None, :]
    return tl.load(at, mask=there[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def chunk_numbers(start, t, there, stride, DIM: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr):
    """Returns numbers from FIRST on of a chunk's tokens, `[tokens, WIDTH]`, 0 where there are none."""
    d = tl.arange(0, WIDTH)
    at = start + (t.to(tl.int64) * stride)[:, None] + (d + FIRST)[None, :]
    return tl.load(at, mask=there[:, None] & (d + FIRST < DIM)[None, :], other=0.0)


@triton.jit
def cached_scores(
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
    """Products of queries `[rows, WIDTH]` with keys of cache blocks, float32 `[rows, tokens]`.

    Of 4 bits `query` is the first half and `query_high` the second; `query_sum` are sums of whole queries, float32 `[rows]`,
    where keys have codes. Of each token, `[tokens]`: `offset` is where its block lies from Keys on, in units of 16 bytes,
    int64; `place` where it is in the block; `there` whether the block is there, and `seen` whether some query sees the token.
    """
    if BITS == 0:
        key = native_numbers(Keys, offset, place, seen, DIM, WIDTH).to(query.dtype)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
    else:
        BYTES: tl.constexpr = code_bytes(DIM, BITS)
        found = key_words(Keys.to(tl.pointer_type(tl.int32)), offset, place, there, BYTES, WIDTH // 4, BITS)
        if BITS == 4:
            score = tl.dot(query, tl.trans((found & 15).to(query.dtype)), input_precision="ieee")
            score = tl.dot(query_high, tl.trans((found >> 4).to(query.dtype)), score, input_precision="ieee")
        else:
            score = tl.dot(query, tl.trans(found.to(query.dtype)), input_precision="ieee")
        scale, zero = scale_and_zero(Keys.to(tl.pointer_type(tl.float16)), offset, place, seen, BYTES)
        score = score * scale[None, :] + query_sum[:, None] * zero[None, :]
    return score


@triton.jit
def softmax_step(score, seen, peak, denominator, scaling, softcap, SOFTCAP: tl.constexpr):
    """Takes the scores of a tile, float32 `[rows, tokens]`, into a softmax; `seen` says which count, and broadcasts with them.

    Returns the weights of the tile, `[rows, tokens]`; what sums so far are to be multiplied by, `[rows]`; and the new peak and
    denominator, `[rows]`.
    """
    score = score * scaling
    if SOFTCAP:
        score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
    score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrunk = tl.exp(peak - safe)
    weight = tl.exp(score - safe[:, None])
    return weight, shrunk, higher, denominator * shrunk + tl.sum(weight, 1)


@triton.jit
def add_codes(
    out,
    out_high,
    zeros,
    unit,
    weight,
    shrunk,
    seen,
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
    """Adds weighted values that have codes; returns `out, out_high, zeros, unit`.

    `out` are sums of values, of 4 bits of their first halves and `out_high` of the second, in units of `unit`, float32
    `[rows, WIDTH]`; `zeros` are those of zero points, float32 `[rows]`. `unit` is the largest weight times a scale so far,
    `[rows]`, before `shrunk`, as all sums are: of float16 alone, where such products are too small behind a token that
    outweighs all others; else 1. `weight` is float32 `[rows, tokens]`, and counts where `seen`; some query sees the tokens that
    are `read`. Values, `offset` and `place` are as Keys of `cached_scores`; `quad_offset`, `quad` and `quad_there` say of each
    four tokens where their block lies, which four of it they are, and whether it is there. `dtype` is multiplied in.
    """
    BYTES: tl.constexpr = code_bytes(DIM, BITS)
    scale, zero = scale_and_zero(Values.to(tl.pointer_type(tl.float16)), offset, place, read, BYTES)
    wanted = tl.where(seen, weight * scale[None, :], 0.0)
    change = shrunk
    if dtype == tl.float16:
        before = unit * shrunk
        unit = tl.maximum(tl.maximum(before, tl.max(wanted, 1)), LEAST_UNIT)
        change = before / unit
        scaled = (wanted / unit[:, None]).to(dtype)
        multiplied = scaled.to(tl.float32) * unit[:, None]
    else:
        scaled = wanted.to(dtype)
        multiplied = scaled.to(tl.float32)
    # the zero points are weighed by what the codes are: their errors cancel
    weight = tl.where(scale[None, :] > 0, multiplied / scale[None, :], weight)
    zeros = zeros * shrunk + tl.sum(tl.where(seen, weight * zero[None, :], 0.0), 1)
    found = value_words(Values.to(tl.pointer_type(tl.int32)), quad_offset, quad, quad_there, BYTES, WIDTH, BITS)
    out = out * change[:, None]
    if BITS == 4:
        out_high = out_high * change[:, None]
        out = tl.dot(scaled, (found & 15).to(dtype), out, input_precision="ieee")
        out_high = tl.dot(scaled, (found >> 4).to(dtype), out_high, input_precision="ieee")
    else:
        out = tl.dot(scaled, found.to(dtype), out, input_precision="ieee")
    return out, out_high, zeros, unit

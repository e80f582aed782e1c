"""New keys and values into cache blocks, in Triton: rotated, rounded and laid out as `docs/formats.md` says, to the bit.

No product may be contracted with a sum, and every quotient is rounded to nearest: kernels that round are compiled with
`enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.reference import codes
from moacompress.kernels.triton.tiles import BLOCK, UNIT, code_bytes, in_ring, ring_of

LARGEST = tl.constexpr(codes.LARGEST)
NAN_BITS = tl.constexpr(0x7E00)
TO_INTEGER = tl.constexpr(12582912.0)
"""Added to a float32 below 2^22 it leaves the nearest integer, ties to even, in the last bits."""


@triton.jit
def sums_and_differences(x, STEP: tl.constexpr):
    """Returns vectors `[tokens, padded]` after a stage of a rotation: numbers STEP apart are added and subtracted."""
    pairs = x.reshape(x.shape[0], x.shape[1] // (2 * STEP), 2, STEP)
    low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)).reshape(x.shape[0], x.shape[1])


@triton.jit
def rotated(x, DIM: tl.constexpr, NORM: tl.constexpr):
    """Returns float32 vectors `[tokens, padded]` in the rotated basis; beyond DIM there is anything."""
    TURNED: tl.constexpr = DIM & -DIM
    for stage in tl.static_range(0, 16):
        if 1 << stage < TURNED:
            x = sums_and_differences(x, 1 << stage)
    if TURNED > 1:
        x = x * NORM
    return x


@triton.jit
def encoded(x, DIM: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr):
    """Returns codes, int32 `[tokens, padded]`, 0 beyond DIM, and the bits of scale and zero point, int16 `[tokens]` each."""
    lane = tl.arange(0, x.shape[1])[None, :]
    inside = lane < DIM
    y = rotated(x, DIM, NORM)
    finite = tl.abs(y) < float("inf")
    nonfinite = tl.max(tl.where(inside & (finite == 0), 1, 0), 1) > 0
    # adding makes a minus zero a plus
    low = tl.min(tl.where(inside & finite, y, float("inf")), 1) + 0.0
    high = tl.max(tl.where(inside & finite, y, float("-inf")), 1) + 0.0
    zero = tl.minimum(tl.maximum(low, -LARGEST), LARGEST).to(tl.float16)
    LEVELS: tl.constexpr = (1 << BITS) - 1
    scale = tl.minimum(tl.div_rn(high - low, float(LEVELS)), LARGEST).to(tl.float16)
    wide = scale.to(tl.float32)
    inverse = tl.where(wide == 0, 0.0, tl.div_rn(1.0, tl.where(wide == 0, 1.0, wide)))
    part = (y - zero.to(tl.float32)[:, None]) * inverse[:, None]
    within = tl.minimum(tl.maximum(part, 0.0), float(LEVELS))
    code = (within + TO_INTEGER).to(tl.int32, bitcast=True) & LEVELS
    code = tl.where(inside & (nonfinite == 0)[:, None], code, 0)
    scale_bits = tl.where(nonfinite, NAN_BITS, scale.to(tl.int16, bitcast=True).to(tl.int32)).to(tl.int16)
    zero_bits = tl.where(nonfinite, NAN_BITS, zero.to(tl.int16, bitcast=True).to(tl.int32)).to(tl.int16)
    return code, scale_bits, zero_bits


@triton.jit
def write(
    vectors, Memory, at, place, there, DIM: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr, IS_VALUE: tl.constexpr
):
    """Writes vectors `[tokens, padded]` of the model's dtype into the K or V parts of blocks.

    Blocks lie at `at`, in units of 16 bytes from Memory on, and tokens at their `place` in them; only those that are `there`
    are written. NORM is the factor of a rotation.
    """
    SIZE: tl.constexpr = vectors.shape[1]
    lane = tl.arange(0, SIZE)[None, :]
    if BITS == 0:
        item_bytes: tl.constexpr = Memory.dtype.element_ty.primitive_bitwidth // 8
        into = Memory + (at * (UNIT // item_bytes) + place * DIM)[:, None] + lane
        tl.store(into, vectors, mask=there[:, None] & (lane < DIM))
    else:
        code, scale, zero = encoded(vectors.to(tl.float32), DIM, BITS, NORM)
        HALF: tl.constexpr = (DIM + 1) // 2
        BYTES: tl.constexpr = code_bytes(DIM, BITS)
        if BITS == 4:
            above = tl.minimum(lane + HALF, SIZE - 1).broadcast_to(code.shape)
            high = tl.where(lane + HALF < DIM, tl.gather(code, above, 1), 0)
            code = tl.where(lane < HALF, code | (high << 4), 0)
        if BITS == 6:
            ROW: tl.constexpr = BYTES // 3
            at_fourth = 3 * ROW + lane % ROW
            fourth = tl.gather(code, tl.minimum(at_fourth, SIZE - 1).broadcast_to(code.shape), 1)
            fourth = tl.where(at_fourth < DIM, fourth, 0)
            code = tl.where(lane < BYTES, code | ((fourth >> (lane // ROW * 2)) & 3) << 6, 0)
        if IS_VALUE:
            start = at * UNIT + 4 * BYTES * (place // 4) + place % 4
            into = Memory.to(tl.pointer_type(tl.uint8)) + start[:, None] + 4 * lane
            tl.store(into, code.to(tl.uint8), mask=there[:, None] & (lane < BYTES))
        else:
            shift = (tl.arange(0, 4) * 8)[None, None, :]
            words = tl.sum(code.reshape(code.shape[0], SIZE // 4, 4) << shift, 2)
            w = tl.arange(0, SIZE // 4)[None, :]
            into = Memory.to(tl.pointer_type(tl.int32)) + (at * (UNIT // 4) + place)[:, None] + w * BLOCK
            tl.store(into, words, mask=there[:, None] & (w * 4 < BYTES))
        numbers = Memory.to(tl.pointer_type(tl.int16)) + at * (UNIT // 2) + BYTES * (BLOCK // 2) + place
        tl.store(numbers, scale, mask=there)
        tl.store(numbers + BLOCK, zero, mask=there)


@triton.jit(do_not_specialize=["count", "columns"])
def append(
    Key,
    Value,
    Keys,
    Values,
    KeyPlaces,
    ValuePlaces,
    Work,
    count,
    kv_heads,
    columns,
    key_row,
    key_head,
    key_column,
    value_row,
    value_head,
    value_column,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_NORM: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    WITH_KEYS: tl.constexpr,
):
    """Writes tokens of KV heads of one pair of formats into their blocks, keys and values, or values alone without WITH_KEYS.

    Key is `[rows, kv_heads, columns, HEAD_DIM]` and Value as large, with the strides that follow; the numbers of a vector lie
    side by side. Work has `(row * kv_heads + head) * columns + column` of each token, then its block id * 16 + place, int64
    `[2, count]`.
    """
    t = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    source = tl.load(Work + t)
    slot = tl.load(Work + count + t)
    block = slot // BLOCK
    place = slot % BLOCK
    column = source % columns
    pair = source // columns
    row = pair // kv_heads
    head = pair % kv_heads
    there = t < count
    if WITH_KEYS:
        d = tl.arange(0, HEAD)[None, :]
        key_from = Key + (row * key_row + head * key_head + column * key_column)[:, None] + d
        key = tl.load(key_from, mask=d < HEAD_DIM, other=0.0)
        write(key, Keys, tl.load(KeyPlaces + block), place, there, HEAD_DIM, KEY_BITS, KEY_NORM, False)
    v = tl.arange(0, VALUE)[None, :]
    value_from = Value + (row * value_row + head * value_head + column * value_column)[:, None] + v
    value = tl.load(value_from, mask=v < VALUE_DIM, other=0.0)
    write(value, Values, tl.load(ValuePlaces + block), place, there, VALUE_DIM, VALUE_BITS, VALUE_NORM, True)


@triton.jit(do_not_specialize=["heads", "width"])
def append_next(
    Key,
    Value,
    GateScores,
    Keys,
    Values,
    Kept,
    KeyPlaces,
    ValuePlaces,
    ScorePlaces,
    Table,
    Rings,
    Lengths,
    Taken,
    Heads,
    Selecting,
    heads,
    kv_heads,
    width,
    key_row,
    key_head,
    value_row,
    value_head,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_NORM: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    SCORED: tl.constexpr,
    WITH_KEYS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Writes one more token of every row that is given one, for KV heads of one pair of formats, behind those of its cache.

    Key is `[rows, kv_heads, HEAD_DIM]` and Value is as large, with the strides that follow; the numbers of a vector lie side by
    side. GateScores are those of the tokens, int16 `[rows, kv_heads]`; with SCORED they are written for the KV heads that are
    Selecting, int64 `[kv_heads]`. Heads has the KV heads, and those in whose blocks they are, int64 `[2, heads]`. With COUNTED
    the lengths count these tokens already; without WITH_KEYS values alone are written.
    """
    one = tl.arange(0, 1)
    row = (tl.program_id(0) // heads).to(tl.int64)
    number = tl.program_id(0) % heads
    head = tl.load(Heads + number)
    taken = tl.load(Taken + row)
    n = tl.load(Lengths + row)
    if COUNTED:
        n -= taken
    own = row * kv_heads + head
    head_of_blocks = tl.load(Heads + heads + number)
    pair = row * kv_heads + head_of_blocks
    sinks, size = ring_of(Rings, head_of_blocks, kv_heads, True)
    block = tl.load(Table + pair * width + in_ring(n // BLOCK, sinks, size, True)).to(tl.int64) + one
    place = n % BLOCK + one
    there = taken + one > 0
    block = tl.where(there, block, 0)  # a row that is given no token may have none
    d = tl.arange(0, HEAD)[None, :]
    v = tl.arange(0, VALUE)[None, :]
    if WITH_KEYS:
        key = tl.load(Key + row * key_row + head * key_head + d, mask=d < HEAD_DIM, other=0.0)
        write(key, Keys, tl.load(KeyPlaces + block), place, there, HEAD_DIM, KEY_BITS, KEY_NORM, False)
    value = tl.load(Value + row * value_row + head * value_head + v, mask=v < VALUE_DIM, other=0.0)
    write(value, Values, tl.load(ValuePlaces + block), place, there, VALUE_DIM, VALUE_BITS, VALUE_NORM, True)
    if SCORED:
        at = Kept + tl.load(ScorePlaces + block) * (UNIT // 2) + place
        selects = there & (tl.load(Selecting + head) + one > 0)
        tl.store(at, tl.load(GateScores + own) + tl.zeros([1], tl.int16), mask=selects)

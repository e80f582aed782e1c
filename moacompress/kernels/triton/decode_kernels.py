"""Attention of one query a row over cache blocks, in Triton: parts of what is visible, and their sum.

A KV head's visible blocks are one axis: those of the sinks, then those of the window, by the arithmetic of `rules/windows.py`.
Programs attend to a stretch of that axis each, for all query heads of a group, so keys and values are read once; `merge` adds
up what they found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton.half_codes import add_halves, code_scores, divided, largest_of
from moacompress.kernels.triton.tiles import BLOCK, in_ring, native_numbers, ring_of, softmax_step, visible_bounds


@triton.jit(do_not_specialize=["width", "chunk"])
def split(
    Query,
    Keys,
    Values,
    KeyPlaces,
    ValuePlaces,
    Table,
    Rings,
    Lengths,
    Rules,
    Work,
    Kept,
    Partial,
    PartialLse,
    scaling,
    softcap,
    kv_heads,
    width,
    chunk,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    RING: tl.constexpr,
    KEEP: tl.constexpr,
    REUSE: tl.constexpr,
):
    """Attention of one group of queries over a stretch of the blocks that they see.

    Query is `[rows, heads, HEAD_DIM]`, contiguous; rotated where keys have codes. Work says of each program its row, its KV
    head, the number of its stretch of `chunk` blocks, whole tiles, and where the result goes, int64 `[programs, 4]`. Partial
    takes the results, float32 `[places, G, VALUE_DIM]`, in the rotated basis where values have codes; PartialLse the log of the
    sum of the exponentials, float32 `[places, G]`. With KEEP scores are written to Kept before a bound, with REUSE they are
    read from there, and neither queries nor keys are: float32 `[rows, kv_heads, G, width * 16]`, by the places of tokens under
    the table. STAGES tiles are read ahead.
    """
    item = Work + tl.program_id(0) * 4
    row = tl.load(item)
    head = tl.load(item + 1)
    stretch = tl.load(item + 2)
    into = tl.load(item + 3)
    n = tl.load(Lengths + row)
    rule = Rules + head
    first, sink_end, start = visible_bounds(
        n,
        tl.load(rule),
        tl.load(rule + kv_heads),
        tl.load(rule + 2 * kv_heads),
        tl.load(rule + 3 * kv_heads),
        tl.load(rule + 4 * kv_heads),
    )
    first_block = first // BLOCK
    window_block = start // BLOCK
    sinks = tl.minimum((sink_end + BLOCK - 1) // BLOCK, window_block) - first_block
    sinks = tl.where(sink_end > first, tl.maximum(sinks, 0), 0)
    total = sinks + (n + BLOCK - 1) // BLOCK - window_block
    begin = stretch * chunk
    end = tl.minimum(begin + chunk, total)

    KEY_HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    VALUE_HALF: tl.constexpr = (VALUE_DIM + 1) // 2

    g = tl.arange(0, GROUP)
    d = tl.arange(0, HEAD)
    v = tl.arange(0, VALUE)
    real = (g < G)[:, None]
    CODES: tl.constexpr = tl.float32 if WIDE else tl.float16
    factor = 1.0
    if not REUSE:
        asked = Query + (row * kv_heads * G + head * G) * HEAD_DIM + g[:, None] * HEAD_DIM + d[None, :]
        if KEY_BITS == 4:
            query = tl.load(asked, mask=real & (d < KEY_HALF)[None, :], other=0.0)
            query_high = tl.load(asked + KEY_HALF, mask=real & (d < HEAD_DIM - KEY_HALF)[None, :], other=0.0)
        else:
            query = tl.load(asked, mask=real & (d < HEAD_DIM)[None, :], other=0.0)
            query_high = query
        if WIDE:
            query = query.to(tl.float32)
        if KEY_BITS > 0:
            largest = tl.maximum(largest_of(query), largest_of(query_high))
            query = divided(query, largest).to(CODES)
            query_high = divided(query_high, largest).to(CODES)
            query_sum = tl.sum(query.to(tl.float32), 1)
            if KEY_BITS == 4:
                query_sum += tl.sum(query_high.to(tl.float32), 1)
            factor = scaling * largest[:, None]
        else:
            factor = scaling
    kept = Kept + ((row * kv_heads + head) * G + g[:, None]) * (width * BLOCK)

    peak = tl.full([GROUP], float("-inf"), tl.float32)
    denominator = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, VALUE], tl.float32)
    out_high = tl.zeros([GROUP, VALUE if VALUE_BITS == 4 else 1], tl.float32)
    zeros = tl.zeros([GROUP], tl.float32)
    unit = tl.zeros([GROUP], tl.float32)

    t = tl.arange(0, TILE)
    place = t % BLOCK
    u = tl.arange(0, TILE // 4)
    table = Table + (row * kv_heads + head) * width
    ring_sinks, ring_size = ring_of(Rings, head, kv_heads, RING)
    for at in tl.range(begin, end, TILE // BLOCK, num_stages=STAGES):
        x = at + t // BLOCK
        block = tl.where(x < sinks, first_block + x, window_block + x - sinks)
        position = block * BLOCK + place
        inside = ((position >= first) & (position < sink_end)) | ((position >= start) & (position < n))
        there = x < end
        seen = there & inside
        slot = in_ring(block, ring_sinks, ring_size, RING)
        block_id = tl.load(table + slot, mask=there, other=0)
        under = slot * BLOCK + place
        if REUSE:
            score = tl.load(kept + under[None, :], mask=real & seen[None, :], other=0.0)
        else:
            key_at = tl.load(KeyPlaces + block_id, mask=there, other=0)
            if KEY_BITS == 0:
                key = native_numbers(Keys, key_at, place, seen, HEAD_DIM, HEAD).to(query.dtype)
                score = tl.dot(query, tl.trans(key), input_precision="ieee")
            else:
                score = code_scores(
                    query, query_high, query_sum, Keys, key_at, place, there, seen, HEAD_DIM, HEAD, KEY_BITS
                )
            if KEEP:
                tl.store(kept + under[None, :], score * factor, mask=real & seen[None, :])
        weight, shrunk, peak, denominator = softmax_step(
            score, seen[None, :], peak, denominator, factor, softcap, SOFTCAP
        )
        value_at = tl.load(ValuePlaces + block_id, mask=there, other=0)
        if VALUE_BITS == 0:
            value = native_numbers(Values, value_at, place, seen, VALUE_DIM, VALUE)
            if WIDE:
                value = value.to(tl.float32)
            out = tl.dot(weight.to(value.dtype), value, out * shrunk[:, None], input_precision="ieee")
        else:
            quad_x = at + u // (BLOCK // 4)
            quad_there = quad_x < end
            quad_block = tl.where(quad_x < sinks, first_block + quad_x, window_block + quad_x - sinks)
            quad_slot = in_ring(quad_block, ring_sinks, ring_size, RING)
            quad_id = tl.load(table + quad_slot, mask=quad_there, other=0)
            quad_at = tl.load(ValuePlaces + quad_id, mask=quad_there, other=0)
            out, out_high, zeros, unit = add_halves(
                out,
                out_high,
                zeros,
                unit,
                weight,
                shrunk,
                seen,
                Values,
                value_at,
                place,
                quad_at,
                u % (BLOCK // 4),
                quad_there,
                VALUE_DIM,
                VALUE,
                VALUE_BITS,
                CODES,
            )

    divisor = tl.where(denominator == 0, 1.0, denominator)
    if VALUE_BITS > 0:
        out = out * unit[:, None] + zeros[:, None]
    results = Partial + into * G * VALUE_DIM + g[:, None] * VALUE_DIM + v[None, :]
    if VALUE_BITS == 4:
        out_high = out_high * unit[:, None] + zeros[:, None]
        high_real = real & (v < VALUE_DIM - VALUE_HALF)[None, :]
        tl.store(results + VALUE_HALF, out_high / divisor[:, None], mask=high_real)
        tl.store(results, out / divisor[:, None], mask=real & (v < VALUE_HALF)[None, :])
    else:
        tl.store(results, out / divisor[:, None], mask=real & (v < VALUE_DIM)[None, :])
    tl.store(PartialLse + into * G + g, peak + tl.log(denominator), mask=g < G)


@triton.jit
def merge(
    Partial,
    PartialLse,
    SinkLogits,
    Begins,
    Out,
    Lse,
    kv_heads,
    G: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    LOGITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Adds up what `split` found for a query head, PARTS results at once.

    Results of each row and KV head follow on each other, and begin, and all end, at Begins, int64 `[rows * kv_heads + 1]`. With
    LOGITS there are SinkLogits, `[heads]`. Out is `[rows, heads, VALUE_DIM]`, Lse float32 `[rows, heads]`.
    """
    at = tl.program_id(0)
    group = at // G
    own = at % G
    begin = tl.load(Begins + group)
    end = tl.load(Begins + group + 1)
    v = tl.arange(0, VALUE)
    c = tl.arange(0, PARTS)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([VALUE], tl.float32)
    if LOGITS:
        logit = tl.load(SinkLogits + group % kv_heads * G + own + tl.arange(0, 1)).to(tl.float32)
        peak = tl.where(begin < end, logit, peak)
        total = tl.where(begin < end, 1.0, total)
    for part in tl.range(begin, end, PARTS):
        there = part + c < end
        place = (part + c) * G + own
        lse = tl.load(PartialLse + place, mask=there, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(lse, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(lse - safe)
        shrunk = tl.exp(peak - safe)
        found = tl.load(
            Partial + place[:, None] * VALUE_DIM + v[None, :], mask=there[:, None] & (v < VALUE_DIM)[None, :], other=0.0
        )
        out = out * shrunk + tl.sum(weight[:, None] * found, 0)
        total = total * shrunk + tl.sum(weight, 0)
        peak = higher
    divisor = tl.where(begin < end, total, 1.0)
    tl.store(Out + at * VALUE_DIM + v, out / divisor, mask=v < VALUE_DIM)
    tl.store(Lse + at + tl.arange(0, 1), peak + tl.log(total))

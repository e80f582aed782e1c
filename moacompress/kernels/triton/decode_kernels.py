"""Attention of one query a row over cache blocks, in Triton: parts of what is visible, and their sum.

A KV head's visible blocks are one axis: those of the sinks, then those of the window, by the arithmetic of `rules/windows.py`.
Programs attend to a stretch of that axis each, for all query heads of a group, so keys and values are read once; `merge` adds
up what they found. Codes are multiplied as they are: scales and zero points go into scores and weights (`docs/formats.md`), and
int4 is two products of half the size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton import work_lists
from moacompress.rules import windows

BLOCK = tl.constexpr(windows.BLOCK)
UNIT = tl.constexpr(work_lists.UNIT)


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
def key_words(words, offset, place, there, BYTES: tl.constexpr, WORDS: tl.constexpr):
    """Returns the bytes of keys' codes as int32 `[tokens, 4 * WORDS]`; each four of a token lie beside those of the next."""
    w = tl.arange(0, WORDS)
    at = words + (offset * (UNIT // 4) + place)[:, None] + (w * BLOCK)[None, :]
    found = tl.load(at, mask=there[:, None] & (w * 4 < BYTES)[None, :], other=0)
    shift = (tl.arange(0, 4) * 8)[None, None, :]
    return ((found[:, :, None] >> shift) & 255).reshape(found.shape[0], 4 * WORDS)


@triton.jit
def value_words(words, offset, quad, there, BYTES: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the bytes of values' codes as int32 `[4 * quads, WIDTH]`; a byte of four tokens lies beside their next."""
    b = tl.arange(0, WIDTH)
    at = words + (offset * (UNIT // 4) + quad * BYTES)[:, None] + b[None, :]
    found = tl.load(at, mask=there[:, None] & (b < BYTES)[None, :], other=0)
    shift = (tl.arange(0, 4) * 8)[None, :, None]
    return ((found[:, None, :] >> shift) & 255).reshape(4 * found.shape[0], WIDTH)


@triton.jit
def scale_and_zero(halves, offset, place, visible, BYTES: tl.constexpr):
    """Returns the scales and zero points of tokens, float32; they lie behind the codes of the block's 16 tokens."""
    at = halves + offset * (UNIT // 2) + BYTES * (BLOCK // 2) + place
    scale = tl.load(at, mask=visible, other=0.0).to(tl.float32)
    return scale, tl.load(at + BLOCK, mask=visible, other=0.0).to(tl.float32)


@triton.jit
def split(
    Query,
    Keys,
    Values,
    KeyPlaces,
    ValuePlaces,
    Table,
    Lengths,
    Rules,
    Work,
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
):
    """Attention of one group of queries over a stretch of the blocks that they see.

    Args:
        Query: `[rows, heads, HEAD_DIM]`, contiguous; rotated where keys have codes.
        Keys: the first segment of the pool whose keys are of this format.
        Values: likewise.
        KeyPlaces: where every block lies from there on, in units of 16 bytes, int64 `[blocks]`.
        ValuePlaces: likewise.
        Table: block ids, int64 `[rows, kv_heads, width]`.
        Lengths: int64 `[rows]`.
        Rules: the columns of a rule table, int64 `[columns, kv_heads]`.
        Work: row, KV head, number of the stretch, and where the result goes, int64 `[programs, 4]`.
        Partial: `[places, G, VALUE_DIM]`, float32; in the rotated basis where values have codes.
        PartialLse: log of the sum of the exponentials, `[places, G]`, float32.
        scaling: factor on the scores.
        softcap: bound of the scores by tanh.
        kv_heads: of a row.
        width: of the table.
        chunk: blocks of a stretch, whole tiles.
        G: query heads of a KV head.
        GROUP: G, as a side of a product; likewise HEAD of HEAD_DIM, or of the bytes of a key, and VALUE of those of a value.
        HEAD_DIM: numbers of a key.
        HEAD: see GROUP.
        VALUE_DIM: numbers of a value.
        VALUE: see GROUP.
        KEY_BITS: of a code; 0 of native numbers.
        VALUE_BITS: likewise.
        SOFTCAP: whether there is one.
        WIDE: whether products are in float32.
        TILE: tokens of a tile.
        STAGES: tiles that are read ahead.
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

    KEY_BYTES: tl.constexpr = (HEAD_DIM * KEY_BITS // 8 + (HEAD_DIM * KEY_BITS % 8 > 0) + 3) // 4 * 4
    VALUE_BYTES: tl.constexpr = (VALUE_DIM * VALUE_BITS // 8 + (VALUE_DIM * VALUE_BITS % 8 > 0) + 3) // 4 * 4
    KEY_HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    VALUE_HALF: tl.constexpr = (VALUE_DIM + 1) // 2

    g = tl.arange(0, GROUP)
    d = tl.arange(0, HEAD)
    v = tl.arange(0, VALUE)
    asked = Query + (row * kv_heads * G + head * G) * HEAD_DIM + g[:, None] * HEAD_DIM + d[None, :]
    real = (g < G)[:, None]
    if KEY_BITS == 4:
        query = tl.load(asked, mask=real & (d < KEY_HALF)[None, :], other=0.0)
        query_high = tl.load(asked + KEY_HALF, mask=real & (d < HEAD_DIM - KEY_HALF)[None, :], other=0.0)
        if WIDE:
            query_high = query_high.to(tl.float32)
    else:
        query = tl.load(asked, mask=real & (d < HEAD_DIM)[None, :], other=0.0)
    if WIDE:
        query = query.to(tl.float32)
    if KEY_BITS > 0:
        query_sum = tl.sum(query.to(tl.float32), 1)
        if KEY_BITS == 4:
            query_sum += tl.sum(query_high.to(tl.float32), 1)

    peak = tl.full([GROUP], float("-inf"), tl.float32)
    denominator = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, VALUE], tl.float32)
    if VALUE_BITS == 4:
        out_high = tl.zeros([GROUP, VALUE], tl.float32)
    if VALUE_BITS > 0:
        zeros = tl.zeros([GROUP], tl.float32)

    t = tl.arange(0, TILE)
    place = t % BLOCK
    u = tl.arange(0, TILE // 4)
    table = Table + (row * kv_heads + head) * width
    for at in tl.range(begin, end, TILE // BLOCK, num_stages=STAGES):
        x = at + t // BLOCK
        block = tl.where(x < sinks, first_block + x, window_block + x - sinks)
        position = block * BLOCK + place
        inside = ((position >= first) & (position < sink_end)) | ((position >= start) & (position < n))
        seen = (x < end) & inside
        there = x < end
        block_id = tl.load(table + block, mask=there, other=0)
        key_at = tl.load(KeyPlaces + block_id, mask=there, other=0)
        if KEY_BITS == 0:
            keys = (
                Keys + (key_at * (UNIT // (Keys.dtype.element_ty.primitive_bitwidth // 8)) + place * HEAD_DIM)[:, None]
            )
            key = tl.load(keys + d[None, :], mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(query.dtype)
            score = tl.dot(query, tl.trans(key), input_precision="ieee")
        else:
            words = Keys.to(tl.pointer_type(tl.int32))
            found = key_words(words, key_at, place, there, KEY_BYTES, HEAD // 4)
            if KEY_BITS == 4:
                low = (found & 15).to(query.dtype)
                high = (found >> 4).to(query.dtype)
                score = tl.dot(query, tl.trans(low), input_precision="ieee")
                score = tl.dot(query_high, tl.trans(high), score, input_precision="ieee")
            else:
                score = tl.dot(query, tl.trans(found.to(query.dtype)), input_precision="ieee")
            scale, zero = scale_and_zero(Keys.to(tl.pointer_type(tl.float16)), key_at, place, seen, KEY_BYTES)
            score = score * scale[None, :] + query_sum[:, None] * zero[None, :]
        score = score * scaling
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrunk = tl.exp(peak - safe)
        weight = tl.exp(score - safe[:, None])
        denominator = denominator * shrunk + tl.sum(weight, 1)
        peak = higher
        out = out * shrunk[:, None]
        if VALUE_BITS == 0:
            value_at = tl.load(ValuePlaces + block_id, mask=there, other=0)
            item_bytes: tl.constexpr = Values.dtype.element_ty.primitive_bitwidth // 8
            values = Values + (value_at * (UNIT // item_bytes) + place * VALUE_DIM)[:, None]
            value = tl.load(values + v[None, :], mask=seen[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
            out = tl.dot(weight.to(query.dtype), value.to(query.dtype), out, input_precision="ieee")
        else:
            value_at = tl.load(ValuePlaces + block_id, mask=there, other=0)
            scale, zero = scale_and_zero(Values.to(tl.pointer_type(tl.float16)), value_at, place, seen, VALUE_BYTES)
            scaled = (weight * scale[None, :]).to(query.dtype)
            # the zero points are weighed by what the codes are: their errors cancel
            weight = tl.where(scale[None, :] > 0, scaled.to(tl.float32) / scale[None, :], weight)
            zeros = zeros * shrunk + tl.sum(weight * zero[None, :], 1)
            quad_x = at + u // (BLOCK // 4)
            quad_there = quad_x < end
            quad_block = tl.where(quad_x < sinks, first_block + quad_x, window_block + quad_x - sinks)
            quad_id = tl.load(table + quad_block, mask=quad_there, other=0)
            quad_at = tl.load(ValuePlaces + quad_id, mask=quad_there, other=0)
            words = Values.to(tl.pointer_type(tl.int32))
            found = value_words(words, quad_at, u % (BLOCK // 4), quad_there, VALUE_BYTES, VALUE)
            if VALUE_BITS == 4:
                out_high = out_high * shrunk[:, None]
                out = tl.dot(scaled, (found & 15).to(query.dtype), out, input_precision="ieee")
                out_high = tl.dot(scaled, (found >> 4).to(query.dtype), out_high, input_precision="ieee")
            else:
                out = tl.dot(scaled, found.to(query.dtype), out, input_precision="ieee")

    divisor = tl.where(denominator == 0, 1.0, denominator)
    if VALUE_BITS > 0:
        out += zeros[:, None]
    results = Partial + into * G * VALUE_DIM + g[:, None] * VALUE_DIM + v[None, :]
    if VALUE_BITS == 4:
        out_high += zeros[:, None]
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
    """Adds up what `split` found for a query head.

    Args:
        Partial: see `split`; those of a row and KV head follow on each other.
        PartialLse: likewise.
        SinkLogits: learned logits, `[heads]`.
        Begins: where those of each row and KV head begin, and all end, int64 `[rows * kv_heads + 1]`.
        Out: `[rows, heads, VALUE_DIM]`.
        Lse: `[rows, heads]`, float32.
        kv_heads: of a row.
        G: query heads of a KV head.
        VALUE_DIM: numbers of a value.
        VALUE: the same, as a power of two.
        LOGITS: whether there are learned logits.
        PARTS: results that are added at once.
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

"""Tokens that gates select, in Triton: who is evicted for whom, and copies of tokens as they are kept."""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton.tiles import BLOCK, UNIT, code_bytes, in_ring, ring_of, visible_bounds

NATIVE_WINDOW = tl.constexpr(4)
"""Row of a rule table; see `rules.rule_table.COLUMNS`."""
SELECT_ALPHA = tl.constexpr(7)
"""As `NATIVE_WINDOW`."""
SELECT_BETA = tl.constexpr(8)
"""As `NATIVE_WINDOW`."""


@triton.jit
def tokens_left(n, rule, kv_heads):
    """Returns `rules.windows.tokens_left` of a KV head, int64; `rule` is where its first number lies."""
    native_window = tl.load(rule + NATIVE_WINDOW * kv_heads)
    _first, sink_end, start = visible_bounds(
        n,
        tl.load(rule),
        tl.load(rule + kv_heads),
        tl.load(rule + 2 * kv_heads),
        tl.load(rule + 3 * kv_heads),
        native_window,
    )
    return tl.where(native_window == 0, start - sink_end, 0)


@triton.jit
def copy_vector(
    Memory,
    from_at,
    from_place,
    to_at,
    to_place,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    IS_VALUE: tl.constexpr,
):
    """Copies a vector as it is kept from one block to another; the blocks are at so many units of 16 bytes from Memory on."""
    lane = tl.arange(0, SIZE)
    if BITS == 0:
        item_bytes: tl.constexpr = Memory.dtype.element_ty.primitive_bitwidth // 8
        unit: tl.constexpr = UNIT // item_bytes
        found = tl.load(Memory + from_at * unit + from_place * DIM + lane, mask=lane < DIM)
        tl.store(Memory + to_at * unit + to_place * DIM + lane, found, mask=lane < DIM)
    else:
        BYTES: tl.constexpr = code_bytes(DIM, BITS)
        if IS_VALUE:
            memory = Memory.to(tl.pointer_type(tl.uint8))
            source = memory + from_at * UNIT + 4 * BYTES * (from_place // 4) + from_place % 4
            target = memory + to_at * UNIT + 4 * BYTES * (to_place // 4) + to_place % 4
            tl.store(target + 4 * lane, tl.load(source + 4 * lane, mask=lane < BYTES), mask=lane < BYTES)
        else:
            words = Memory.to(tl.pointer_type(tl.int32))
            source = words + from_at * (UNIT // 4) + from_place + lane * BLOCK
            target = words + to_at * (UNIT // 4) + to_place + lane * BLOCK
            tl.store(target, tl.load(source, mask=lane * 4 < BYTES), mask=lane * 4 < BYTES)
        numbers = Memory.to(tl.pointer_type(tl.int16)) + BYTES * (BLOCK // 2)
        source = numbers + from_at * (UNIT // 2) + from_place
        target = numbers + to_at * (UNIT // 2) + to_place
        tl.store(target, tl.load(source))
        tl.store(target + BLOCK, tl.load(source + BLOCK))


@triton.jit
def copy_token(
    Keys,
    Values,
    Kept,
    KeyPlaces,
    ValuePlaces,
    ScorePlaces,
    source,
    target,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
):
    """Copies a token, with its score, from one slot to another: block id * 16 + place in the block."""
    block = source // BLOCK
    place = source % BLOCK
    into = target // BLOCK
    at = target % BLOCK
    key_from = tl.load(KeyPlaces + block)
    key_to = tl.load(KeyPlaces + into)
    copy_vector(Keys, key_from, place, key_to, at, HEAD_DIM, HEAD, KEY_BITS, False)
    value_from = tl.load(ValuePlaces + block)
    value_to = tl.load(ValuePlaces + into)
    copy_vector(Values, value_from, place, value_to, at, VALUE_DIM, VALUE, VALUE_BITS, True)
    score = tl.load(Kept + tl.load(ScorePlaces + block) * (UNIT // 2) + place)
    tl.store(Kept + tl.load(ScorePlaces + into) * (UNIT // 2) + at, score)


@triton.jit(do_not_specialize=["count"])
def move(
    Keys,
    Values,
    Kept,
    KeyPlaces,
    ValuePlaces,
    ScorePlaces,
    Work,
    count,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
):
    """Copies tokens of KV heads of one pair of formats, with their scores.

    Work has the slot of each token, then of each where it goes to, int64 `[2, count]`.
    """
    t = tl.program_id(0)
    source = tl.load(Work + t)
    target = tl.load(Work + count + t)
    copy_token(
        Keys,
        Values,
        Kept,
        KeyPlaces,
        ValuePlaces,
        ScorePlaces,
        source,
        target,
        HEAD_DIM,
        HEAD,
        VALUE_DIM,
        VALUE,
        KEY_BITS,
        VALUE_BITS,
    )


@triton.jit(do_not_specialize=["heads", "width", "selected_width"])
def select(
    Keys,
    Values,
    Kept,
    KeyPlaces,
    ValuePlaces,
    ScorePlaces,
    Table,
    Rings,
    Selected,
    Counts,
    Lengths,
    Taken,
    Rules,
    Heads,
    heads,
    kv_heads,
    width,
    selected_width,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    TILE: tl.constexpr,
    RING: tl.constexpr,
):
    """Lets the token compete that a window leaves behind when the next one comes; it is copied into the place that it wins.

    That is `rules.selection` for one more token: while there is room it is admitted, else it takes the place of the one of
    least score, of equals the one in the first place, if its own is higher. TILE scores are looked at at once.

    Selected has block ids of selected tokens by their places, integers `[rows, kv_heads, selected_width]`. Lengths are those
    before the next token. Heads are the KV heads of this pair of formats that select, int64 `[heads]`. With RING, Taken says
    which rows are given a next token, int64 `[rows]`, and how many tokens are selected then is written to Counts, int64
    `[rows, kv_heads]`.
    """
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.load(Heads + tl.program_id(0) % heads)
    n = tl.load(Lengths + row)
    rule = Rules + head
    left = tokens_left(n, rule, kv_heads)
    next_left = tokens_left(n + 1, rule, kv_heads)
    alpha = tl.load(rule + SELECT_ALPHA * kv_heads)
    beta_q = tl.load(rule + SELECT_BETA * kv_heads)
    count = tl.minimum(alpha + ((beta_q * left) >> 10), left)
    next_count = tl.minimum(alpha + ((beta_q * next_left) >> 10), next_left)
    pair = row * kv_heads + head
    if RING:
        taken = tl.load(Taken + row)
        tl.store(Counts + pair, next_count, mask=taken > 0)
        next_left = tl.where(taken > 0, next_left, left)
    if (next_left > left) & (next_count > 0):
        position = tl.load(rule) + left
        sinks, size = ring_of(Rings, head, kv_heads, RING)
        slot = in_ring(position // BLOCK, sinks, size, RING)
        source = tl.load(Table + pair * width + slot).to(tl.int64) * BLOCK + position % BLOCK
        own = tl.load(Kept + tl.load(ScorePlaces + source // BLOCK) * (UNIT // 2) + source % BLOCK).to(tl.int64)
        selected = Selected + pair * selected_width
        least = tl.full([TILE], 1 << 62, tl.int64)
        for begin in range(0, tl.where(count < next_count, 0, count), TILE):
            place = begin + tl.arange(0, TILE).to(tl.int64)
            there = place < count
            block = tl.load(selected + place // BLOCK, mask=there, other=0)
            at = tl.load(ScorePlaces + block, mask=there, other=0) * (UNIT // 2) + place % BLOCK
            score = tl.load(Kept + at, mask=there, other=0).to(tl.int64)
            least = tl.minimum(least, tl.where(there, (score << 32) + place, 1 << 62))
        first = tl.min(least, 0)
        wins = (count < next_count) | (own > (first >> 32))
        if wins:
            into = tl.where(count < next_count, count, first & 0xFFFFFFFF)
            target = tl.load(selected + into // BLOCK).to(tl.int64) * BLOCK + into % BLOCK
            copy_token(
                Keys,
                Values,
                Kept,
                KeyPlaces,
                ValuePlaces,
                ScorePlaces,
                source,
                target,
                HEAD_DIM,
                HEAD,
                VALUE_DIM,
                VALUE,
                KEY_BITS,
                VALUE_BITS,
            )

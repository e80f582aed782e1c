"""Attention of a chunk of tokens over cache blocks, over selected tokens and over the chunk itself, in Triton.

A program attends for some tokens of a row and the query heads of one KV head, so keys and values are read once for the group.
It reads what some of its queries see: bounds follow from its first and last token by the arithmetic of `rules/windows.py`.
Where keys or values have codes, the chunk's stand in the rotated basis too, as the numbers that its codes stand for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton.tiles import (
    BLOCK,
    add_codes,
    cached_scores,
    chunk_numbers,
    code_bytes,
    key_words,
    native_numbers,
    scale_and_zero,
    softmax_step,
    value_bytes,
    visible_bounds,
)

LATEST = tl.constexpr(2**31 - 1)
"""A time that is later than those of all tokens."""


@triton.jit
def add_numbers(out, weight, value, seen, CAREFUL: tl.constexpr, TILE: tl.constexpr):
    """Adds weighted values `[TILE, WIDTH]` that are numbers to `out`, float32 `[rows, WIDTH]`.

    With CAREFUL numbers that are not finite reach those rows alone that see them, one token after the other.
    """
    if CAREFUL:
        t = tl.arange(0, TILE)
        for j in range(TILE):
            own = t == j
            one = tl.sum(tl.where(own[None, :], weight, 0.0), 1)
            numbers = tl.sum(tl.where(own[:, None], value.to(tl.float32), 0.0), 0)
            sees = tl.max((own[None, :] & seen).to(tl.int32), 1) > 0
            out += tl.where(sees[:, None], one[:, None] * numbers[None, :], 0.0)
    else:
        out = tl.dot(weight.to(value.dtype), value, out, input_precision="ieee")
    return out


@triton.jit
def chunk_scores(
    query, query_high, start, t, there, stride, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr
):
    """Returns products of queries with keys of the chunk, float32 `[rows, tokens]`; `cached_scores` has the arguments."""
    if BITS == 4:
        HALF: tl.constexpr = (DIM + 1) // 2
        low = chunk_numbers(start, t, there, stride, HALF, WIDTH, 0).to(query.dtype)
        high = chunk_numbers(start, t, there, stride, DIM, WIDTH, HALF).to(query.dtype)
        score = tl.dot(query, tl.trans(low), input_precision="ieee")
        score = tl.dot(query_high, tl.trans(high), score, input_precision="ieee")
    else:
        key = chunk_numbers(start, t, there, stride, DIM, WIDTH, 0).to(query.dtype)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
    return score


@triton.jit
def transient_numbers(
    Pool,
    offset,
    place,
    cached,
    start,
    t,
    fresh,
    stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    dtype: tl.constexpr,
):
    """Reads keys, or VALUES, of selected tokens, which lie anywhere: `[tokens, WIDTH]`, and the second halves of 4 bits.

    Those that are `cached` lie in blocks of Pool, at `offset` and `place` as in `cached_scores`; `fresh` ones are tokens `t` of
    the chunk, whose numbers begin at `start`. Of all others the numbers are 0.
    """
    HALF: tl.constexpr = (DIM + 1) // 2 if BITS == 4 else DIM
    low = chunk_numbers(start, t, fresh, stride, HALF, WIDTH, 0).to(dtype)
    high = low
    if BITS == 0:
        low += native_numbers(Pool, offset, place, cached, DIM, WIDTH).to(dtype)
    else:
        BYTES: tl.constexpr = code_bytes(DIM, BITS)
        if VALUES:
            found = value_bytes(Pool.to(tl.pointer_type(tl.uint8)), offset, place, cached, BYTES, WIDTH, BITS)
        else:
            found = key_words(Pool.to(tl.pointer_type(tl.int32)), offset, place, cached, BYTES, WIDTH // 4, BITS)
        scale, zero = scale_and_zero(Pool.to(tl.pointer_type(tl.float16)), offset, place, cached, BYTES)
        if BITS == 4:
            high = chunk_numbers(start, t, fresh, stride, DIM, WIDTH, HALF).to(dtype)
            high += ((found >> 4).to(tl.float32) * scale[:, None] + zero[:, None]).to(dtype)
            found = found & 15
        low += (found.to(tl.float32) * scale[:, None] + zero[:, None]).to(dtype)
    return low, high


@triton.jit(do_not_specialize=["width", "tokens"])
def attend_chunk(
    Query,
    Keys,
    Values,
    KeyPlaces,
    ValuePlaces,
    Table,
    ChunkKeys,
    ChunkValues,
    Past,
    Valid,
    Rules,
    Heads,
    Begins,
    Slots,
    Admitted,
    Evicted,
    SinkLogits,
    Out,
    Lse,
    Suspect,
    scaling,
    softcap,
    kv_heads,
    width,
    tokens,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,
    CACHED: tl.constexpr,
    TRANSIENT: tl.constexpr,
    CAREFUL: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TRANSIENT_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of TOKENS tokens of a row for the query heads of a KV head. Programs are tiles of tokens, KV heads and rows.

    Query is `[rows, heads, tokens, HEAD_DIM]`, rotated where keys have codes. ChunkKeys and ChunkValues are
    `[rows, kv_heads, tokens, dim]`, or of codes `[rows, heads of this launch, tokens, dim]`; strides of all three follow. Past
    and Valid are the tokens before the chunk and the real ones of it, int64 `[rows]`; with CACHED some row has a past, else the
    pool's arguments are anything. Heads has the KV heads of this launch, int64. With TRANSIENT there are selected tokens, by
    Begins, Slots, Admitted and Evicted of `TransientTokens`, TRANSIENT_TILE of them at once; with LOGITS there are SinkLogits,
    `[heads]`. Out is `[rows, heads, tokens, VALUE_DIM]`, contiguous, in the rotated basis where values have codes; Lse is the
    log of the sum of the exponentials, float32 `[rows, heads, tokens]`, contiguous.

    Suspect notes, int32 of each program, whether its results have numbers that are not finite. A launch with CAREFUL makes
    those again, so that such numbers reach none but the queries that see them.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.load(Heads + tl.program_id(1))
    row = tl.program_id(2).to(tl.int64)
    suspect = Suspect + (row * kv_heads + head) * tl.num_programs(0) + tile
    wanted = True
    if CAREFUL:
        wanted = tl.load(suspect) != 0
    if wanted:
        # positions are in 32 bits but where rules multiply them: registers hold a mask of queries and keys
        past = tl.load(Past + row).to(tl.int32)
        valid = tl.load(Valid + row).to(tl.int32)
        rule = Rules + head
        sink = tl.load(rule)
        alpha = tl.load(rule + kv_heads)
        beta_q = tl.load(rule + 2 * kv_heads)
        min_window = tl.load(rule + 3 * kv_heads)
        native_window = tl.load(rule + 4 * kv_heads)

        i = tl.arange(0, TOKENS * GROUP)
        token = tile * TOKENS + i // GROUP
        g = i % GROUP
        real = (g < G) & (token < valid)
        n = past + token + 1
        first, sink_end, start = visible_bounds(n.to(tl.int64), sink, alpha, beta_q, min_window, native_window)
        first = first.to(tl.int32)
        sink_end = sink_end.to(tl.int32)
        start = start.to(tl.int32)
        now = tl.where(native_window > 0, 0, start - sink_end)
        low = past + tile * TOKENS + 1
        high = past + tl.minimum((tile + 1) * TOKENS, valid)
        low_first, _, low_start = visible_bounds(low.to(tl.int64), sink, alpha, beta_q, min_window, native_window)
        _, high_sink_end, _ = visible_bounds(high.to(tl.int64), sink, alpha, beta_q, min_window, native_window)
        low_first = low_first.to(tl.int32)
        low_start = low_start.to(tl.int32)
        sinks_to = tl.minimum(high_sink_end.to(tl.int32), low_start)
        some = high >= low

        KEY_HALF: tl.constexpr = (HEAD_DIM + 1) // 2
        VALUE_HALF: tl.constexpr = (VALUE_DIM + 1) // 2
        d = tl.arange(0, HEAD)
        v = tl.arange(0, VALUE)
        asked = Query + row * query_row + (head * G + g) * query_head + token.to(tl.int64) * query_token
        asked = asked[:, None] + d[None, :]
        if KEY_BITS == 4:
            query = tl.load(asked, mask=real[:, None] & (d < KEY_HALF)[None, :], other=0.0)
            query_high = tl.load(asked + KEY_HALF, mask=real[:, None] & (d < HEAD_DIM - KEY_HALF)[None, :], other=0.0)
        else:
            query = tl.load(asked, mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
            query_high = query
        if WIDE:
            query = query.to(tl.float32)
            query_high = query_high.to(tl.float32)
        query_sum = tl.zeros([TOKENS * GROUP], tl.float32)
        if KEY_BITS > 0:
            query_sum += tl.sum(query.to(tl.float32), 1)
            if KEY_BITS == 4:
                query_sum += tl.sum(query_high.to(tl.float32), 1)

        peak = tl.full([TOKENS * GROUP], float("-inf"), tl.float32)
        denominator = tl.zeros([TOKENS * GROUP], tl.float32)
        if LOGITS:
            logit = tl.load(SinkLogits + head * G + g, mask=real, other=0.0).to(tl.float32)
            peak = tl.where(real, logit, float("-inf"))
            denominator = tl.where(real, 1.0, 0.0)
        out = tl.zeros([TOKENS * GROUP, VALUE], tl.float32)
        out_high = tl.zeros([TOKENS * GROUP, VALUE if VALUE_BITS == 4 else 1], tl.float32)
        zeros = tl.zeros([TOKENS * GROUP], tl.float32)
        unit = tl.full([TOKENS * GROUP], 0.0 if query.dtype == tl.float16 else 1.0, tl.float32)
        t = tl.arange(0, TILE)

        if CACHED:
            place = t % BLOCK
            u = tl.arange(0, TILE // 4)
            table = Table + (row * kv_heads + head) * width
            first_block = low_first // BLOCK
            window_block = low_start // BLOCK
            sinks_end = tl.minimum(sinks_to, past)
            sinks = tl.minimum((sinks_end + BLOCK - 1) // BLOCK, window_block) - first_block
            sinks = tl.where(sinks_end > low_first, tl.maximum(sinks, 0), 0)
            total = sinks + tl.maximum((past + BLOCK - 1) // BLOCK - window_block, 0)
            total = tl.where(some, total, 0)
            for at in tl.range(0, total, TILE // BLOCK, num_stages=STAGES):
                x = at + t // BLOCK
                block = tl.where(x < sinks, first_block + x, window_block + x - sinks)
                position = block * BLOCK + place
                there = x < total
                cached = there & (position < past)
                read = cached & (position >= low_first) & ((position < sinks_to) | (position >= low_start))
                key_position = position[None, :]
                seen = (key_position >= first[:, None]) & (key_position < sink_end[:, None])
                seen = (seen | (key_position >= start[:, None])) & read[None, :] & real[:, None]
                block_id = tl.load(table + block, mask=there, other=0)
                key_at = tl.load(KeyPlaces + block_id, mask=there, other=0)
                score = cached_scores(
                    query, query_high, query_sum, Keys, key_at, place, there, read, HEAD_DIM, HEAD, KEY_BITS
                )
                weight, shrunk, peak, denominator = softmax_step(
                    score, seen, peak, denominator, scaling, softcap, SOFTCAP
                )
                value_at = tl.load(ValuePlaces + block_id, mask=there, other=0)
                if VALUE_BITS == 0:
                    value = native_numbers(Values, value_at, place, read, VALUE_DIM, VALUE).to(query.dtype)
                    out = add_numbers(out * shrunk[:, None], weight, value, seen, CAREFUL, TILE)
                else:
                    quad_x = at + u // (BLOCK // 4)
                    quad_there = quad_x < total
                    quad_block = tl.where(quad_x < sinks, first_block + quad_x, window_block + quad_x - sinks)
                    quad_id = tl.load(table + quad_block, mask=quad_there, other=0)
                    quad_at = tl.load(ValuePlaces + quad_id, mask=quad_there, other=0)
                    out, out_high, zeros, unit = add_codes(
                        out,
                        out_high,
                        zeros,
                        unit,
                        weight,
                        shrunk,
                        seen,
                        read,
                        Values,
                        value_at,
                        place,
                        quad_at,
                        u % (BLOCK // 4),
                        quad_there,
                        VALUE_DIM,
                        VALUE,
                        VALUE_BITS,
                        query.dtype,
                    )
            if query.dtype == tl.float16:
                if VALUE_BITS > 0:
                    out = out * unit[:, None]
                if VALUE_BITS == 4:
                    out_high = out_high * unit[:, None]

        key_number = head
        if KEY_BITS > 0:
            key_number = tl.program_id(1).to(tl.int64)
        value_number = head
        if VALUE_BITS > 0:
            value_number = tl.program_id(1).to(tl.int64)
        own_keys = ChunkKeys + row * key_row + key_number * key_head
        own_values = ChunkValues + row * value_row + value_number * value_head

        if TRANSIENT:
            s = tl.arange(0, TRANSIENT_TILE)
            begin = tl.load(Begins + row * kv_heads + head)
            end = tl.load(Begins + row * kv_heads + head + 1)
            for at in tl.range(begin, end, TRANSIENT_TILE):
                there = at + s < end
                admitted = tl.load(Admitted + at + s, mask=there, other=0).to(tl.int32)
                evicted = tl.minimum(tl.load(Evicted + at + s, mask=there, other=0), LATEST).to(tl.int32)
                seen = (admitted[None, :] <= now[:, None]) & (now[:, None] < evicted[None, :])
                seen = seen & there[None, :] & real[:, None]
                read = tl.max(seen.to(tl.int32), 0) > 0
                if tl.max(read.to(tl.int32), 0) > 0:
                    slot = tl.load(Slots + at + s, mask=read, other=0)
                    pooled = read & (slot >= 0)
                    fresh = read & (slot < 0)
                    # a block of the pool, or a token of the chunk
                    transient_id = tl.where(pooled, slot // BLOCK, 0)
                    transient_place = tl.where(pooled, slot % BLOCK, 0)
                    transient_own = tl.where(fresh, -1 - slot, 0)
                    transient_key_at = tl.load(KeyPlaces + transient_id, mask=pooled, other=0)
                    low_keys, high_keys = transient_numbers(
                        Keys,
                        transient_key_at,
                        transient_place,
                        pooled,
                        own_keys,
                        transient_own,
                        fresh,
                        key_token,
                        HEAD_DIM,
                        HEAD,
                        KEY_BITS,
                        False,
                        query.dtype,
                    )
                    score = tl.dot(query, tl.trans(low_keys), input_precision="ieee")
                    if KEY_BITS == 4:
                        score = tl.dot(query_high, tl.trans(high_keys), score, input_precision="ieee")
                    weight, shrunk, peak, denominator = softmax_step(
                        score, seen, peak, denominator, scaling, softcap, SOFTCAP
                    )
                    transient_value_at = tl.load(ValuePlaces + transient_id, mask=pooled, other=0)
                    low_values, high_values = transient_numbers(
                        Values,
                        transient_value_at,
                        transient_place,
                        pooled,
                        own_values,
                        transient_own,
                        fresh,
                        value_token,
                        VALUE_DIM,
                        VALUE,
                        VALUE_BITS,
                        True,
                        query.dtype,
                    )
                    zeros = zeros * shrunk
                    out = add_numbers(out * shrunk[:, None], weight, low_values, seen, CAREFUL, TRANSIENT_TILE)
                    if VALUE_BITS == 4:
                        out_high = add_numbers(
                            out_high * shrunk[:, None], weight, high_values, seen, CAREFUL, TRANSIENT_TILE
                        )

        # of the chunk: tiles of the sinks, then those of the window
        first_tile = tl.maximum(low_first - past, 0) // TILE
        window_tile = tl.maximum(low_start - past, 0) // TILE
        sink_tiles = tl.minimum((tl.maximum(sinks_to - past, 0) + TILE - 1) // TILE, window_tile) - first_tile
        sink_tiles = tl.maximum(sink_tiles, 0)
        total = sink_tiles + (high - past + TILE - 1) // TILE - window_tile
        total = tl.where(some, total, 0)
        for at in tl.range(0, total, num_stages=STAGES):
            own_tile = tl.where(at < sink_tiles, first_tile + at, window_tile + at - sink_tiles)
            own = own_tile * TILE + t
            position = past + own
            read = (position < high) & (position >= low_first) & ((position < sinks_to) | (position >= low_start))
            key_position = position[None, :]
            seen = (key_position >= first[:, None]) & (key_position < sink_end[:, None])
            seen = seen | ((key_position >= start[:, None]) & (key_position < n[:, None]))
            seen = seen & read[None, :] & real[:, None]
            score = chunk_scores(query, query_high, own_keys, own, read, key_token, HEAD_DIM, HEAD, KEY_BITS)
            weight, shrunk, peak, denominator = softmax_step(score, seen, peak, denominator, scaling, softcap, SOFTCAP)
            zeros = zeros * shrunk
            out = out * shrunk[:, None]
            if VALUE_BITS == 4:
                value = chunk_numbers(own_values, own, read, value_token, VALUE_HALF, VALUE, 0).to(query.dtype)
                out = add_numbers(out, weight, value, seen, CAREFUL, TILE)
                value = chunk_numbers(own_values, own, read, value_token, VALUE_DIM, VALUE, VALUE_HALF).to(query.dtype)
                out_high = add_numbers(out_high * shrunk[:, None], weight, value, seen, CAREFUL, TILE)
            else:
                value = chunk_numbers(own_values, own, read, value_token, VALUE_DIM, VALUE, 0).to(query.dtype)
                out = add_numbers(out, weight, value, seen, CAREFUL, TILE)

        divisor = tl.where(real, denominator, 1.0)
        place_of = (row * kv_heads * G + head * G + g) * tokens + token
        stored = (g < G) & (token < tokens)
        results = Out + place_of[:, None] * VALUE_DIM + v[None, :]
        out = (out + zeros[:, None]) / divisor[:, None]
        nonfinite = tl.max(((out * 0.0) != 0.0).to(tl.int32), 1)
        if VALUE_BITS == 4:
            out_high = (out_high + zeros[:, None]) / divisor[:, None]
            nonfinite = tl.maximum(nonfinite, tl.max(((out_high * 0.0) != 0.0).to(tl.int32), 1))
            tl.store(results + VALUE_HALF, out_high, mask=stored[:, None] & (v < VALUE_DIM - VALUE_HALF)[None, :])
            tl.store(results, out, mask=stored[:, None] & (v < VALUE_HALF)[None, :])
        else:
            tl.store(results, out, mask=stored[:, None] & (v < VALUE_DIM)[None, :])
        tl.store(Lse + place_of, peak + tl.log(denominator), mask=stored)
        if not CAREFUL:
            tl.store(suspect, tl.max(nonfinite, 0))

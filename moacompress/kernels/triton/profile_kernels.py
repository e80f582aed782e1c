"""What every rule would move of a layer's output, in Triton: sums outward from the diagonal, in one pass over keys and values.

For a query with probabilities P, cotangent dO and `G = dO V^T`, a rule's share of the profile follows from `sum P` and
`sum P (G - D)` over the keys that it shows, with `D = dO . O`. Windows all end at the query, so the sums of every window are
steps of one running sum from the newest key to the oldest; the tiles in which a window begins, or sinks lie, are its `events`,
and all others are added without a look at rules.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton.tiles import chunk_numbers


@triton.jit
def tile_sums(
    query,
    cotangent,
    lse,
    delta,
    keys,
    values,
    at,
    position,
    scaling,
    softcap,
    tokens,
    native_window,
    key_token,
    value_token,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Returns a tile's keys `[TILE]`, their probabilities and `P (G - D)`, float32 `[rows, TILE]`, 0 where nothing is seen."""
    t = at * TILE + tl.arange(0, TILE)
    there = t < tokens
    key = chunk_numbers(keys, t, there, key_token, HEAD_DIM, HEAD, 0).to(query.dtype)
    value = chunk_numbers(values, t, there, value_token, VALUE_DIM, VALUE, 0).to(query.dtype)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
    if SOFTCAP:
        score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
    seen = (t[None, :] <= position[:, None]) & (t[None, :] > position[:, None] - native_window)
    weight = tl.where(seen, tl.exp(score - lse[:, None]), 0.0)
    pulled = tl.dot(cotangent, tl.trans(value), input_precision="ieee") - delta[:, None]
    return t, weight, tl.where(seen, weight * pulled, 0.0)


@triton.jit
def asked_rows(
    Query,
    Cotangent,
    Lse,
    Delta,
    tokens,
    query_head,
    query_token,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns a program's rows, one for each of its tokens and query heads, and whether some cotangent is not 0.

    Of a row its position, its place among all, whether it is there, query, cotangent, Lse and Delta.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, TOKENS * GROUP)
    g = m % GROUP
    position = tile * TOKENS + m // GROUP
    real = (g < G) & (position < tokens)
    d = tl.arange(0, HEAD)
    v = tl.arange(0, VALUE)
    own = head * G + g
    asked = Query + (own * query_head + position.to(tl.int64) * query_token)[:, None] + d[None, :]
    query = tl.load(asked, mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    place = own * tokens + position
    pulls = Cotangent + (place * VALUE_DIM)[:, None] + v[None, :]
    cotangent = tl.load(pulls, mask=real[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
    if WIDE:
        query = query.to(tl.float32)
        cotangent = cotangent.to(tl.float32)
    lse = tl.load(Lse + place, mask=real, other=0.0)
    delta = tl.load(Delta + place, mask=real, other=0.0)
    alive = tl.max(tl.max((cotangent != 0).to(tl.int32), 1), 0) > 0
    return position, place, real, query, cotangent, lse, delta, alive


@triton.jit(do_not_specialize=["tokens", "kv_heads", "native_window", "windows", "sinks", "sink_tiles", "most_events"])
def sum_outward(
    Query,
    Key,
    Value,
    Cotangent,
    Lse,
    Delta,
    Starts,
    Sinks,
    Events,
    Counts,
    Windows,
    Prefixes,
    scaling,
    softcap,
    tokens,
    native_window,
    kv_heads,
    windows,
    sinks,
    sink_tiles,
    most_events,
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums for TOKENS tokens and the query heads of a KV head. Programs are tiles of tokens and KV heads.

    Args:
        Query: `[heads, tokens, HEAD_DIM]`.
        Key: `[kv_heads, tokens, HEAD_DIM]`.
        Value: `[kv_heads, tokens, VALUE_DIM]`.
        Cotangent: `[heads, tokens, VALUE_DIM]`, contiguous; tiles where it is 0 are left out.
        Lse: log of the sum of the exponentials, learned logit included, float32 `[heads, tokens]`.
        Delta: about D, float32 `[heads, tokens]`: it is taken off G, so that what is added is small.
        Starts: where each window begins, int32 `[windows, tokens]`; never falling.
        Sinks: numbers of sinks, int32 `[sinks]`.
        Events: tiles in which some window of a tile of queries begins, or sinks lie, descending, int32 `[tiles, most_events]`.
        Counts: how many, int32 `[tiles]`.
        Windows: sums of probabilities and of `P (G - Delta)`, float32 `[windows + 1, 2, heads, tokens]`; last of all keys.
        Prefixes: the same of sinks, of each tile by itself, `[sink_tiles, sinks, 2, heads, tokens]`.
        scaling: factor on the scores.
        softcap: bound of the scores by tanh.
        tokens: of the sample.
        native_window: the layer's own; as large as `tokens` where it has none.
        kv_heads: of the layer.
        windows: how many.
        sinks: how many numbers of them.
        sink_tiles: tiles in which sinks lie.
        most_events: of a tile of queries.
        query_head: stride between heads; likewise the others.
        query_token: see query_head.
        key_head: see query_head.
        key_token: see query_head.
        value_head: see query_head.
        value_token: see query_head.
        G: query heads of a KV head.
        GROUP: G, as a power of two; likewise HEAD of HEAD_DIM and VALUE of VALUE_DIM.
        TOKENS: of a program.
        HEAD_DIM: numbers of a key.
        HEAD: see GROUP.
        VALUE_DIM: numbers of a value.
        VALUE: see GROUP.
        SOFTCAP: whether there is one.
        WIDE: whether products are in float32.
        TILE: keys of a tile.
        STAGES: tiles that are read ahead.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    position, place, real, query, cotangent, lse, delta, alive = asked_rows(
        Query,
        Cotangent,
        Lse,
        Delta,
        tokens,
        query_head,
        query_token,
        G,
        GROUP,
        TOKENS,
        HEAD_DIM,
        HEAD,
        VALUE_DIM,
        VALUE,
        WIDE,
    )
    first = tile * TOKENS
    top = (tl.minimum(first + TOKENS, tokens) - 1) // TILE
    bottom = tl.maximum(first - native_window + 1, 0) // TILE
    bottom = tl.where(alive, bottom, top + 1)
    count = tl.where(alive, tl.load(Counts + tile), 0)
    keys = Key + head * key_head
    values = Value + head * value_head
    size = kv_heads.to(tl.int64) * G * tokens

    mass = tl.zeros([TOKENS * GROUP], tl.float32)
    pull = tl.zeros([TOKENS * GROUP], tl.float32)
    at = top
    for number in range(count):
        event = tl.load(Events + tile * most_events + number)
        for k in tl.range(0, at - event, num_stages=STAGES):
            _t, weight, pulled = tile_sums(
                query,
                cotangent,
                lse,
                delta,
                keys,
                values,
                at - k,
                position,
                scaling,
                softcap,
                tokens,
                native_window,
                key_token,
                value_token,
                HEAD_DIM,
                HEAD,
                VALUE_DIM,
                VALUE,
                SOFTCAP,
                TILE,
            )
            mass += tl.sum(weight, 1)
            pull += tl.sum(pulled, 1)
        t, weight, pulled = tile_sums(
            query,
            cotangent,
            lse,
            delta,
            keys,
            values,
            event,
            position,
            scaling,
            softcap,
            tokens,
            native_window,
            key_token,
            value_token,
            HEAD_DIM,
            HEAD,
            VALUE_DIM,
            VALUE,
            SOFTCAP,
            TILE,
        )
        for window in range(windows):
            start = tl.load(Starts + window * tokens + position, mask=position < tokens, other=-1)
            here = (start >= event * TILE) & (start < event * TILE + TILE)
            if tl.max(here.to(tl.int32), 0) > 0:
                inside = t[None, :] >= start[:, None]
                into = Windows + 2 * window * size + place
                tl.store(into, mass + tl.sum(tl.where(inside, weight, 0.0), 1), mask=here & real)
                tl.store(into + size, pull + tl.sum(tl.where(inside, pulled, 0.0), 1), mask=here & real)
        if event < sink_tiles:
            for number_of_sinks in range(sinks):
                inside = (t < tl.load(Sinks + number_of_sinks))[None, :]
                into = Prefixes + 2 * (event * sinks + number_of_sinks) * size + place
                tl.store(into, tl.sum(tl.where(inside, weight, 0.0), 1), mask=real)
                tl.store(into + size, tl.sum(tl.where(inside, pulled, 0.0), 1), mask=real)
        mass += tl.sum(weight, 1)
        pull += tl.sum(pulled, 1)
        at = event - 1
    for k in tl.range(0, at - bottom + 1, num_stages=STAGES):
        _t, weight, pulled = tile_sums(
            query,
            cotangent,
            lse,
            delta,
            keys,
            values,
            at - k,
            position,
            scaling,
            softcap,
            tokens,
            native_window,
            key_token,
            value_token,
            HEAD_DIM,
            HEAD,
            VALUE_DIM,
            VALUE,
            SOFTCAP,
            TILE,
        )
        mass += tl.sum(weight, 1)
        pull += tl.sum(pulled, 1)
    everything = Windows + 2 * windows * size + place
    tl.store(everything, mass, mask=real)
    tl.store(everything + size, pull, mask=real)

"""Gradients of attention of whole rows under rules, in Triton: one kernel for those of queries, one for keys and values.

With probabilities P from the denominators that the forward pass left, cotangent dO and `dP = dO V^T`, the gradient of the
scores is `dS = P (dP - D)`, D the sum of `dO . O` less the cotangent of the log of the denominator; then `dQ = dS K`,
`dK = dS^T Q` and `dV = P^T dO`. The query heads of a KV head are rows of one product, so that the sums over a group are within
it. No result is added to by two programs, so gradients do not depend on which runs first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton.tiles import chunk_numbers, visible_bounds


@triton.jit
def score_gradients(query, cotangent, key, value, lse, delta, seen, scaling, softcap, SOFTCAP: tl.constexpr):
    """Returns probabilities, and gradients of products of queries and keys, float32 `[rows, tokens]`; 0 where nothing is seen.

    Args:
        query: `[rows, HEAD]`.
        cotangent: `[rows, VALUE]`.
        key: `[tokens, HEAD]`.
        value: `[tokens, VALUE]`.
        lse: log of the sum of the exponentials, `[rows]`.
        delta: D, `[rows]`.
        seen: which count, bool `[rows, tokens]`.
        scaling: factor on the products.
        softcap: bound of the scores by tanh.
        SOFTCAP: whether there is one.
    """
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
    if SOFTCAP:
        bounded = 2 * tl.sigmoid(2 * score / softcap) - 1
        score = softcap * bounded
    weight = tl.where(seen, tl.exp(score - lse[:, None]), 0.0)
    pulled = tl.dot(cotangent, tl.trans(value), input_precision="ieee") - delta[:, None]
    found = tl.where(seen, weight * pulled * scaling, 0.0)
    if SOFTCAP:
        found = found * (1 - bounded * bounded)
    return weight, found


@triton.jit
def bounds_of(n, rule, kv_heads):
    """Returns `first, sink_end, start` of `visible_bounds`, int32 as `n`.

    Args:
        n: tokens up to each query, itself included, int32.
        rule: the columns of a KV head, see `Rules` of `of_queries`.
        kv_heads: of a row.
    """
    first, sink_end, start = visible_bounds(
        n.to(tl.int64),
        tl.load(rule),
        tl.load(rule + kv_heads),
        tl.load(rule + 2 * kv_heads),
        tl.load(rule + 3 * kv_heads),
        tl.load(rule + 4 * kv_heads),
    )
    return first.to(tl.int32), sink_end.to(tl.int32), start.to(tl.int32)


@triton.jit
def visible_keys(n, first, sink_end, start, position):
    """Returns which keys queries see, bool `[rows, tokens]`.

    Args:
        n: tokens up to each query, itself included, int32 `[rows]`.
        first: see `bounds_of`; likewise the next two.
        sink_end: see first.
        start: see first.
        position: of the keys, int32 `[tokens]`.
    """
    at = position[None, :]
    seen = (at >= first[:, None]) & (at < sink_end[:, None])
    return seen | ((at >= start[:, None]) & (at < n[:, None]))


@triton.jit(do_not_specialize=["tokens"])
def of_queries(
    Query,
    Key,
    Value,
    Cotangent,
    Lse,
    Delta,
    Valid,
    Rules,
    Out,
    scaling,
    softcap,
    kv_heads,
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
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of TOKENS tokens' queries of a KV head. Programs are tiles of tokens, KV heads and rows.

    Args:
        Query: `[rows, heads, tokens, HEAD_DIM]`.
        Key: `[rows, kv_heads, tokens, HEAD_DIM]`.
        Value: `[rows, kv_heads, tokens, VALUE_DIM]`.
        Cotangent: of the output, `[rows, heads, tokens, VALUE_DIM]`, contiguous.
        Lse: log of the sum of the exponentials, learned logit included, float32 `[rows, heads, tokens]`, contiguous.
        Delta: D, likewise.
        Valid: real tokens of each row, int64 `[rows]`.
        Rules: the columns of a rule table without formats, int64 `[columns, kv_heads]`.
        Out: the gradient, `[rows, heads, tokens, HEAD_DIM]`, contiguous; 0 of tokens that are not real.
        scaling: factor on the scores.
        softcap: bound of the scores by tanh.
        kv_heads: of a row.
        tokens: of a row.
        query_row: stride between rows; likewise the others.
        query_head: see query_row.
        query_token: see query_row.
        key_row: see query_row.
        key_head: see query_row.
        key_token: see query_row.
        value_row: see query_row.
        value_head: see query_row.
        value_token: see query_row.
        G: query heads of a KV head.
        GROUP: G, as a power of two; likewise HEAD of HEAD_DIM and VALUE of VALUE_DIM.
        TOKENS: of a tile of queries.
        HEAD_DIM: numbers of a key.
        HEAD: see GROUP.
        VALUE_DIM: numbers of a value.
        VALUE: see GROUP.
        SOFTCAP: whether there is a bound of the scores.
        WIDE: whether products are in float32.
        TILE: keys of a tile.
        STAGES: tiles that are read ahead.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    valid = tl.load(Valid + row).to(tl.int32)
    rule = Rules + head
    m = tl.arange(0, TOKENS * GROUP)
    token = tile * TOKENS + m // GROUP
    g = m % GROUP
    real = (g < G) & (token < valid)
    query, cotangent, lse, delta = asked_tile(
        Query + row * query_row + head * G * query_head,
        Cotangent,
        Lse,
        Delta,
        (row * kv_heads + head) * G * tokens,
        tokens,
        token,
        g,
        real,
        query_head,
        query_token,
        HEAD_DIM,
        HEAD,
        VALUE_DIM,
        VALUE,
        WIDE,
    )
    keys = Key + row * key_row + head * key_head
    values = Value + row * value_row + head * value_head

    # tiles of the sinks, then those of the window
    low = tile * TOKENS + 1
    high = tl.minimum((tile + 1) * TOKENS, valid)
    low_first, _, low_start = bounds_of(low, rule, kv_heads)
    _, high_sink_end, _ = bounds_of(high, rule, kv_heads)
    first_tile = low_first // TILE
    window_tile = low_start // TILE
    sink_tiles = (tl.minimum(high_sink_end, low_start) + TILE - 1) // TILE
    sink_tiles = tl.maximum(tl.minimum(sink_tiles, window_tile) - first_tile, 0)
    total = tl.where(high >= low, sink_tiles + (high + TILE - 1) // TILE - window_tile, 0)

    first, sink_end, start = bounds_of(token + 1, rule, kv_heads)
    found = tl.zeros([TOKENS * GROUP, HEAD], tl.float32)
    for at in tl.range(0, total, num_stages=STAGES):
        own = tl.where(at < sink_tiles, first_tile + at, window_tile + at - sink_tiles)
        position = own * TILE + tl.arange(0, TILE)
        there = position < high
        key = chunk_numbers(keys, position, there, key_token, HEAD_DIM, HEAD, 0).to(query.dtype)
        value = chunk_numbers(values, position, there, value_token, VALUE_DIM, VALUE, 0).to(query.dtype)
        seen = visible_keys(token + 1, first, sink_end, start, position) & real[:, None]
        _weight, grad = score_gradients(query, cotangent, key, value, lse, delta, seen, scaling, softcap, SOFTCAP)
        found = tl.dot(grad.to(query.dtype), key, found, input_precision="ieee")
    d = tl.arange(0, HEAD)
    place = ((row * kv_heads + head) * G + g) * tokens + token
    stored = (g < G) & (token < tokens)
    tl.store(Out + place[:, None] * HEAD_DIM + d[None, :], found, mask=stored[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def asked_tile(
    queries,
    Cotangent,
    Lse,
    Delta,
    of_head,
    tokens,
    token,
    g,
    real,
    query_head,
    query_token,
    HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Reads a tile of queries and what came back for them: `[rows, HEAD]`, `[rows, VALUE]` and twice `[rows]`.

    Args:
        queries: of the KV head's first query head.
        Cotangent: see `of_queries`.
        Lse: likewise.
        Delta: likewise.
        of_head: number of the first token of that head in contiguous tensors.
        tokens: of a row.
        token: of the rows of the tile.
        g: their query heads.
        real: which there are.
        query_head: stride between heads.
        query_token: stride between tokens.
        HEAD_DIM: numbers of a key.
        HEAD: at least as many, a power of two.
        VALUE_DIM: numbers of a value.
        VALUE: see HEAD.
        WIDE: whether products are in float32.
    """
    d = tl.arange(0, HEAD)
    v = tl.arange(0, VALUE)
    place = of_head + g.to(tl.int64) * tokens + token
    asked = queries + (g.to(tl.int64) * query_head + token.to(tl.int64) * query_token)[:, None] + d[None, :]
    query = tl.load(asked, mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    pulls = Cotangent + (place * VALUE_DIM)[:, None] + v[None, :]
    cotangent = tl.load(pulls, mask=real[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
    if WIDE:
        query = query.to(tl.float32)
        cotangent = cotangent.to(tl.float32)
    lse = tl.load(Lse + place, mask=real, other=0.0)
    delta = tl.load(Delta + place, mask=real, other=0.0)
    return query, cotangent, lse, delta


@triton.jit(do_not_specialize=["tokens"])
def of_keys(
    Query,
    Key,
    Value,
    Cotangent,
    Lse,
    Delta,
    Valid,
    Rules,
    Ends,
    KeyOut,
    ValueOut,
    scaling,
    softcap,
    kv_heads,
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
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of TILE keys and values of a KV head. Programs are tiles of keys, KV heads and rows.

    Args:
        Query: see `of_queries`; likewise what is not here.
        Key: see Query.
        Value: see Query.
        Cotangent: see Query.
        Lse: see Query.
        Delta: see Query.
        Valid: see Query.
        Rules: see Query.
        Ends: queries up to the last that sees a key of the tile, int64 `[kv_heads, tiles]`.
        KeyOut: the keys' gradient, `[rows, kv_heads, tokens, HEAD_DIM]`, contiguous; 0 of tokens that are not real.
        ValueOut: the values' gradient, `[rows, kv_heads, tokens, VALUE_DIM]`, likewise.
        scaling: see Query.
        softcap: see Query.
        kv_heads: see Query.
        tokens: see Query.
        query_row: see Query.
        query_head: see Query.
        query_token: see Query.
        key_row: see Query.
        key_head: see Query.
        key_token: see Query.
        value_row: see Query.
        value_head: see Query.
        value_token: see Query.
        G: see Query.
        GROUP: see Query.
        TOKENS: see Query.
        HEAD_DIM: see Query.
        HEAD: see Query.
        VALUE_DIM: see Query.
        VALUE: see Query.
        SOFTCAP: see Query.
        WIDE: see Query.
        TILE: see Query.
        STAGES: tiles of queries that are read ahead.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    valid = tl.load(Valid + row).to(tl.int32)
    rule = Rules + head
    position = tile * TILE + tl.arange(0, TILE)
    key = chunk_numbers(Key + row * key_row + head * key_head, position, position < valid, key_token, HEAD_DIM, HEAD, 0)
    value = chunk_numbers(
        Value + row * value_row + head * value_head, position, position < valid, value_token, VALUE_DIM, VALUE, 0
    )
    if WIDE:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
    end = tl.minimum(tl.load(Ends + head * tl.num_programs(0) + tile).to(tl.int32), valid)
    m = tl.arange(0, TOKENS * GROUP)
    g = m % GROUP
    from_keys = tl.zeros([TILE, HEAD], tl.float32)
    from_values = tl.zeros([TILE, VALUE], tl.float32)
    for at in tl.range(tile * TILE // TOKENS, (end + TOKENS - 1) // TOKENS, num_stages=STAGES):
        token = at * TOKENS + m // GROUP
        real = (g < G) & (token < valid)
        query, cotangent, lse, delta = asked_tile(
            Query + row * query_row + head * G * query_head,
            Cotangent,
            Lse,
            Delta,
            (row * kv_heads + head) * G * tokens,
            tokens,
            token,
            g,
            real,
            query_head,
            query_token,
            HEAD_DIM,
            HEAD,
            VALUE_DIM,
            VALUE,
            WIDE,
        )
        first, sink_end, start = bounds_of(token + 1, rule, kv_heads)
        seen = visible_keys(token + 1, first, sink_end, start, position) & real[:, None]
        weight, grad = score_gradients(query, cotangent, key, value, lse, delta, seen, scaling, softcap, SOFTCAP)
        from_values = tl.dot(tl.trans(weight.to(query.dtype)), cotangent, from_values, input_precision="ieee")
        from_keys = tl.dot(tl.trans(grad.to(query.dtype)), query, from_keys, input_precision="ieee")
    d = tl.arange(0, HEAD)
    v = tl.arange(0, VALUE)
    place = (row * kv_heads + head) * tokens + position
    stored = (position < tokens)[:, None]
    tl.store(KeyOut + place[:, None] * HEAD_DIM + d[None, :], from_keys, mask=stored & (d < HEAD_DIM)[None, :])
    tl.store(ValueOut + place[:, None] * VALUE_DIM + v[None, :], from_values, mask=stored & (v < VALUE_DIM)[None, :])

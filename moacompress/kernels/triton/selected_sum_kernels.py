"""What rules that select show of the tokens that have left their windows, in Triton; added to the sums of `profile_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

from moacompress.kernels.triton.profile_kernels import asked_rows, tile_sums


@triton.jit(do_not_specialize=["tokens", "kv_heads", "rules", "ways"])
def sum_selected(
    Query,
    Key,
    Value,
    Cotangent,
    Lse,
    Delta,
    Sinks,
    Ways,
    Left,
    Evicted,
    Sums,
    scaling,
    softcap,
    tokens,
    kv_heads,
    rules,
    ways,
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

    A key is admitted when it leaves the window: as token number `key - sink + 1`. A query sees it from then on until so many
    tokens have left that it is evicted. Layers have no window of their own.

    Args:
        Query: `[heads, tokens, HEAD_DIM]`.
        Key: `[kv_heads, tokens, HEAD_DIM]`.
        Value: `[kv_heads, tokens, VALUE_DIM]`.
        Cotangent: `[heads, tokens, VALUE_DIM]`, contiguous; tiles where it is 0 are left out.
        Lse: log of the sum of the exponentials, learned logit included, float32 `[heads, tokens]`.
        Delta: about D, float32 `[heads, tokens]`.
        Sinks: of every rule, int32 `[rules]`.
        Ways: which of Evicted's each rule has, int32 `[rules]`.
        Left: how many tokens have left the window of each rule as a query attends, int32 `[rules, tokens]`.
        Evicted: how many have left as a token is evicted, int32 `[kv_heads, ways, tokens]`.
        Sums: sums of probabilities and of `P (G - Delta)`, float32 `[rules, 2, heads, tokens]`; zeros before.
        scaling: factor on the scores.
        softcap: bound of the scores by tanh.
        tokens: of the sample.
        kv_heads: of the layer.
        rules: how many.
        ways: how many.
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
    last = tl.minimum(tile * TOKENS + TOKENS, tokens) - 1
    keys = Key + head * key_head
    values = Value + head * value_head
    size = kv_heads.to(tl.int64) * G * tokens
    for at in tl.range(0, tl.where(alive, last // TILE + 1, 0), num_stages=STAGES):
        t, weight, pulled = tile_sums(
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
            tokens,
            key_token,
            value_token,
            HEAD_DIM,
            HEAD,
            VALUE_DIM,
            VALUE,
            SOFTCAP,
            TILE,
        )
        for rule in range(rules):
            sink = tl.load(Sinks + rule)
            most = tl.load(Left + rule * tokens + last)
            if (most > 0) & (sink + most > at * TILE):
                left = tl.load(Left + rule * tokens + position, mask=position < tokens, other=0)
                way = head * ways + tl.load(Ways + rule)
                evicted = tl.load(Evicted + way * tokens + t, mask=t < tokens, other=0)
                admitted = t - sink + 1
                chosen = (admitted > 0)[None, :] & (admitted[None, :] <= left[:, None])
                chosen = chosen & (left[:, None] < evicted[None, :])
                into = Sums + 2 * rule * size + place
                mass = tl.load(into, mask=real, other=0.0) + tl.sum(tl.where(chosen, weight, 0.0), 1)
                pull = tl.load(into + size, mask=real, other=0.0) + tl.sum(tl.where(chosen, pulled, 0.0), 1)
                tl.store(into, mass, mask=real)
                tl.store(into + size, pull, mask=real)

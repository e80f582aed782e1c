"""Attention over block tables in plain PyTorch equals attention by the definitions, one token at a time."""

from __future__ import annotations

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.block_reference import reference_decode, reference_prefill


def oracle(case, row, head, query, n, at):
    """One query by the definitions; `at(j)` returns key and value of token j."""
    kv_head = head // (case.query.shape[1] // case.table.shape[1])
    sink, alpha, beta_q = (int(x[kv_head]) for x in (case.sink, case.alpha, case.beta_q))
    w = min(n, max(case.min_window, alpha + beta_q * n // 1024))
    i, native = n - 1, case.native_window
    seen = [j for j in range(n) if (j < sink or j > i - w) and (not native or j > i - native)]
    pairs = [at(row, kv_head, j) for j in seen]
    scores = torch.stack([query @ k for k, _ in pairs]) * case.scaling
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.sink_logits is not None:
        scores = torch.cat((scores, case.sink_logits[head : head + 1]))
    weights = scores.softmax(0)[: len(seen)]
    return weights @ torch.stack([v for _, v in pairs]), scores.logsumexp(0)


@pytest.mark.parametrize("seed", range(30))
def test_by_the_definitions(seed, random_case, close):
    case = random_case(
        seed, torch.float64, tokens=[1, 3, 20][seed % 3], rows=1 + seed % 2, group=2, dim=8, value_dim=[8, 5][seed % 2]
    )
    case = case.to(torch.float64)
    pool_k, pool_v = torch.cat(case.keys), torch.cat(case.values)

    def at(row, kv_head, j):
        past = int(case.past[row])
        if j >= past:
            return case.key[row, kv_head, j - past], case.value[row, kv_head, j - past]
        block = int(case.table[row, kv_head, j // 16])
        assert block >= 0
        return pool_k[block, j % 16], pool_v[block, j % 16]

    rows, heads, tokens, _ = case.query.shape
    out = torch.zeros(rows, heads, tokens, case.value.shape[-1], dtype=torch.float64)
    lse = torch.full((rows, heads, tokens), float("-inf"), dtype=torch.float64)
    one, one_lse = out[:, :, 0].clone(), lse[:, :, 0].clone()
    for row in range(rows):
        for head in range(heads):
            past = int(case.past[row])
            for t in range(int(case.valid[row])):
                query = case.query[row, head, t]
                out[row, head, t], lse[row, head, t] = oracle(case, row, head, query, past + t + 1, at)
            if past:
                one[row, head], one_lse[row, head] = oracle(case, row, head, case.query[row, head, 0], past, at)
    close(reference_prefill(*case.prefill), (out, lse), torch.float64)
    close(reference_decode(*case.decode), (one, one_lse), torch.float64)


def test_a_visible_block_that_is_not_there_is_refused(random_case):
    case = random_case(1, torch.float64, rows=1, past=100, native_window=0, tokens=2, valid=2)
    case.table[0, 0, 100 // 16] = -1
    for call in (lambda: reference_decode(*case.decode), lambda: reference_prefill(*case.prefill)):
        with pytest.raises(UnsupportedError, match="has no id of the pool in the table"):
            call()
    case.table = case.table[:, :, :2].contiguous()
    with pytest.raises(UnsupportedError, match="has no id of the pool in the table"):
        reference_decode(*case.decode)


def test_an_empty_batch(random_case):
    case = random_case(2, torch.float32, rows=1, past=0, group=2, kv_heads=2)
    empty = case.row(1)
    assert empty.query.shape[0] == 0
    out, lse = reference_prefill(*empty.prefill)
    assert (out.shape[0], lse.shape[0]) == (0, 0)
    out, lse = reference_decode(*empty.decode)
    assert (out.shape, lse.shape) == ((0, 4, case.value.shape[-1]), (0, 4))

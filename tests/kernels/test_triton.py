"""The kernels in Triton, by its interpreter where there is no GPU; `test_backends` holds them to the definitions."""

from __future__ import annotations

import importlib.util
import inspect
import random
from dataclasses import replace

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.triton import work_lists
from moacompress.kernels.triton.cards import WITHOUT
from moacompress.kernels.triton.tile_sizes import prefill_constants, split_constants
from moacompress.kernels.triton.triton_backend import TritonBackend
from moacompress.rules.windows import BLOCK

PAIRS = [(0, 0), (1, 1), (3, 2), (2, 3)]
ONE_HEAD = {"rows": 1, "kv_heads": 1, "native_window": 0}
SMALL = {"group": 2, "dim": 16, "value_dim": 16, "min_window": 16, **ONE_HEAD}
ALL_SEEN = {"dim": 64, "value_dim": 64, "tokens": 1, "logits": False, **ONE_HEAD, "rules": [(4, 0, 1024)]}
LSE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GRADIENTS = ("query", "key", "value", "sink_logits")
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)
both = pytest.mark.parametrize("op", ["decode", "prefill"])


@pytest.fixture
def as_reference(triton, random_case, close):
    """Compares a random decode, or a random prefill with selected tokens, of blocks and of the chunk."""

    def check(op, seed, dtype=torch.float32, lse_error=None, **sizes):
        case, lse_error = random_case(seed, dtype, **sizes), lse_error or LSE_ERROR[dtype]
        if op == "decode":
            close(case.decoded(triton), case.decoded(REFERENCE), dtype, lse_error)
        else:
            case = case.keeping(random.Random(seed))
            close(case.prefilled(triton), case.prefilled(REFERENCE), dtype, lse_error)

    return check


@pytest.mark.parametrize("seed", range(15))
def test_random_steps(seed, as_reference):
    dtype = [*LSE_ERROR][seed % 3]
    as_reference("decode", 100 + seed, dtype, max(4e-3, LSE_ERROR[dtype]), tokens=1, formats="any")


@pytest.mark.parametrize("seed", range(8))
def test_random_chunks(seed, as_reference):
    dtype = [*LSE_ERROR][seed % 3]
    sizes = {"tokens": (1, 5, 33, 70)[seed % 4], "rows": 1 + seed % 2, "group": (1, 2, 3, 5)[seed // 2]}
    sizes |= {"dim": (16, 24, 64, 9)[seed // 2], "value_dim": (33, 16, 40, 64)[seed // 2]}
    as_reference("prefill", 200 + seed, dtype, formats="any", **sizes)


@both
@every_pair
def test_windows_that_begin_anywhere_in_a_block(pair, op, as_reference):
    for start in (0, 1, 7, 15):
        as_reference(op, start, past=70 + start, tokens=20, rules=[(4, 33, 0)], formats=[pair], **SMALL)


@every_pair
def test_sinks_and_windows_that_end_within_the_chunk(pair, as_reference):
    """A prompt without a past that is longer than its windows, and one of sinks alone."""
    sizes = {**SMALL, "kv_heads": 2, "past": 0, "rules": [(70, 33, 0), (4, 0, 0)], "formats": [pair] * 2}
    for tokens in (15, 65, 130):
        as_reference("prefill", tokens, tokens=tokens, **sizes)


@both
@pytest.mark.parametrize(
    ("group", "dim", "value_dim"), [(1, 32, 32), (16, 64, 64), (8, 256, 256), (3, 96, 100), (2, 9, 33), (5, 128, 128)]
)
def test_sizes(group, dim, value_dim, op, as_reference):
    formats, rows = [PAIRS[0], PAIRS[2], PAIRS[3]], 2 if op == "decode" else 1
    sizes = {"group": 2 if group == 8 and rows == 1 else group, "dim": dim, "value_dim": value_dim}
    as_reference(op, dim, kv_heads=3, rows=rows, past=60, tokens=20, formats=formats, **sizes)


@pytest.mark.parametrize("factor", [2.0**-14, 1.0, 2.0**9])
@pytest.mark.parametrize("pair", PAIRS[1:], ids=str)
def test_codes_of_small_and_of_large_numbers(pair, factor, triton, random_case):
    """In float16 codes are multiplied as they lie: what is small is not lost, and what is large does not overflow."""
    case = random_case(7, torch.float16, past=300, group=2, formats=[pair], **ALL_SEEN)
    bits = KVPart(pair[1], 64, torch.float16, values=True).bits
    for segment in case.values:
        segment.view(torch.float16)[:, 64 * bits // 8 * BLOCK // 2 :].mul_(factor)
    case = replace(case, query=case.query * 50)
    (found, lse), (wanted, wanted_lse) = case.decoded(triton), case.to(torch.float32).decoded(REFERENCE)
    assert (found.float() - wanted).abs().max() < 4e-3 * wanted.abs().max()
    assert (lse - wanted_lse).abs().max() < 2e-2


@pytest.mark.parametrize("pair", PAIRS[1:], ids=str)
def test_codes_behind_a_token_that_outweighs_the_others(pair, triton, random_case):
    """Products of weights and scales alone would be too small for float16."""
    case = random_case(7, torch.float16, past=600, group=1, cuts=0, softcap=0.0, formats=[pair], **ALL_SEEN)
    t = torch.arange(600)
    slots = case.table[0, 0][t // BLOCK].long() * BLOCK + t % BLOCK
    keys, values = torch.zeros(600, 64), torch.randn(600, 64) * 0.05 + 0.1
    keys[0], values[0] = 1, 0
    for code, memory, numbers in zip(pair, (case.keys, case.values), (keys, values), strict=True):
        KVPart(code, 64, torch.float16, values=numbers is values).write(memory[0], slots, numbers.half())
    case = replace(case, query=torch.full_like(case.query, 12 / 64 / case.scaling))
    (found, _), (wanted, _) = case.prefilled(triton), case.to(torch.float32).prefilled(REFERENCE)
    assert (found.float() - wanted).abs().max() < 4e-3 * wanted.abs().max()


def test_stretches_add_up(as_reference, monkeypatch):
    """However many programs share a KV head; each reads whole tiles."""
    sizes = {"rows": 2, "kv_heads": 2, "tokens": 1, "native_window": 0, "rules": [(4, 0, 1024), (16, 200, 0)]}
    for programs in (1, 1 << 30):
        monkeypatch.setattr(work_lists, "PROGRAMS", programs)
        as_reference("decode", 3, past=500, **sizes)


def test_work_is_shared_by_bytes(random_case):
    """Stretches of 4 bits have about four times the blocks, and every block is in one."""
    sizes = {"rows": 1, "kv_heads": 2, "dim": 64, "value_dim": 64, "past": 500, "native_window": 0}
    case = random_case(5, torch.bfloat16, rules=[(4, 0, 1024)] * 2, formats=[(0, 0), (2, 2)], **sizes)
    rules = type(case.rules)(case.rules.columns.numpy())
    lists = work_lists.work_lists(case.cache, case.past.numpy(), rules, torch.bfloat16, 64, 64)
    native, coded = lists.launches
    assert native.chunk % work_lists.WHOLE == 0
    assert coded.chunk >= native.chunk
    for each, head in ((native, 0), (coded, 1)):
        assert each.work[:, 1].tolist() == [head] * len(each.work)
        assert each.work[:, 2].tolist() == list(range(-(-32 // each.chunk)))
    assert sorted([*native.work[:, 3], *coded.work[:, 3]]) == list(range(lists.begins[-1]))


def test_blocks_that_lie_apart(triton, random_case, close):
    """As in the memory of a serving engine, where other layers' lie between them."""
    case, apart = random_case(8, torch.float32, past=100, rows=2, cuts=0, formats="any", tokens=1), {}
    for name in ("keys", "values"):
        segments = [torch.stack((torch.empty_like(segment), segment), 1) for segment in getattr(case, name)]
        apart[name] = [segment[:, 1] for segment in segments]
    close(replace(case, **apart).decoded(triton), case.decoded(REFERENCE), torch.float32)


def test_blocks_between_units_are_refused(triton, random_case):
    case = random_case(8, torch.float32, past=40, rows=1, cuts=1, tokens=1)
    moved = [
        torch.empty(segment.numel() + by)[by:].view_as(segment).copy_(segment)
        for segment, by in zip(case.keys, (1, 4), strict=True)
    ]
    assert all(map(len, moved))
    with pytest.raises(UnsupportedError, match="whole multiples of 16 bytes"):
        replace(case, keys=moved).decoded(triton)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@every_pair
def test_selected_tokens_that_are_not_finite_reach_those_who_see_them(pair, number, triton, random_case):
    """They may be seen by some queries of a tile and not by others."""
    sizes = {**SMALL, "tokens": 60, "valid": 60, "rules": [(4, 20, 0)], "formats": [pair]}
    case = random_case(3, torch.float32, past=100, **sizes)
    case.value[0, 0, 7, 3] = number
    case.key[0, 0, 11, 5] = number
    case = case.keeping(random.Random(8))
    found, wanted = (case.prefilled(backend) for backend in (triton, REFERENCE))
    assert wanted[0].isfinite().any()
    assert not wanted[0].isfinite().all()
    for mine, right in zip(found, wanted, strict=True):
        assert torch.equal(mine.isnan(), right.isnan())
        assert torch.allclose(mine.nan_to_num(), right.nan_to_num(), atol=3e-5)


@pytest.mark.parametrize("past", [0, 40])
def test_gradients_are_the_references(past, triton, random_case):
    """In formats too, and over a cache and selected tokens; without gradients the same numbers are a kernel's."""
    sizes = {"rows": 2, "tokens": 33, "valid": 33, "dim": 16, "value_dim": 16, "logits": True, "formats": "any"}
    case, results = random_case(3, torch.float32, past=past, **sizes), []
    if past:
        case = case.keeping(random.Random(3))
    for backend in (triton, REFERENCE):
        leaves = {name: getattr(case, name).clone().requires_grad_() for name in GRADIENTS}
        out, _ = replace(case, **leaves).prefilled(backend)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    results.append((case.prefilled(triton)[0],))
    for found in (results[0], results[2]):
        for mine, wanted in zip(found, results[1], strict=False):
            assert (mine - wanted).abs().max() < 2e-4 * (1 + wanted.abs().max())
    assert all(found.abs().max() > 0 for found in results[0])


def test_a_kernel_is_given_what_it_takes(triton):
    """The interpreter passes over other constants; a compiler does not."""
    from moacompress.kernels.triton import decode_kernels, prefill_kernels

    sizes = {"softcap": True, "wide": False, "item_size": 2, "card": WITHOUT}
    _, decode = split_constants(4, 64, 64, (8, 4), **sizes)
    _, prefill = prefill_constants(4, 64, 64, (8, 4), logits=True, cached=True, transient=True, **sizes)
    for kernel, given in ((decode_kernels.split, decode), (prefill_kernels.attend_chunk, {**prefill, "CAREFUL": 1})):
        assert {name for name in inspect.signature(kernel.fn).parameters if name.isupper()} == given.keys()


def test_where_it_cannot_run(monkeypatch):
    backend = TritonBackend()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.status() == (False, "there is no CUDA device", None)
    assert not backend.supports("cpu", torch.float32)
    assert backend.supports("cuda", torch.bfloat16)
    assert not backend.supports("cuda", torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.status().reason

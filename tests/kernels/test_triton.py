"""The kernels in Triton, by its interpreter where there is no GPU; `test_backends` holds them to the definitions."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.reference_backend import ReferenceBackend
from moacompress.kernels.triton import work_lists
from moacompress.kernels.triton.triton_backend import TritonBackend
from moacompress.rules.windows import BLOCK

PAIRS = [(0, 0), (1, 1), (1, 2), (2, 2)]
REFERENCE = ReferenceBackend()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_as_the_reference(seed, dtype, triton, random_case, close):
    case = random_case(100 + seed, dtype, tokens=1, formats="any")
    close(case.decoded(triton), case.decoded(REFERENCE), dtype, lse_error=3e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_windows_that_begin_anywhere_in_a_block(pair, triton, random_case, close):
    for start in range(16):
        sizes = {"rows": 1, "kv_heads": 1, "group": 1, "dim": 16, "value_dim": 16, "tokens": 1, "native_window": 0}
        case = random_case(
            start, torch.float32, past=70 + start, rules=[(4, 33, 0)], min_window=16, formats=[pair], **sizes
        )
        close(case.decoded(triton), case.decoded(REFERENCE), torch.float32)


@pytest.mark.parametrize(
    ("group", "dim", "value_dim"), [(1, 32, 32), (16, 64, 64), (8, 256, 256), (3, 96, 100), (2, 9, 33)]
)
def test_sizes(group, dim, value_dim, triton, random_case, close):
    formats = [PAIRS[0], PAIRS[2], PAIRS[3]]
    sizes = {"group": group, "dim": dim, "value_dim": value_dim, "kv_heads": 3, "rows": 2, "past": 100, "tokens": 1}
    case = random_case(dim, torch.float32, formats=formats, **sizes)
    close(case.decoded(triton), case.decoded(REFERENCE), torch.float32)


@pytest.mark.parametrize("factor", [2.0**-14, 1.0, 2.0**9])
@pytest.mark.parametrize("pair", PAIRS[1:], ids=str)
def test_codes_of_small_and_of_large_numbers(pair, factor, triton, random_case):
    """In float16 codes are multiplied as they lie: what is small is not lost, and what is large does not overflow."""
    sizes = {"rows": 1, "kv_heads": 1, "group": 2, "dim": 64, "value_dim": 64, "tokens": 1, "native_window": 0}
    case = random_case(7, torch.float16, past=300, rules=[(4, 0, 1024)], formats=[pair], logits=False, **sizes)
    bits = KVPart(pair[1], 64, torch.float16, values=True).bits
    for segment in case.values:
        segment.view(torch.float16)[:, 64 * bits // 8 * BLOCK // 2 :].mul_(factor)
    case = replace(case, query=case.query * 50)
    (found, lse), (wanted, wanted_lse) = case.decoded(triton), case.to(torch.float32).decoded(REFERENCE)
    assert (found.float() - wanted).abs().max() < 4e-3 * wanted.abs().max()
    assert (lse - wanted_lse).abs().max() < 2e-2


def test_stretches_add_up(triton, random_case, close, monkeypatch):
    """However many programs share a KV head; each reads whole tiles."""
    case = random_case(
        3, torch.float32, past=500, rows=2, kv_heads=2, tokens=1, rules=[(4, 0, 1024), (16, 200, 0)], native_window=0
    )
    wanted = case.decoded(REFERENCE)
    for programs in (1, 1 << 30):
        monkeypatch.setattr(work_lists, "PROGRAMS", programs)
        close(case.decoded(triton), wanted, torch.float32)


def test_work_is_shared_by_bytes(random_case):
    """Stretches of 4 bits have about four times the blocks, and every block is in one."""
    case = random_case(
        5,
        torch.bfloat16,
        rows=1,
        kv_heads=2,
        dim=64,
        value_dim=64,
        past=500,
        rules=[(4, 0, 1024)] * 2,
        native_window=0,
        formats=[(0, 0), (2, 2)],
    )
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
    case = random_case(8, torch.float32, past=100, rows=2, cuts=0, formats="any", tokens=1)
    wanted = case.decoded(REFERENCE)
    apart = {}
    for name in ("keys", "values"):
        apart[name] = []
        for segment in getattr(case, name):
            between = torch.empty(len(segment), 2, *segment.shape[1:], dtype=segment.dtype)
            between[:, 1] = segment
            apart[name].append(between[:, 1])
    close(replace(case, **apart).decoded(triton), wanted, torch.float32)


def test_blocks_between_units_are_refused(triton, random_case):
    case = random_case(8, torch.float32, past=40, rows=1, cuts=1, tokens=1)
    moved = torch.empty(case.keys[0].numel() + 1)[1:].view_as(case.keys[0]).copy_(case.keys[0])
    other = torch.empty(case.keys[1].numel() + 4)[4:].view_as(case.keys[1]).copy_(case.keys[1])
    assert len(moved)
    assert len(other)
    with pytest.raises(UnsupportedError, match="whole multiples of 16 bytes"):
        replace(case, keys=[moved, other]).decoded(triton)


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

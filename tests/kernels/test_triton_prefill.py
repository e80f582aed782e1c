"""Prompts by the kernels in Triton, by its interpreter where there is no GPU; `test_backends` holds them to the definitions."""

from __future__ import annotations

import inspect
import random
from dataclasses import replace

import pytest
import torch

from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.reference_backend import ReferenceBackend
from moacompress.kernels.triton.cards import WITHOUT
from moacompress.kernels.triton.tile_sizes import prefill_constants, split_constants
from moacompress.rules.windows import BLOCK
from tests.kernels.test_triton import PAIRS

REFERENCE = ReferenceBackend()
GRADIENTS = ("query", "key", "value", "sink_logits")
LSE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_as_the_reference(seed, dtype, triton, random_case, close):
    """Selected tokens too, of blocks and of the chunk."""
    sizes = {"tokens": (1, 5, 33, 70)[seed % 4], "rows": 1 + seed % 2, "group": (1, 2, 3, 5)[seed // 2]}
    sizes |= {"dim": (16, 24, 64, 9)[seed // 2], "value_dim": (33, 16, 40, 64)[seed // 2]}
    case = random_case(200 + seed, dtype, formats="any", **sizes).keeping(random.Random(seed))
    close(case.prefilled(triton), case.prefilled(REFERENCE), dtype, lse_error=LSE_ERROR[dtype])


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_windows_that_begin_anywhere_in_a_block(pair, triton, random_case, close):
    sizes = {"rows": 1, "kv_heads": 1, "group": 2, "dim": 16, "value_dim": 16, "tokens": 20, "native_window": 0}
    for start in range(16):
        case = random_case(
            start, torch.float32, past=70 + start, rules=[(4, 33, 0)], min_window=16, formats=[pair], **sizes
        ).keeping(random.Random(start))
        close(case.prefilled(triton), case.prefilled(REFERENCE), torch.float32)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_sinks_and_windows_that_end_within_the_chunk(pair, triton, random_case, close):
    """A prompt without a past that is longer than its windows, and one of sinks alone."""
    sizes = {"rows": 1, "kv_heads": 2, "group": 2, "dim": 16, "value_dim": 16, "past": 0, "native_window": 0}
    for tokens in (1, 15, 65, 130):
        case = random_case(
            tokens,
            torch.float32,
            tokens=tokens,
            rules=[(70, 33, 0), (4, 0, 0)],
            min_window=16,
            formats=[pair] * 2,
            **sizes,
        ).keeping(random.Random(tokens))
        close(case.prefilled(triton), case.prefilled(REFERENCE), torch.float32)


@pytest.mark.parametrize(
    ("group", "dim", "value_dim"), [(1, 32, 32), (16, 64, 64), (2, 256, 256), (3, 96, 100), (2, 9, 33), (5, 128, 128)]
)
def test_sizes(group, dim, value_dim, triton, random_case, close):
    formats = [PAIRS[0], PAIRS[2], PAIRS[3]]
    sizes = {"group": group, "dim": dim, "value_dim": value_dim, "kv_heads": 3, "rows": 1, "past": 60, "tokens": 20}
    case = random_case(dim, torch.float32, formats=formats, **sizes).keeping(random.Random(dim))
    close(case.prefilled(triton), case.prefilled(REFERENCE), torch.float32)


@pytest.mark.parametrize("pair", PAIRS[1:], ids=str)
def test_codes_behind_a_token_that_outweighs_the_others(pair, triton, random_case):
    """Products of weights and scales alone would be too small for float16."""
    sizes = {"rows": 1, "kv_heads": 1, "group": 1, "dim": 64, "value_dim": 64, "tokens": 1, "native_window": 0}
    sizes |= {"logits": False, "cuts": 0, "softcap": 0.0}
    case = random_case(7, torch.float16, past=600, rules=[(4, 0, 1024)], formats=[pair], **sizes)
    t = torch.arange(600)
    slots = case.table[0, 0][t // BLOCK].long() * BLOCK + t % BLOCK
    keys, values = torch.zeros(600, 64), torch.randn(600, 64) * 0.05 + 0.1
    keys[0], values[0] = 1, 0
    for code, memory, numbers in zip(pair, (case.keys, case.values), (keys, values), strict=True):
        KVPart(code, 64, torch.float16, values=numbers is values).write(memory[0], slots, numbers.half())
    case = replace(case, query=torch.full_like(case.query, 12 / 64 / case.scaling))
    (found, _), (wanted, _) = case.prefilled(triton), case.to(torch.float32).prefilled(REFERENCE)
    assert (found.float() - wanted).abs().max() < 4e-3 * wanted.abs().max()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_selected_tokens_that_are_not_finite_reach_those_who_see_them(pair, number, triton, random_case):
    """They may be seen by some queries of a tile and not by others."""
    sizes = {
        "rows": 1,
        "kv_heads": 1,
        "group": 2,
        "dim": 16,
        "value_dim": 16,
        "tokens": 60,
        "valid": 60,
        "native_window": 0,
    }
    case = random_case(3, torch.float32, past=100, rules=[(4, 20, 0)], min_window=16, formats=[pair], **sizes)
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
    _, prefill = prefill_constants(4, 64, 64, (8, 4), logits=True, cached=True, passing=True, **sizes)
    for kernel, constants in (
        (decode_kernels.split, decode),
        (prefill_kernels.attend_chunk, {**prefill, "CAREFUL": 1}),
    ):
        upper = {name for name in inspect.signature(kernel.fn).parameters if name.isupper()}
        assert upper == constants.keys()

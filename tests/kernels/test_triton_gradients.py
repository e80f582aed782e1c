"""Gradients by the kernels in Triton, by its interpreter where there is no GPU."""

from __future__ import annotations

import inspect
import random

import numpy as np
import pytest
import torch

from moacompress.kernels.reference.reference_backend import ReferenceBackend
from moacompress.kernels.triton.cards import WITHOUT
from moacompress.kernels.triton.tile_sizes import gradient_constants
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import visible_intervals
from tests.kernels.test_gradients import gradients
from tests.kernels.test_nonfinite import GRADIENT_PLANTS, check_gradients

REFERENCE = ReferenceBackend()
TOLERANCE = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
heavy = pytest.mark.heavy


def check(triton, case, dtype):
    """Gradients, and what they are of, are those of the reference in float64; NaN in padding is never read."""
    case.keys, case.values = [], []
    dout = torch.randn(*case.query.shape[:3], case.value.shape[-1])
    dlse = torch.randn(case.query.shape[:3])
    found = gradients(lambda each: each.prefilled(triton), case, dout, dlse)
    exact = case.to(torch.float64)
    exact.query, exact.key, exact.value = (t.nan_to_num(0) for t in (exact.query, exact.key, exact.value))
    expected = gradients(type(case).prefilled, exact, dout.double(), dlse.double())
    for mine, wanted in zip(found, expected, strict=True):
        assert mine.shape == wanted.shape
        error = (mine.double() - wanted).abs() / (1 + wanted.abs().max())
        assert error.numel() == 0 or error.max() < TOLERANCE[dtype], error.max()


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=heavy) for seed in range(8, 60))])
def test_random_configurations(seed, triton, random_case):
    """Groups, sizes, bounds, learned logits, native windows and padding at random."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    torch.manual_seed(seed)
    check(triton, random_case(seed, dtype, past=0, cuts=0, scaling=0.25), dtype)


@pytest.mark.parametrize("tokens", [1, 65, 130])
def test_sinks_and_windows_over_several_tiles(tokens, triton, random_case):
    """Sinks that fill a tile and more, a window that begins within one, and keys that no query sees after a while."""
    sizes = {"kv_heads": 3, "group": 2, "dim": 16, "value_dim": 33, "native_window": 0, "past": 0, "cuts": 0}
    rules = [(70, 33, 0), (4, 0, 0), (0, 10, 300)]
    case = random_case(
        tokens, torch.float32, tokens=tokens, valid=tokens, rules=rules, min_window=16, scaling=0.25, **sizes
    )
    check(triton, case, torch.float32)


@pytest.mark.parametrize(("group", "dim", "value_dim"), [(1, 32, 32), (16, 64, 64), (2, 256, 256), (5, 128, 100)])
def test_sizes(group, dim, value_dim, triton, random_case):
    sizes = {"group": group, "dim": dim, "value_dim": value_dim, "kv_heads": 1, "rows": 1, "past": 0, "tokens": 40}
    check(triton, random_case(dim, torch.float32, cuts=0, scaling=0.25, **sizes), torch.float32)


def test_codes_hand_gradients_on(triton, random_case):
    """Attention is that of the codes; what comes back goes straight through the rounding."""
    case = random_case(5, torch.float32, past=0, cuts=0, formats="any", tokens=50, valid=50, rows=2, scaling=0.25)
    case.keys, case.values = [], []
    dout, dlse = torch.randn(*case.query.shape[:3], case.value.shape[-1]), torch.randn(case.query.shape[:3])
    codes = [each.tolist() for each in case.formats]
    assert any(map(any, codes))
    found = gradients(lambda each: each.prefilled(triton), case, dout, dlse)
    wanted = gradients(lambda each: each.prefilled(REFERENCE), case, dout, dlse)
    for mine, right in zip(found, wanted, strict=True):
        assert (mine - right).abs().max() < 2e-4 * (1 + right.abs().max())
    with torch.no_grad():
        plain = case.prefilled(triton)[0]
    case.query = case.query.detach().requires_grad_()
    assert (case.prefilled(triton)[0] - plain).abs().max() < 2e-4 * (1 + plain.abs().max())


@pytest.mark.parametrize(
    ("what", "number"), [plant for plant in GRADIENT_PLANTS if plant[0] in ("key", "value", "query")]
)
def test_numbers_that_are_not_finite(what, number, triton, random_case, attended, unchanged_or_as):
    """They reach the gradients of those alone who see them."""

    def close(*pairs, **more):
        unchanged_or_as(*pairs, **more, bits=False)

    check_gradients(lambda c: c.prefilled(triton), torch.float32, what, number, random_case, attended, close)


def test_the_last_query_that_sees_a_tile(triton):
    from moacompress.kernels.triton.gradients import last_queries

    rng = random.Random(0)
    for native in (0, 0, 40):
        for tokens, tile in ((1, 16), (100, 16), (130, 64)):
            rules = [Rule(rng.choice((0, 4, 33, 70)), rng.choice((0, 20, 90)), rng.choice((0, 500))) for _ in range(5)]
            table = RuleTable.of([Rule.FULL, *rules], 16).in_layer(native)
            n = np.arange(1, tokens + 1)[:, None, None]
            (first, sink_end), (start, _) = visible_intervals(n, table.span)
            key = np.arange(tokens)
            first, sink_end, start = (
                np.broadcast_to(part, (tokens, 1, 6))[:, 0, :, None] for part in (first, sink_end, start)
            )
            seen = (key >= first) & (key < sink_end) | (key >= start) & (key < n[:, 0, :, None])
            found = last_queries(table, tokens, tile)
            for head in range(6):
                for number, begin in enumerate(range(0, tokens, tile)):
                    rows = np.nonzero(seen[:, head, begin : begin + tile].any(1))[0]
                    assert found[head, number] == rows[-1] + 1


def test_nothing_of_rows_with_a_past_or_selected_tokens_is_lost(triton, random_case):
    """Those gradients are the reference's, to the bit."""
    case = random_case(3, torch.float32, rows=2, past=40, tokens=20, valid=20)
    assert case.past.any()
    results = []
    for backend in (triton, REFERENCE):
        leaf = case.query.detach().clone().requires_grad_()
        out, _ = type(case)(**{**case.__dict__, "query": leaf}).prefilled(backend)
        results.append(torch.autograd.grad(out.sum(), leaf)[0])
    assert torch.equal(*results)
    assert results[0].abs().max() > 0


def test_kernels_are_given_what_they_take(triton):
    """The interpreter passes over other constants; a compiler does not."""
    from moacompress.kernels.triton import gradient_kernels

    _, constants = gradient_constants(4, 64, 64, softcap=True, wide=False, item_size=2, card=WITHOUT)
    for kernel in (gradient_kernels.of_queries, gradient_kernels.of_keys):
        assert {name for name in inspect.signature(kernel.fn).parameters if name.isupper()} == constants.keys()

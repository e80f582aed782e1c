"""Every backend over block tables equals attention by the definitions."""

from __future__ import annotations

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.dispatch import REFERENCE
from tests import gpu


@pytest.fixture(params=["reference", "cpu", *gpu.PLACES])
def backend(request, use_backend):
    return use_backend(request.param)


@pytest.fixture
def dtype(backend):
    """The widest that the backend knows."""
    return torch.float64 if backend.supports("cpu", torch.float64) else torch.float32


@pytest.mark.parametrize("seed", range(12))
def test_by_the_definitions(seed, backend, dtype, random_case, close):
    sizes = {"tokens": [1, 3, 20][seed % 3], "rows": 1 + seed % 2, "value_dim": [8, 5][seed % 2]}
    case = random_case(seed, dtype, group=2, dim=8, **sizes)
    close(case.prefilled(backend), case.by_definition(decode=False), dtype)
    close(case.decoded(backend), case.by_definition(decode=True), dtype)


def test_without_the_log_of_the_denominator_it_is_the_same(backend, dtype, random_case):
    case = random_case(4, dtype, rows=2, past=40, tokens=20)
    rest = {"cache": case.cache, "rules": case.rules, "scores": case.scores}
    out, _ = backend.prefill(case.query, case.key, case.value, past=case.past, valid=case.valid, **rest)
    assert (out - case.prefilled(backend)[0]).abs().max() < 1e-5
    out, _ = backend.decode(case.query[:, :, 0], lengths=case.past, **rest)
    assert (out - case.decoded(backend)[0]).abs().max() < 1e-5


def test_a_prefill_without_cache_has_gradients(backend, dtype, random_case):
    """Those of the reference in float64; a decode has them where the backend says so."""
    case = random_case(6, dtype, cached=False, rows=2, tokens=30, valid=30, logits=True)
    weight = torch.randn(*case.query.shape[:3], case.value.shape[-1])
    found = (
        one.gradients(lambda case, by=by: case.prefilled(by)[:1], weight)
        for one, by in ((case, backend), (case.to(torch.float64), REFERENCE))
    )
    for mine, wanted in zip(*found, strict=True):
        assert (mine - wanted).abs().max() < 1e-4 * (1 + wanted.abs().max())
    case = random_case(6, dtype, rows=2, past=40, tokens=1)
    case.query = case.query.detach().clone().requires_grad_()
    if backend.capabilities.cached_gradients:
        case.decoded(backend)[0].sum().backward()
        assert case.query.grad.abs().max() > 0
    else:
        with pytest.raises(UnsupportedError, match="no gradients"):
            case.decoded(backend)


def test_a_visible_block_that_is_not_there_is_refused(backend, dtype, random_case):
    case = random_case(1, dtype, rows=1, past=100, native_window=0, tokens=2, valid=2)
    case.table[0, 0, 100 // 16] = -1
    for call in (lambda: case.decoded(backend), lambda: case.prefilled(backend)):
        with pytest.raises((UnsupportedError, RuntimeError), match="has no id of the pool in the table"):
            call()
    case.table = case.table[:, :, :2].contiguous()
    with pytest.raises((UnsupportedError, RuntimeError), match="has no id of the pool in the table"):
        case.decoded(backend)


def test_an_empty_batch(backend, random_case):
    case = random_case(2, torch.float32, rows=1, past=0, group=2, kv_heads=2)
    empty = case.row(1)
    assert empty.query.shape[0] == 0
    out, lse = empty.prefilled(backend)
    assert (out.shape[0], lse.shape[0]) == (0, 0)
    out, lse = empty.decoded(backend)
    assert (out.shape, lse.shape) == ((0, 4, case.value.shape[-1]), (0, 4))


def test_a_format_that_is_not_known_is_refused(backend, dtype, random_case):
    case = random_case(1, dtype, rows=1, past=40, tokens=3, valid=3)
    rules = case.rules
    rules.format_codes[1, 0] = 7
    rest = {"cache": case.cache, "rules": rules, "scores": case.scores}
    with pytest.raises((UnsupportedError, RuntimeError), match="format"):
        backend.decode(case.query[:, :, 0], lengths=case.past, **rest)
    with pytest.raises((UnsupportedError, RuntimeError), match="format"):
        backend.prefill(case.query, case.key, case.value, past=case.past, valid=case.valid, **rest)

"""Gradients of the compiled prefill equal those of the reference, and what has none says so."""

from __future__ import annotations

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels import dispatch
from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend

pytestmark = pytest.mark.usefixtures("isa")
"""Skips where the kernels cannot run, and leaves the best instruction set behind."""

OPS = torch.ops.moacompress_cpu
CPU = CpuBackend()
TOLERANCE = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def weights_of(case):
    """Cotangents of output and log of the denominator, at random; none of a log that is minus infinity."""
    real = torch.arange(case.query.shape[2]) < case.valid[:, None, None]
    return torch.randn(*case.query.shape[:3], case.value.shape[-1]), torch.randn(case.query.shape[:3]) * real


@pytest.mark.seeds(60)
def test_random_configurations(seed, random_case, isa, poisoned_memory):
    isa(library.ISAS[seed % len(library.ISAS)])
    dtype = library.DTYPES[seed // 5 % 3]
    case = random_case(seed, dtype, cached=False, scaling=0.25)
    torch.manual_seed(seed)
    weights = weights_of(case)
    found = case.gradients(lambda case: case.prefilled(CPU), *weights)
    # NaN past the real tokens is never read forward; plain autograd would multiply it by zero
    exact = case.to(torch.float64)
    exact.query, exact.key, exact.value = (t.nan_to_num(0) for t in (exact.query, exact.key, exact.value))
    expected = exact.gradients(type(case).prefilled, *weights)
    for mine, wanted in zip(found, expected, strict=True):
        assert mine.shape == wanted.shape
        error = (mine.double() - wanted).abs() / (1 + wanted.abs().max())
        assert error.numel() == 0 or error.max() < TOLERANCE[dtype], error.max()


@pytest.mark.parametrize("name", library.ISAS)
def test_threads_change_no_bit(name, random_case, isa, threads):
    isa(name)
    case = random_case(7, torch.float32, cached=False, rows=2, tokens=150, valid=140)
    weights, results = weights_of(case), []
    for count in (1, 17):
        threads(count)
        results.append(case.gradients(lambda case: case.prefilled(CPU), *weights))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_with_a_cache_there_are_no_gradients(random_case):
    case = random_case(1, torch.float32, rows=1, past=33, tokens=4, valid=4)
    case.query = case.query.detach().clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="a prefill over a cache has no gradients"):
        OPS.prefill(*case.prefill)[0].sum().backward()
    with pytest.raises(UnsupportedError, match="decode has no gradients"):
        case.decoded(CPU)
    with torch.no_grad():
        case.decoded(CPU)


def test_what_torch_must_know(random_case):
    """Schemas, fakes and autograd registrations, by torch's own checks."""
    case = random_case(2, torch.float32, rows=2, cached=False, tokens=6, valid=6, logits=True)
    leaves = [t.detach().requires_grad_() for t in case.prefill[:3]]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.prefill.default, (*leaves, *case.prefill[3:]), test_utils=tests)
    case = random_case(2, torch.float32, rows=2, past=40, tokens=1)
    torch.library.opcheck(OPS.decode.default, case.decode, test_utils=(tests[0], tests[2]))


def test_compiled_graphs_hold_the_operators(random_case, use_backend):
    use_backend("cpu")
    case = random_case(4, torch.float32, rows=2, past=40, tokens=3, valid=3)
    eager = case.decoded(CPU), case.prefilled(CPU)
    query, rules = case.query, case.rules
    dispatch.forget()  # nothing need have run before

    def both():
        backend = dispatch.backend_for(query)
        rest = {"cache": case.cache, "rules": rules, "scores": case.scores, "with_lse": True}
        whole = backend.prefill(query, case.key, case.value, past=case.past, valid=case.valid, **rest)
        return backend.decode(query[:, :, 0], lengths=case.past, **rest), whole

    found = torch.compile(both, backend="aot_eager", fullgraph=True)()
    for pair, other in zip(eager, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))

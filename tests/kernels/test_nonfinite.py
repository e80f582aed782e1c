"""NaN and infinities: they reach the output of the queries that see them, as in torch's softmax, and change no other bit."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random

import pytest
import torch

from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from tests import oracle

OPS = torch.ops.moacompress_cpu
CPU = CpuBackend()
SEEDS = 6
NAN, INF = float("nan"), float("inf")
TOLERANCE = {torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
GRADIENTS = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
everywhere = pytest.mark.parametrize("name", library.ISAS)
few_seeds = pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(2, SEEDS), marks=pytest.mark.heavy)], ids=["few", "more"]
)
every_dtype = pytest.mark.parametrize("dtype", library.DTYPES)


def plant(case, rng, what, number, *, decode):
    """Writes a number into something that one of the queries sees, or into a query; returns whether there is any."""
    lengths = [
        (row, t, int(case.past[row]) + (0 if decode else t + 1))
        for row in range(len(case.past))
        for t in range(1 if decode else int(case.valid[row]))
    ]
    lengths = [(row, t, n) for row, t, n in lengths if n > 0]
    if not lengths:
        return False
    row, t, n = rng.choice(lengths)
    if what == "logit":
        if case.sink_logits is not None:
            case.sink_logits[rng.randrange(len(case.sink_logits))] = number
        return case.sink_logits is not None
    if what == "query":
        at = case.query[row, rng.randrange(case.query.shape[1]), t]
    else:
        head = rng.randrange(case.table.shape[1])
        seen = oracle.visible(case.rule(head), n, case.min_window, case.native_window, first=n - 1)[0]
        at = case.vector(what, row, head, rng.choice(seen.nonzero().flatten().tolist()))
    at[rng.randrange(len(at))] = number
    return True


def build(random_case, seed, dtype, **fixed):
    """A case small enough for the definitions."""
    rng, of = random.Random(seed), {"tokens": (1, 5, 40, 90), "dim": (9, 16, 64), "value_dim": (16, 33, 64)}
    sizes = {name: rng.choice(some) for name, some in of.items()}
    return random_case(seed, dtype, **{"group": rng.choice((1, 2, 5)), **sizes, **fixed})


@functools.lru_cache(SEEDS)  # for all instruction sets, which come one after the other
def planted(random_case, seed, dtype, op, what, number):
    """Returns a case with and without the number, and what the operator must give for each."""
    case = build(random_case, seed, dtype, **({"logits": True} if what == "logit" else {}))
    other, rng = copy.deepcopy(case), random.Random(f"{seed} {what} {number}")
    for _ in range(4 if what == "several" else 1):
        kind = rng.choice(("key", "value", "query")) if what == "several" else what
        plant(other, rng, kind, number, decode=op == "decode")
    return other, case, *(c.by_definition(decode=op == "decode") for c in (other, case))


PLANTS = [
    *((what, number) for what in ("key", "value", "query", "logit") for number in (NAN, INF, -INF)),
    ("several", NAN),
    ("several", INF),
]


def in_dtypes(plants):
    """Gives every plant a dtype, so that each thing that is planted and each number meets all of them."""
    return [(*plant, library.DTYPES[(i + i // 3) % 3]) for i, plant in enumerate(plants)]


@everywhere
@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize(("what", "number", "dtype"), in_dtypes(PLANTS))
@few_seeds
def test_numbers_that_are_seen(seeds, name, what, number, dtype, op, random_case, isa, unchanged_or_as):
    isa(name)
    run = getattr(OPS, op)
    for seed in seeds:
        other, case, *exact = planted(random_case, seed, dtype, op, what, number)
        unchanged_or_as(run(*getattr(other, op)), run(*getattr(case, op)), *exact, TOLERANCE[dtype])


@everywhere
@every_dtype
def test_what_nobody_sees_changes_no_bit(dtype, name, random_case, isa):
    """Pools are full of NaN where no query looks: the same as infinities and as finite numbers."""
    isa(name)
    for seed in range(12):
        case = random_case(seed, dtype)
        results = []
        for number in (NAN, INF, -INF, 3.0):
            other = copy.deepcopy(case)
            for tensor in (other.query, other.key, other.value, *other.keys, *other.values):
                tensor.masked_fill_(tensor.isnan(), number)
            results.append((*OPS.decode(*other.decode), *OPS.prefill(*other.prefill)))
        for found in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], found, strict=True))


@functools.lru_cache(1)  # for all instruction sets, which come one after the other
def far_below(random_case, dtype, softcap, logits):
    """Returns a case and what each operator must give for it; and with many keys of scores of minus infinity, by how many."""
    sizes = {"rows": 2, "past": 200, "tokens": 7, "valid": 7, "dim": 16, "value_dim": 16, "group": 2}
    case = random_case(3, dtype, rules=[(4, 0, 1024)] * 3, **sizes)
    case.native_window, case.softcap, case.scaling = 0, softcap, 0.25
    case.sink_logits = torch.randn(case.query.shape[1]) if logits else None
    case.query = case.query.abs()
    found = {}
    for count in (0, 200, 150, 1):
        found[count] = other = copy.deepcopy(case)
        for head, position in itertools.product(range(case.table.shape[1]), range(count)):
            other.vector("key", 1, head, position)[3] = -INF
    return {
        count: (other, {op: other.by_definition(decode=op == "decode") for op in ("decode", "prefill")})
        for count, other in found.items()
    }


@everywhere
@every_dtype
@pytest.mark.parametrize(("softcap", "logits"), [(0.0, False), (2.0, False), (0.0, True)])
def test_scores_of_minus_infinity(softcap, logits, dtype, name, random_case, isa, unchanged_or_as):
    """All that a query sees, or many in a row: weights are zero, or nothing is left to divide by."""
    isa(name)
    cases = far_below(random_case, dtype, softcap, logits)
    case, before = cases[0]
    for count in (200, 150, 1):
        other, exact = cases[count]
        for op in ("decode", "prefill"):
            run = getattr(OPS, op)
            results = (run(*getattr(c, op)) for c in (other, case))
            unchanged_or_as(*results, exact[op], before[op], TOLERANCE[dtype])
            assert bool(exact[op][0].isnan().any()) == (op == "decode" and count == 200 and not softcap and not logits)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_below_zero(dtype, name, random_case, isa):
    isa(name)
    case = build(random_case, 1, dtype, past=33, tokens=20, valid=20, softcap=0.0, native_window=0, logits=False)
    case.query = case.query.abs() * 1e16
    for tensor in (case.key, *case.keys):
        tensor.copy_(-1e18 * tensor.abs())
    for op in ("decode", "prefill"):
        found, exact = getattr(OPS, op)(*getattr(case, op)), case.by_definition(decode=op == "decode")
        assert not found[0].isnan().any()
        assert ((found[1] - exact[1]).abs() <= 2e-2 * exact[1].abs()).all()


def compiled(case):
    return case.prefilled(CPU)


GRADIENT_PLANTS = [
    *((what, number) for what in ("key", "value", "query") for number in (NAN, INF)),
    ("dout", NAN),
    ("dout", INF),
    ("dlse", NAN),
]


def check_gradients(run, dtype, what, number, random_case, unchanged_or_as):
    for seed in range(2):
        rng = random.Random(seed)
        tokens = rng.choice((20, 70))
        fixed = {"cached": False, "scaling": 0.25, "tokens": tokens, "valid": rng.randint(1, tokens)}
        case = build(random_case, seed, dtype, **fixed)
        other = copy.deepcopy(case)
        weights = torch.randn(*case.query.shape[:3], case.value.shape[-1]), torch.randn(case.query.shape[:3])
        for weight in weights:
            weight[:, :, fixed["valid"] :] = 0
        weights = tuple(weight.to(dtype).float() for weight in weights)
        changed = tuple(weight.clone() for weight in weights)
        if what in ("dout", "dlse"):
            row, head, token = (rng.randrange(size) for size in (*case.query.shape[:2], fixed["valid"]))
            changed[what == "dlse"][row, head, token].flatten()[-1:] = number
        else:
            plant(other, rng, what, number, decode=False)
        found, exact = [], []
        for one, given in ((other, changed), (case, weights)):
            found.append(one.gradients(run, *given))
            exact.append(one.to(torch.float64).gradients(lambda c: c.by_definition(decode=False), *given))
        if number == INF:  # rounding and what is summed first decide between infinity and NaN
            found, exact = ([[t.masked_fill(t.isinf(), NAN) for t in ts] for ts in both] for both in (found, exact))
        unchanged_or_as(*found, *exact, GRADIENTS[dtype])


@pytest.mark.parametrize(("what", "number", "dtype"), in_dtypes(GRADIENT_PLANTS))
@everywhere
def test_gradients(dtype, name, what, number, random_case, isa, unchanged_or_as):
    isa(name)
    check_gradients(compiled, dtype, what, number, random_case, unchanged_or_as)


@everywhere
@every_dtype
def test_nan_in_padding_reaches_no_gradient(dtype, name, random_case, isa):
    """Neither from the padded tokens nor from what comes back for them."""
    isa(name)
    case = build(random_case, 5, dtype, cached=False, tokens=70, valid=50, logits=True)
    results = []
    for number in (NAN, 3.0):
        other = copy.deepcopy(case)
        for tensor in (other.query, other.key, other.value):
            tensor[:, :, 50:] = number
        torch.manual_seed(0)
        weights = torch.randn(*case.query.shape[:3], case.value.shape[-1]), torch.randn(case.query.shape[:3])
        for weight in weights:
            weight[:, :, 50:] = number
        results.append(other.gradients(compiled, *weights))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_backend(backend, seeds, what, number, op, random_case, unchanged_or_as):
    for seed in seeds:
        other, case, *exact = planted(random_case, seed, torch.float32, op, what, number)
        results = (c.decoded(backend) if op == "decode" else c.prefilled(backend) for c in (other, case))
        unchanged_or_as(*results, *exact, 3e-5, bits=False)


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize(("what", "number"), PLANTS)
def test_the_reference_of_the_kernels(what, number, op, random_case, unchanged_or_as):
    check_backend(REFERENCE, range(2), what, number, op, random_case, unchanged_or_as)


def is_heavy(op, what, number):
    return op == "prefill" and math.isinf(number) and what != "logit"


@pytest.mark.parametrize(
    ("what", "number", "op"),
    [
        pytest.param(*plant, op, marks=[pytest.mark.heavy] * is_heavy(op, *plant))
        for plant in PLANTS
        for op in ("decode", "prefill")
    ],
)
def test_triton(what, number, op, random_case, unchanged_or_as, triton):
    check_backend(triton, (0, 2) if op == "decode" else (0,), what, number, op, random_case, unchanged_or_as)


@pytest.mark.parametrize(
    ("what", "number"), [plant for plant in GRADIENT_PLANTS if plant[0] in ("key", "value", "query")]
)
def test_gradients_of_the_reference(what, number, random_case, unchanged_or_as):
    close = functools.partial(unchanged_or_as, bits=False)
    check_gradients(lambda case: case.prefilled(), torch.float32, what, number, random_case, close)

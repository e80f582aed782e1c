"""Random attention over block tables: ragged rows, several segments, and NaN wherever no query may look."""

from __future__ import annotations

import os
import random
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moacompress.kernels.arguments import CacheView, Scores, TransientTokens
from moacompress.kernels.backend import Backend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.kv_parts import KVPart, read_tokens
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import COLUMNS, RuleTable
from moacompress.rules.windows import Span, visible_intervals
from tests import oracle, weight_blocks
from tests.kernels import emulated

ROOT = Path(__file__).resolve().parent.parent.parent
NAN = float("nan")
if os.environ.get(emulated.VARIABLE):  # before the tests read which instruction sets there are
    emulated.install(shlex.split(os.environ[emulated.VARIABLE]))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """The arguments of a prefill and of a decode over the same pool; `past` is decode's `lengths`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    table: torch.Tensor
    past: torch.Tensor
    valid: torch.Tensor
    sink: torch.Tensor
    alpha: torch.Tensor
    beta_q: torch.Tensor
    min_window: int
    native_window: int
    scaling: float
    softcap: float
    sink_logits: torch.Tensor | None
    formats: torch.Tensor | None = None
    """Codes of the formats of keys and values, `[2, kv_heads]`."""
    transient: TransientTokens | None = None

    @property
    def rules(self) -> RuleTable:
        columns = torch.zeros(len(COLUMNS), len(self.sink), dtype=torch.int64)
        columns[:3] = torch.stack((self.sink, self.alpha, self.beta_q))
        columns[COLUMNS.index("min_window")], columns[COLUMNS.index("native_window")] = (
            self.min_window,
            self.native_window,
        )
        table = RuleTable(columns)
        if self.formats is not None:
            table.format_codes[:] = self.formats
        return table

    @property
    def scores(self) -> Scores:
        return Scores(self.scaling, self.softcap, self.sink_logits)

    @property
    def cache(self) -> CacheView:
        return CacheView(self.keys, self.values, self.table, self.value.shape[-1])

    @property
    def prefill(self) -> tuple[Any, ...]:
        """What the operator takes."""
        chunk = (self.query, self.key, self.value)
        held = (*map(list, self.cache[:2]), self.table, self.past, self.valid)
        return (*chunk, *held, self.rules.columns, *self.scores, list(self.transient or ()))

    @property
    def decode(self) -> tuple[Any, ...]:
        """What the operator takes."""
        cache = (*map(list, self.cache[:2]), self.table)
        return (self.query[:, :, 0], *cache, self.past, self.rules.columns, *self.scores, self.value.shape[-1])

    def prefilled(self, backend: Backend = REFERENCE) -> tuple[Any, ...]:
        """What a backend makes of it."""
        return backend.prefill(
            self.query,
            self.key,
            self.value,
            cache=self.cache,
            past=self.past,
            valid=self.valid,
            rules=self.rules,
            scores=self.scores,
            with_lse=True,
            transient=self.transient,
        )

    def decoded(self, backend: Backend = REFERENCE) -> tuple[Any, ...]:
        """What a backend makes of it."""
        return backend.decode(
            self.query[:, :, 0],
            cache=self.cache,
            lengths=self.past,
            rules=self.rules,
            scores=self.scores,
            with_lse=True,
        )

    def gradients(self, run: Callable[[Case], tuple[Any, ...]], *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of query, key, value and learned logits of the weighted sum of what `run` makes of it."""
        names = ("query", "key", "value", "sink_logits")
        leaves = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
        found = run(replace(self, **leaves))
        if not found[0].requires_grad:  # a batch without real tokens does not depend on them at all
            return tuple(torch.zeros_like(leaf) for leaf in leaves.values())
        along = [weight.to(t.dtype) for weight, t in zip(weights, found, strict=True)]
        return torch.autograd.grad(found, list(leaves.values()), along)

    def to(self, dtype: torch.dtype) -> Case:
        logits = self.sink_logits
        moved = {name: getattr(self, name).to(dtype) for name in ("query", "key", "value")}
        moved |= {
            name: [t.to(dtype) if t.is_floating_point() else t for t in getattr(self, name)]
            for name in ("keys", "values")
        }
        moved["sink_logits"] = logits.to(torch.float64) if logits is not None and dtype == torch.float64 else logits
        return replace(self, **moved)

    def keeping(self, rng: random.Random) -> Case:
        """The same where random tokens are selected for a while, of the cache's blocks and of the chunk."""
        slots, admitted, evicted, begins = [], [], [], [0]
        for row, valid in enumerate(self.valid.tolist()):
            n = self.past[row].item() + torch.arange(1, valid + 1)
            last = RuleTable(self.rules.columns.numpy()).tokens_left(n.numpy())
            for head, ids in enumerate(self.table[row].tolist()):
                there = [block * 16 + place for block in ids if block >= 0 for place in range(16)]
                found = self.written(there, head) + [-1 - t for t in range(valid)]
                picked = rng.sample(found, rng.choice((0, len(found) // 2, len(found))))
                most = int(last[-1, head]) if valid else 0
                for slot in picked:
                    begin = rng.randint(-1, most)
                    slots.append(slot)
                    admitted.append(begin)
                    evicted.append(rng.choice((begin + 1, rng.randint(begin, most + 1), 1 << 40)))
                begins.append(len(slots))
        parts = (torch.tensor(part, dtype=torch.int64) for part in (begins, slots, admitted, evicted))
        return replace(self, transient=TransientTokens(*parts))

    def written(self, slots: list[int], head: int) -> list[int]:
        """Returns those tokens of the pool that hold numbers."""
        codes = [0, 0] if self.formats is None else self.formats[:, head].tolist()
        at = torch.tensor(slots, dtype=torch.int64)
        for memory, like, code, values in zip(
            self.cache[:2], (self.key, self.value), codes, (False, True), strict=True
        ):
            kv_part = KVPart(code, like.shape[-1], like.dtype, values)
            found = read_tokens(memory, kv_part, at[None, None] // 16, at % 16) if len(at) else None
            at = at if found is None else at[found[0, 0].isfinite().all(-1)]
        return at.tolist()

    def rule(self, head: int) -> Rule:
        """The rule of a KV head."""
        return Rule(int(self.sink[head]), int(self.alpha[head]), int(self.beta_q[head]))

    def vector(self, which: str, row: int, head: int, position: int) -> torch.Tensor | None:
        """The key or the value of a token where it lies, in the pool or in the chunk; None where it lies nowhere."""
        ahead = position - int(self.past[row])
        if ahead >= 0:
            found: torch.Tensor = getattr(self, which)[row, head, ahead]
            return found
        block = int(self.table[row, head, position // 16])
        for segment in getattr(self, f"{which}s"):
            if 0 <= block < len(segment):
                return segment[block, position % 16]  # type: ignore[no-any-return]
            block -= len(segment)
        return None

    def by_definition(self, *, decode: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What decode or prefill must give with native formats, in float64."""
        rows, heads, tokens, _ = self.query.shape
        kv_heads, tokens = self.table.shape[1], 1 if decode else tokens
        out = torch.zeros(rows, heads, tokens, self.value.shape[-1], dtype=torch.float64)
        lse = torch.full((rows, heads, tokens), -torch.inf, dtype=torch.float64)
        for row, (past, valid) in enumerate(zip(self.past.tolist(), self.valid.tolist(), strict=True)):
            first, n = (past - 1, past) if decode else (past, past + valid)
            for head in range(kv_heads) if 0 <= first < n else ():
                sides = []
                for which in ("key", "value"):
                    nothing = torch.zeros_like(getattr(self, which)[row, head, 0])
                    there = [self.vector(which, row, head, position) for position in range(n)]
                    sides.append(torch.stack([nothing if each is None else each for each in there]))
                at = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
                mask = oracle.visible(self.rule(head), n, self.min_window, self.native_window, first=first)
                scores = (self.scaling, self.softcap, None if self.sink_logits is None else self.sink_logits[at])
                found = oracle.attend_head(self.query[row, at, : n - first], *sides, mask, *scores)
                out[row, at, : n - first], lse[row, at, : n - first] = found
        return (out[:, :, 0], lse[:, :, 0]) if decode else (out, lse)

    def row(self, row: int) -> Case:
        """The same with one row of the batch alone."""
        picked = {name: getattr(self, name)[row : row + 1] for name in ("query", "key", "value", "past", "valid")}
        return replace(self, **picked, table=self.table[row : row + 1].contiguous())


def _strided(rng: random.Random, *sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of the shape `[rows, heads, tokens, dim]`, laid out in one of the ways that models have."""
    rows, heads, tokens, dim = sizes
    kind = rng.randrange(4)
    if kind == 0:
        return torch.randn(sizes, dtype=dtype)
    if kind == 1:
        return torch.randn(rows, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    if kind == 2:  # a part of a fused projection, at an odd offset
        return (
            torch.randn(rows, tokens, heads * dim + 7, dtype=dtype)[..., 3:-4]
            .view(rows, tokens, heads, dim)
            .transpose(1, 2)
        )
    return torch.randn(rows, heads, tokens, dim + 5, dtype=dtype)[..., :dim]


def build(seed: int, dtype: torch.dtype, **fixed: Any) -> Case:
    """Returns a random case; `fixed` sets what the names below say, and `cached=False` leaves the cache out."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cached = fixed.pop("cached", True)
    fixed |= {} if cached else {"past": 0, "cuts": 0}

    def pick(name: str, *of: Any) -> Any:
        selected = rng.choice(of)
        return fixed.get(name, selected)

    rows, kv_heads, group = pick("rows", 1, 2, 3), pick("kv_heads", 1, 2, 3), pick("group", 1, 2, 3, 4, 7)
    dim, value_dim = pick("dim", 16, 24, 64, 80, 128, 256, 20, 9), pick("value_dim", 16, 40, 64, 128, 192, 256, 33)
    tokens, heads = pick("tokens", 1, 2, 5, 16, 33, 70, 150), kv_heads * group
    past = [pick("past", 0, 1, 2, 15, 16, 17, 31, 100, 333, 500) for _ in range(rows)]
    valid = [pick("valid", tokens, tokens, rng.randint(0, tokens)) for _ in range(rows)]
    if rng.random() < 0.25 and "rules" not in fixed:
        rules: list[tuple[int, int, int]] = [(4, 0, 1024)] * kv_heads
    else:
        rules = [
            (rng.choice([4, 16, 64]), rng.choice([0, 7, 40, 128, 512]), rng.choice([0, 0, 100, 256, 700, 1024]))
            for _ in range(kv_heads)
        ]
    rules = fixed.get("rules", rules)
    min_window, native = pick("min_window", 16, 32, 64), pick("native_window", 0, 0, 0, 1, 9, 60, 300)
    softcap = pick("softcap", 0.0, 0.0, 2.0, 30.0)
    formats = fixed.get("formats")
    if formats == "any":
        formats = [(rng.choice((0, 1, 2, 3)), rng.choice((0, 1, 2, 3))) for _ in range(kv_heads)]
    logits = torch.randn(heads) * 2 if pick("logits", False, False, True) else None

    width = (max(past) + 15) // 16 + rng.randint(0, 2)
    table = torch.full((rows, kv_heads, width), -1, dtype=torch.int32)
    spare = rng.randint(0, 5)
    ids = list(range(rows * kv_heads * width + spare))
    rng.shuffle(ids)
    pool_k = torch.full((len(ids), 16, dim), NAN, dtype=dtype)
    pool_v = torch.full((len(ids), 16, value_dim), NAN, dtype=dtype)
    for row in range(rows):
        for head, rule in enumerate(rules):
            # what decode's query sees, and what a query of the chunk does: that of the first one, for all bounds grow
            seen = torch.zeros(past[row], dtype=torch.bool)
            for n in (past[row], past[row] + 1):
                (first, sink_end), (start, _) = visible_intervals(n, Span(*rule, min_window, native))
                seen[first:sink_end] = True
                seen[start:n] = True
                seen[first : max(first, min(rule[0], start))] = True
            positions = seen.nonzero().flatten()
            for block in (positions // 16).unique().tolist():
                table[row, head, block] = ids.pop()
            at = table[row, head][positions // 16].long(), positions % 16
            pool_k[at] = torch.randn(len(positions), dim, dtype=dtype)
            pool_v[at] = torch.randn(len(positions), value_dim, dtype=dtype)
    cuts = sorted(rng.randint(0, len(pool_k)) for _ in range(pick("cuts", 0, 0, 1, 2)))
    keys, values = list(pool_k.tensor_split(cuts)), list(pool_v.tensor_split(cuts))
    if formats is not None:
        keys, values, table = _in_formats(pool_k, pool_v, table, formats, cuts)
    query = _strided(rng, rows, heads, tokens, dim, dtype=dtype)
    key = _strided(rng, rows, kv_heads, tokens, dim, dtype=dtype)
    value = _strided(rng, rows, kv_heads, tokens, value_dim, dtype=dtype)
    for row in range(rows):
        if valid[row] < tokens:
            for tensor in (query, key, value):
                # decode reads the first query of every row, also of one without real tokens in the chunk
                tensor[row, :, max(valid[row], 1) if tensor is query else valid[row] :] = NAN
    return Case(
        query=query,
        key=key,
        value=value,
        keys=keys if cached else [],
        values=values if cached else [],
        table=table,
        past=torch.tensor(past),
        valid=torch.tensor(valid),
        sink=torch.tensor([rule[0] for rule in rules]),
        alpha=torch.tensor([rule[1] for rule in rules]),
        beta_q=torch.tensor([rule[2] for rule in rules]),
        min_window=min_window,
        native_window=native,
        scaling=pick("scaling", dim**-0.5, 0.3),
        softcap=softcap,
        sink_logits=logits,
        formats=None if formats is None else torch.tensor(formats).T.contiguous(),
    )


def _in_formats(
    pool_k: torch.Tensor, pool_v: torch.Tensor, table: torch.Tensor, formats: list[tuple[int, int]], cuts: list[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """The same pool with every block in the formats of its head, and those of each pair of formats in segments of their own."""
    kinds = sorted(set(formats))
    kind = torch.zeros(len(pool_k), dtype=torch.int64)  # of blocks that nobody has too
    for head, pair in enumerate(formats):
        mine = table[:, head]
        kind[mine[mine >= 0].long()] = kinds.index(pair)
    order = torch.argsort(kind, stable=True)
    place = torch.argsort(order)
    table = torch.where(table < 0, table, place[table.clamp_min(0).long()].to(torch.int32))
    edges = sorted({*cuts, *torch.bincount(kind, minlength=len(kinds)).cumsum(0).tolist(), 0, len(pool_k)})
    segments: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for begin, end in zip(edges, edges[1:] or edges, strict=False):
        pair = kinds[int(kind[order[begin]])] if end else formats[0]
        for pool, code, into in zip((pool_k, pool_v), pair, segments, strict=True):
            kv_part = KVPart(code, pool.shape[-1], pool.dtype, values=pool is pool_v)
            memory = kv_part.new(end - begin, pool.device)
            kv_part.write(memory, torch.arange(16 * (end - begin)), pool[order[begin:end]].flatten(0, 1))
            into.append(memory)
    return *segments, table


@pytest.fixture
def random_case() -> Callable[..., Case]:
    return build


@pytest.fixture
def close() -> Callable[..., None]:
    """Compares `(out, lse)` with those of a float64 reference."""

    def compare(found: Any, expected: Any, dtype: torch.dtype, lse_error: float = 1e-4) -> None:
        out, lse = found
        wanted, wanted_lse = expected
        assert out.dtype == dtype
        assert out.shape == wanted.shape
        assert lse.shape == wanted_lse.shape
        assert not out.isnan().any()
        real = wanted_lse.isfinite()
        assert torch.equal(lse.isfinite(), real)
        assert bool((lse[~real] == float("-inf")).all())
        assert bool((out[~real] == 0).all())
        error = (out.double() - wanted).abs() / (1 + wanted.abs())
        assert error.numel() == 0 or error.max() < TOLERANCE[dtype], error.max()
        error = (lse.double() - wanted_lse)[real].abs()
        assert error.numel() == 0 or error.max() < max(lse_error, TOLERANCE[dtype] / 100), error.max()

    return compare


@pytest.fixture
def unchanged_or_as() -> Callable[..., None]:
    """Compares results of a case and of one that has another number somewhere with those in float64 of both.

    What is the same to the bit in float64 must be so to the bit, all else must be as in float64. Without `bits`, a bound holds
    for the first too.
    """

    def compare(found: Any, before: Any, exact: Any, exact_before: Any, tolerance: float, *, bits: bool = True) -> None:
        for mine, mine_before, wanted, wanted_before in zip(found, before, exact, exact_before, strict=True):
            same = (wanted == wanted_before) | (wanted.isnan() & wanted_before.isnan())
            assert torch.equal(mine[same], mine_before[same]) or not bits
            if bits:
                mine, wanted = mine[~same], wanted[~same]
            mine = mine.double()
            assert torch.equal(mine.isnan(), wanted.isnan())
            endless = wanted.isinf()
            assert torch.equal(mine[endless], wanted[endless])
            error = (mine - wanted)[wanted.isfinite()].abs()
            assert error.numel() == 0 or error.max() < tolerance * (1 + wanted_before.nan_to_num(0, 0, 0).abs().max())

    return compare


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """One thread, unless a test sets another number: the tensors are small, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def random_blocks() -> Callable[..., torch.Tensor]:
    """Returns `weight_blocks.random_blocks`."""
    return weight_blocks.random_blocks

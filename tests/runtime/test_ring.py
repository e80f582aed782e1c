"""Rings of blocks hold what block tables hold, after every step and whatever is done between steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moacompress.kernels.arguments import Scores, as_tensors
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.kv_parts import read_tokens
from moacompress.kernels.reference.transient import merged
from moacompress.kernels.selected_attention import attend_selected
from moacompress.rules.formats import FORMATS
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK
from moacompress.runtime.cache import layer_cache, pool, ring
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk

DIM, GROUP, MIN_WINDOW = 16, 2, 16
SCORES = Scores(DIM**-0.5)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Pair:
    """A layer's cache that steps in rings, and one that does not; both are fed the same.

    On the CPU all but the steps in rings is the reference's work, which takes the interpreter of Triton's kernels minutes.

    Args:
        rules: of the KV heads.
        rows: of the batch.
        seed: of all tokens.
        reserve: tokens of a row that memory is taken for.
        drafts: whether tokens may be taken back.
        device: where all of it is.
    """

    def __init__(
        self,
        rules: RuleTable,
        rows: int,
        seed: int,
        reserve: int | None = None,
        drafts: bool = False,
        device: str = "cpu",
    ) -> None:
        self.device, self.rules, self.rows = device, rules, rows
        self.generator = torch.Generator().manual_seed(seed)
        self.layers = [PlanCacheLayer(rules, reserve) for _ in range(2)]
        for layer in self.layers:
            layer.record_past = drafts

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns keys, values and scores of so many tokens, `[rows, kv_heads, count, ...]`."""
        sizes = (self.rows, len(self.rules), count)
        key, value = (self.normal(*sizes, DIM) for _ in "kv")
        scores = torch.randint(-9, 9, sizes, generator=self.generator).to(self.device, torch.int16)
        return key, value, scores if self.rules.selects else None

    def normal(self, *sizes: int) -> torch.Tensor:
        """Returns random numbers, the same ones on every device."""
        return torch.randn(*sizes, generator=self.generator).to(self.device)

    def plainly(self) -> AbstractContextManager[object]:
        """Returns a `with` in which layers write as `Pair` says."""
        return patch.object(pool, "backend_for", lambda _: REFERENCE) if self.device == "cpu" else nullcontext()

    def chunk(self, count: int, *padding: int) -> None:
        """Feeds tokens, of which so many are padding at the front of the first rows."""
        key, value, scores = self.tokens(count)
        real = np.ones((self.rows, count), np.bool_)
        for row, beginning in enumerate(padding):
            real[row, :beginning] = False
        for layer in self.layers:
            layer.update(key, value)
            with self.plainly():
                layer.commit(Chunk(count, None if real.all() else real), scores)

    def step(self, backend: Any) -> None:
        """Feeds one token of every row, and compares what is attended to."""
        key, value, scores = self.tokens(1)
        query = self.normal(self.rows, GROUP * len(self.rules), 1, DIM)
        ringed, plain = self.layers
        for layer in self.layers:
            layer.update(key, value)
        with self.plainly():
            plain.commit(Chunk(1), scores)
        found = None
        if ringed.can_step_in_ring(query, scored=self.rules.selects):
            found = ringed.step_in_ring(query, SCORES, None if scores is None else scores[:, :, 0], backend)
            assert found is not None or ringed._repeated  # again and again, which rings do not follow
        else:  # drafts under gates
            assert ringed.record_past
            assert self.rules.selects
        if found is None:
            with self.plainly():
                ringed.commit(Chunk(1), scores)
            return
        held = plain.blocks_held()
        lengths = held.lengths
        wanted = REFERENCE.decode(
            query[:, :, 0],
            cache=held.view(),
            lengths=torch.from_numpy(lengths),
            rules=as_tensors(self.rules),
            scores=SCORES,
            with_lse=True,
        )
        assert wanted[1] is not None
        if self.rules.selects:
            selected = held.view_selected(), self.rules.selected(lengths)
            wanted = merged((wanted[0], wanted[1]), attend_selected(query[:, :, 0], *selected, self.rules, SCORES))
        assert (found[:, 0] - wanted[0]).abs().max() < 1e-4

    def compare(self) -> None:
        """Compares what the two hold."""
        compare(*self.layers)


def compare(*layers: PlanCacheLayer) -> None:
    """Compares what a layer that stepped in rings holds with what the other does; of what is shared it may have copies."""
    ringed, plain = (layer.blocks_held() for layer in layers)
    assert np.array_equal(ringed.lengths, plain.lengths)
    assert np.array_equal(ringed.runs, plain.runs)
    assert np.array_equal(ringed.left, plain.left)
    if ringed.pool.shared:
        assert ringed.used_bytes >= plain.used_bytes
    else:
        assert ringed.used_bytes == plain.used_bytes
        assert ringed.pool.used == plain.pool.used
    for table, other in zip(ringed.tables, plain.tables, strict=True):
        assert np.array_equal(np.argwhere(table.ids >= 0), np.argwhere(other.ids >= 0))
    for held in zip(*(tokens_of(layer) for layer in (ringed, plain)), strict=True):
        for ours, theirs in zip(*held, strict=True):
            assert torch.equal(ours, theirs)


def tokens_of(held: Any) -> Iterator[list[torch.Tensor]]:
    """Yields keys, values and scores of the tokens that a layer holds, by row, KV head and where they are."""
    selected = held.rules.selected(held.lengths)
    for row, head in np.ndindex(*selected.shape):
        positions = np.concatenate([np.arange(begin * BLOCK, end * BLOCK) for begin, end in held.runs[:, :, row, head]])
        places = np.arange(selected[row, head])
        for table, numbers in ((held.table, positions[positions < held.lengths[row]]), (held.selected, places)):
            if table is None or not len(numbers):
                continue
            slots = table.slots(row, head, numbers)
            ids, at = torch.from_numpy(slots // BLOCK), torch.from_numpy(slots % BLOCK)
            parts = held.pool.layout.kinds[held.pool.layout.of_head[head]]
            found = [
                read_tokens(memory, part, ids[None, None], at)
                for memory, part in zip((held.pool.keys, held.pool.values), parts, strict=True)
            ]
            assert all(each is not None and not each.isnan().any() for each in found)
            scored = held.rules.selecting[head]
            yield [*found, *([held.pool.read_scores(slots)] if scored else [])]  # type: ignore[list-item]


RULE = st.builds(
    Rule,
    st.sampled_from((0, 4, 16, 64)),
    st.sampled_from((0, 7, 20, 40)),
    st.sampled_from((0, 0, 100, 700, 1024)),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(sorted(FORMATS)),
)
GATE = st.sampled_from(((0, 0), (9, 0), (3, 300)))
"""How many tokens a KV head selects."""
OPERATION = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 20)),
    st.tuples(st.just("step"), st.integers(1, 20)),
    st.tuples(st.sampled_from(("chunk", "draft", "read", "fork", "repeat")), st.integers(1, 40)),
)


@pytest.mark.parametrize("examples", [2, pytest.param(40, marks=pytest.mark.heavy)])
def test_rings_hold_what_tables_hold(examples: int, device: str, triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rules, gates, lengths and padding; between steps chunks, drafts that are rolled back, forks, repeated rows."""
    monkeypatch.setattr(ring, "AHEAD", 24)  # rings are full soon, and are made anew

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=[Phase.generate],  # what is smaller takes as long to find again
    )
    @given(
        st.lists(RULE, min_size=1, max_size=3),
        st.lists(GATE, min_size=3, max_size=3),
        st.sampled_from((None, None, 30)),
        st.tuples(st.integers(1, 2), st.integers(1, 90), st.integers(0, 9)),
        st.sampled_from((None, 200)),
        st.lists(OPERATION, min_size=1, max_size=4),
        st.integers(0, 99),
    )
    def check(
        rules: list[Rule],
        gates: list[tuple[int, int]],
        native: int | None,
        sizes: tuple[int, int, int],
        reserve: int | None,
        operations: list[tuple[str, int]],
        seed: int,
    ) -> None:
        if native is None:
            rules = [
                replace(rule, select_alpha=alpha, select_beta_q=beta_q)
                for rule, (alpha, beta_q) in zip(rules, gates, strict=False)
            ]
        table = RuleTable.of(rules, MIN_WINDOW, native)
        drafts = any(name == "draft" for name, _ in operations) and not table.selects
        pair = Pair(table, sizes[0], seed, reserve, drafts, device)
        pair.chunk(sizes[1], min(sizes[2], sizes[1] - 1))
        others = []
        for name, count in operations:
            if name == "step":
                for _ in range(count):
                    pair.step(triton)
            elif name == "chunk":
                pair.chunk(count)
            elif name == "draft":
                if table.selects:  # what was selected before is remembered from now on, and rings are left
                    for layer in pair.layers:
                        layer.activate_past_recording()
                    pair.chunk(count)
                for layer in pair.layers:
                    layer.roll_back(np.full(pair.rows, min(count, int(layer.lengths.min()))), count)
            elif name == "fork":
                others.append([layer.fork() for layer in pair.layers])
            elif name == "repeat":
                for layer in pair.layers:
                    layer.select(np.arange(pair.rows).repeat(2)[:3])
                pair.rows = min(2 * pair.rows, 3)
            pair.compare()
        pools = [layer.blocks_held().pool for layer in pair.layers]
        for forked in others:
            compare(*forked)
        for layer in (*itertools.chain(*others), *pair.layers):
            layer.reset()
        assert not any(pool.used for pool in pools)

    check()


@pytest.mark.parametrize("padding", [(0, 11), pytest.param(tuple(range(16)), marks=pytest.mark.heavy)], ids=str)
def test_blocks_are_written_over_in_their_turn(padding: tuple[int, ...], device: str, triton: Any) -> None:
    """From every place in a block: a window of a few blocks, until its ring has come round."""
    pair = Pair(RuleTable.of([Rule(4, 20, 0, "int8", "int4", 9)], MIN_WINDOW), len(padding), 0, device=device)
    pair.chunk(56, *padding)
    for _ in range(26):
        pair.step(triton)
    held = pair.layers[0]._held
    assert held is not None
    assert held.table.ids.shape[-1] < 8  # of 6 blocks
    pair.compare()


@pytest.mark.parametrize("select", [pytest.param(0, marks=pytest.mark.heavy), 9])
def test_blocks_that_are_shared_are_copied_where_they_would_be_written_over(
    select: int, device: str, triton: Any
) -> None:
    """The fork keeps what it had; sinks, and windows that never end, stay shared."""
    rules = [Rule(20, 20, 0, select_alpha=select), Rule.FULL]
    pair = Pair(RuleTable.of(rules, MIN_WINDOW), 1, 0, device=device)
    pair.chunk(120)
    forks = [layer.fork() for layer in pair.layers]
    for _ in range(40):
        pair.step(triton)
    pair.compare()
    compare(*forks)
    ours, theirs = (layer.blocks_held() for layer in (pair.layers[0], forks[0]))
    alike = [np.intersect1d(*(each.table.ids[0, head] for each in (ours, theirs))) for head in (0, 1)]
    assert [int((ids >= 0).sum()) for ids in alike] == [2, 7]  # blocks of the sinks, and whole ones of all tokens
    for layer in (*pair.layers, *forks):
        layer.reset()
    assert ours.pool.used == 0


def test_beams_stay_in_block_tables(device: str, triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are repeated after every step would be copied for one step each."""
    pair = Pair(RuleTable.of([Rule(4, 20, 0)], MIN_WINDOW), 2, 0, device=device)
    pair.chunk(50)
    pair.step(triton)
    assert pair.layers[0].ring is not None
    for rows in ([0, 0], [1, 1]):
        for layer in pair.layers:
            layer.select(np.array(rows))
        pair.step(triton)
        assert pair.layers[0].ring is None
    monkeypatch.setattr(layer_cache, "ring_for", None)  # not asked again soon: it takes the host longer than a step
    pair.step(triton)
    pair.compare()


def test_a_row_without_tokens_has_no_rings(triton: Any) -> None:
    """As a slot of a server that waits: none are made, to be left at once."""
    rules = RuleTable.of([Rule(4, 20, 0)], MIN_WINDOW)
    layer, real = PlanCacheLayer(rules, 400), np.array([[False] * 30, [True] * 30])
    key = torch.randn(2, 1, 30, DIM)
    layer.update(key, key)
    with patch.object(pool, "backend_for", lambda _: REFERENCE):
        layer.commit(Chunk(30, real))
    used = layer.blocks
    layer.update(key[:, :, :1], key[:, :, :1])
    query = torch.randn(2, GROUP, 1, DIM)
    assert layer.step_in_ring(query, SCORES, None, triton, np.array([False, True])) is None
    assert (layer.ring, layer.blocks) == (None, used)
    assert layer.step_in_ring(query, SCORES, None, triton, np.array([True, True])) is not None
    assert layer.ring is not None


def test_blocks_that_wait_are_given_back(device: str, triton: Any) -> None:
    rules = RuleTable.of([Rule(4, 0, 1024), Rule(4, 20, 0, select_alpha=9)], MIN_WINDOW)
    pair = Pair(rules, 1, 0, reserve=400, device=device)
    with torch.inference_mode():  # rings go on outside of it
        pair.chunk(50)
        pair.step(triton)
    layer = pair.layers[0]
    pool = layer._held.pool  # type: ignore[union-attr]
    waiting = pool.used
    assert waiting > layer.blocks
    pair.step(triton)
    assert pool.used == waiting
    pair.compare()
    layer.reset()
    assert pool.used == 0

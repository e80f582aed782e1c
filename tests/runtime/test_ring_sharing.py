"""Steps in rings of layers that share attention, and of rows that are fed padding, beside those by block tables."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.kernels.arguments import Scores, as_tensors
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.kv_parts import read_tokens
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.share import Share, served, value_sets_of, with_shared_rules
from moacompress.rules.windows import BLOCK
from moacompress.runtime import PlanCache
from moacompress.runtime.cache import ring
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.cache.reuse_layer import ReuseCacheLayer
from moacompress.runtime.sharing.shared_keys import SharedKeys
from tests.plan_kinds import windows, with_shares
from tests.runtime.forwards import difference, in_parts, logits, plan_of

DIM, GROUP, MIN_WINDOW = 16, 2, 16
FORMATS = ("native", "int8", "int4")


class Layers:
    """An anchor and the layers that share its attention, with caches.

    Args:
        rules: of all layers, `rules[layer][kv_head]`; the first is the anchor.
        shares: of all layers.
        scores: how scores are made, of the anchor.
        rows: of the cache.
    """

    def __init__(
        self, rules: Any, shares: tuple[Share | None, ...], scores: Scores, rows: int, reserve: int | None = None
    ) -> None:
        self.tables = [RuleTable.of(row, MIN_WINDOW) for row in rules]
        self.shares, self.scores, self.rows, heads = shares, scores, rows, len(rules[0])
        beside = tuple(
            tuple(int(self.tables[layer].format_codes[1, head]) for layer, head in each)
            for each in served(shares, 0, heads)
        )
        self.anchor = PlanCacheLayer(self.tables[0], reserve, beside)
        self.reuse = []
        for layer, share in enumerate(shares):
            if share is not None:
                self.reuse.append(ReuseCacheLayer(share, value_sets_of(shares, layer), layer == len(shares) - 1))
                self.reuse[-1].anchor = self.anchor

    def taken(self, query: Any, key: Any, share: Share) -> SharedKeys:
        return SharedKeys(query, key, self.scores.sink_logits).taken(share)

    def chunk(self, key: Any, values: list[Any], chunk: Chunk) -> None:
        self.anchor.update(key, values[0])
        self.anchor.commit(chunk)
        for layer, value in zip(self.reuse, values[1:], strict=True):
            layer.update(value, value)
            layer.commit(chunk)

    def step(self, query: Any, key: Any, values: list[Any], real: Any, backend: Any) -> list[Any]:
        """Returns what is attended to in rings, of all layers, `[rows, heads, dim]` each."""
        self.anchor.update(key, values[0])
        found: list[Any] = [self.anchor.step_in_ring(query, self.scores, None, backend, real)]
        for layer, value in zip(self.reuse, values[1:], strict=True):
            layer.update(value, value)
            assert layer.can_step_in_ring
            logits = self.taken(query, key, layer.share).sink_logits
            found.append(layer.step_in_ring(self.scores._replace(sink_logits=logits)))
        return [each[:, 0] for each in found]

    def step_by_tables(self, query: Any, key: Any, values: list[Any], real: Any) -> list[Any]:
        self.chunk(key, values, Chunk(1, None if real is None else real[:, None]))
        found = []
        layers: list[Any] = [self.anchor, *self.reuse]
        for layer, table in zip(layers, self.tables, strict=True):
            asked = SharedKeys(query, key, self.scores.sink_logits)
            if isinstance(layer, ReuseCacheLayer):
                asked = self.taken(query, key, layer.share)
            out, _ = REFERENCE.decode(
                asked.query[:, :, 0],
                cache=layer.view(),
                lengths=torch.from_numpy(self.anchor.lengths),
                rules=as_tensors(table),
                scores=self.scores._replace(sink_logits=asked.sink_logits),
            )
            found.append(out)
        return found

    def held(self) -> list[Any]:
        """Returns the values beside the blocks' own, by layer, row and KV head."""
        blocks, found = self.anchor.blocks_held(), []
        for layer in self.reuse:
            for row, head in np.ndindex(self.rows, len(layer.share.head_map)):
                of, value_set = layer.share.head_map[head], layer.value_sets[head]
                part = blocks.pool.layout.shared_values[blocks.pool.layout.of_head[of]][value_set]
                parts = [np.arange(begin * BLOCK, end * BLOCK) for begin, end in blocks.runs[:, :, row, of]]
                positions = np.concatenate(parts)
                slots = blocks.table.slots(row, of, positions[positions < blocks.lengths[row]])
                ids, at = torch.from_numpy(slots // BLOCK), torch.from_numpy(slots % BLOCK)
                found.append(read_tokens(blocks.pool.shared_values_of(value_set), part, ids[None, None], at))
        return found


def drawn(seed: int, device: str = "cpu") -> tuple[Any, tuple[Share | None, ...], Scores]:
    """Returns rules, shares and scores of an anchor and one or two layers that share its attention."""
    draw = random.Random(seed)
    heads, layers = draw.choice((1, 2)), draw.choice((2, 3))

    def formats() -> Any:
        return {name: draw.choice(FORMATS) for name in ("key_format", "value_format")}

    def rule() -> Rule:
        return Rule(draw.choice((0, 4, 16)), draw.choice((0, 7, 20)), draw.choice((0, 100, 1024)), **formats())

    rules = [[rule() for _ in range(heads)] for _ in range(layers)]
    shares = (None, *(Share(0, tuple(draw.choices(range(heads), k=heads))) for _ in range(layers - 1)))
    logits = torch.randn(heads * GROUP).to(device) if seed % 2 else None
    return with_shared_rules(rules, shares), shares, Scores(DIM**-0.5, draw.choice((0.0, 2.0)), logits)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(30) if seed != 1)])
def test_rings_do_as_tables_do(seed: int, device: str, triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a row is fed padding, and where a chunk comes in between."""
    monkeypatch.setattr(ring, "AHEAD", 12)
    torch.manual_seed(seed)
    rules, shares, scores = drawn(seed, device)
    rows, heads = 2, len(rules[0])
    both = [Layers(rules, shares, scores, rows) for _ in range(2)]

    def tokens(count: int) -> tuple[Any, list[Any]]:
        key, *values = (torch.randn(rows, heads, count, DIM).to(device) for _ in range(1 + len(rules)))
        return key, values

    for count in (40, 5):
        real = np.ones((rows, count), np.bool_)
        real[0, : count // 2] = False
        key, values = tokens(count)
        for each in both:
            each.chunk(key, values, Chunk(count, real))
        for number in range(3):
            (key, values), query = tokens(1), torch.randn(rows, heads * GROUP, 1, DIM).to(device)
            given = np.array([True, False]) if number == 1 else None
            found = both[0].step(query, key, values, given, triton)
            wanted = both[1].step_by_tables(query, key, values, given)
            for ours, theirs in zip(found, wanted, strict=True):
                assert (ours - theirs).abs().max() < 1e-4
        ours, theirs = (each.anchor.blocks_held() for each in both)
        assert np.array_equal(ours.lengths, theirs.lengths)
        assert np.array_equal(ours.runs, theirs.runs)
        for held, other in zip(*(each.held() for each in both), strict=True):
            assert torch.equal(held, other)


@pytest.mark.parametrize("left", [False, True], ids=["", "left in between"])
def test_a_models_steps(left: bool, triton: Any, model: Callable[..., Any], token_ids: Any) -> None:
    """All layers go into rings; where somebody asks what an anchor holds in the midst of a step, the others use tables."""
    made, ids = model(plan=lambda made: with_shares(windows(made), (None, Share(0, (1, 0)), None))), token_ids(1, 43)
    cache = PlanCache(plan_of(made))
    if left:
        made.model.layers[1].register_forward_pre_hook(lambda *given: cache.layers[0].used_bytes and None)
    found = in_parts(made, ids, [40], cache)[:, 40:]
    assert difference(found, logits(made, ids, use_cache=False)[:, 40:]) < 2e-5
    assert cache.step_routes == ({"ring step": 6, "cache step": 3} if left else {"ring step": 9})

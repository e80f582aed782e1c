"""Rows join a batch that is being decoded: each goes on as it would alone, and memory is that of the rows that are left."""

import copy

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels import dispatch as kernels
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share
from moacompress.runtime import attach
from moacompress.runtime.cache.plan_cache import PlanCache
from tests import plan_kinds


def shares(model):
    plan = plan_kinds.windows(model)
    return plan_kinds.with_shares(plan, (None, None, Share(1, tuple(range(plan.model.kv_heads)))))


def decode(model, cache, rows):
    """One step of every row, which is a dict of its `ids`, tokens so `far`, and the `logits` that it adds to."""
    fed = torch.stack([row["ids"][row["far"]] for row in rows])[:, None]
    positions = torch.tensor([[row["far"]] for row in rows])
    for row, logits in zip(rows, model(fed, position_ids=positions, cache=cache).logits[:, -1], strict=True):
        row["far"] += 1
        row["logits"].append(logits)


def prefill(model, cache, row):
    positions = torch.arange(row["far"])[None]
    row["logits"].append(model(row["ids"][None, : row["far"]], position_ids=positions, cache=cache).logits[0, -1])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", [plan_kinds.windows, plan_kinds.formats, plan_kinds.gates, shares])
def test_rows_go_on_as_they_would_alone(kind, family, tiny_model, token_ids):
    if (family, kind) == ("gemma3_text", shares):
        pytest.skip("its layers have different sliding windows")
    model = tiny_model(family)
    plan = kind(model)
    attach(model, plan)
    ids = token_ids(4, 130)
    rows = [{"ids": ids[number], "far": far, "logits": []} for number, far in enumerate((40, 71, 20, 90))]
    alone = copy.deepcopy(rows)
    with torch.no_grad():
        for row, steps in zip(alone, (5, 15, 20, 10), strict=True):
            cache = PlanCache(plan)
            prefill(model, cache, row)
            for _ in range(steps):
                decode(model, cache, [row])

        running = PlanCache(plan)
        prefill(model, running, rows[0])
        there = [rows[0]]
        for number, row in enumerate(rows[1:], start=1):
            joins = running.beside()
            prefill(model, joins, row)
            running.join(joins)
            there.append(row)
            assert (joins.get_seq_length(), joins.batch_size, running.batch_size) == (0, -1, len(there))
            for _ in range(5):
                decode(model, running, there)
            if number == 1:  # the first row is done
                del there[0]
                running.batch_select_indices(torch.tensor([1]))
            assert running.used_bytes() == sum(plan.kv_bytes(one["far"]) for one in there)
    assert running.get_seq_length() == max(row["far"] for row in there)
    if (kind, family) == (plan_kinds.windows, "llama") and kernels.chosen().name == "cpu":
        assert running.step_routes["all layers"] == plan.model.layers * 15  # padding costs no step its route
    rows[0]["logits"], alone[0]["logits"] = (one["logits"][:6] for one in (rows[0], alone[0]))
    for row, wanted in zip(rows, alone, strict=True):
        count = len(row["logits"])
        assert count >= 6
        ours, theirs = torch.stack(row["logits"]), torch.stack(wanted["logits"][:count])
        # a code that flips by one step moves logits of such a model by some hundredths
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1 if kind is plan_kinds.formats else 2e-4)


def test_blocks_of_rows_that_left_are_used_again(tiny_model, token_ids):
    model = tiny_model()
    plan = plan_kinds.windows(model)
    attach(model, plan)
    running, ids = PlanCache(plan), token_ids(1, 60)
    with torch.no_grad():
        model(ids, cache=running)
        sizes = set()
        for _ in range(6):
            joins = running.beside()
            model(ids, cache=joins)
            running.join(joins)
            running.batch_select_indices(torch.tensor([1]))
            sizes.add(running.kv_bytes())
            assert running.used_bytes() == plan.kv_bytes(60)
    assert len(sizes) == 1
    assert running.get_seq_length() == 60


def test_only_rows_in_the_same_memory_join(tiny_model, token_ids):
    model = tiny_model()
    plan = plan_kinds.windows(model)
    attach(model, plan)
    running, other, ids = PlanCache(plan), PlanCache(plan), token_ids(2, 30)
    with torch.no_grad():
        model(ids, cache=running)
        model(ids, cache=other)
    for one in (other, running.beside(), PlanCache(Plan.full(plan.model))):
        with pytest.raises(UnsupportedError, match="rows join a cache from one that was made by its `beside`"):
            running.join(one)
    assert (running.batch_size, other.batch_size) == (2, 2)
    running.activate_past_recording()
    joins = running.beside()
    with torch.no_grad():
        model(ids, cache=joins)
    with pytest.raises(UnsupportedError, match="beside"):
        running.join(joins)

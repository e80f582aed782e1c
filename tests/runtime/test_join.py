"""Rows join a batch that is being decoded: memory is that of the rows that are left; test_property.py has what they say."""

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels import dispatch as kernels
from moacompress.rules.plan import Plan
from moacompress.runtime.cache.plan_cache import PlanCache
from tests.runtime.forwards import plan_of


@pytest.fixture
def model(model):
    return model()


def test_blocks_of_rows_that_left_are_used_again(model, token_ids):
    plan = plan_of(model)
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
        joins = running.beside()
        model(ids[:, :20], cache=joins)
        running.join(joins)
        assert (joins.get_seq_length(), joins.batch_size, running.batch_size) == (0, -1, 2)
        model(ids[:, :1].expand(2, 1), position_ids=torch.tensor([[60], [20]]), cache=running)
    assert running.used_bytes() == plan.kv_bytes(61) + plan.kv_bytes(21)
    if kernels.chosen().name == "cpu":
        assert running.step_routes == {"all layers": plan.model.layers}  # padding costs no step its route


def test_only_rows_in_the_same_memory_join(model, token_ids):
    plan = plan_of(model)
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

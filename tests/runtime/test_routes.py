"""Which route a forward goes by: the first in the list that can, said once, and counted by the cache."""

from __future__ import annotations

import logging

import pytest

from moacompress.runtime import PlanCache
from moacompress.runtime.decode import all_layers, fused, routes
from moacompress.runtime.decode.step_requests import AttendRequest
from tests.runtime.forwards import difference, in_parts, plan_of

LAYERS = 3
WITHOUT = {
    "all layers": lambda patch: None,
    "one layer": lambda patch: patch.setattr(all_layers.Stack, "begin", lambda *nothing: None),
    "cache step": lambda patch: patch.setattr(fused, "_layer", lambda *nothing: None),
    "plain": lambda patch: patch.setattr(routes.CacheStep, "can", lambda *nothing: False),
}
"""What takes away the routes before one."""


@pytest.fixture
def fed(model, token_ids):
    """Returns a function that feeds a prompt and some steps to a tiny Llama; it returns logits and the cache."""
    made = model("llama", num_hidden_layers=LAYERS)

    def run(steps=20):
        cache = PlanCache(plan_of(made))
        return in_parts(made, token_ids(2, 50 + steps), [50], cache)[:, 50:], cache

    return run


def test_all_are_in_the_list():
    names = [route.name for route in routes.ROUTES]
    assert [name for name in names if name != "ring step"] == [*WITHOUT]
    assert names.index("ring step") == names.index("cache step") - 1


@pytest.mark.usefixtures("compiled_kernels")
def test_each_is_taken_where_those_before_it_cannot(fed, monkeypatch):
    expected, _ = fed()
    for name, without in WITHOUT.items():
        without(monkeypatch)
        found, cache = fed()
        assert cache.step_routes == {name: 20 * LAYERS}  # a prompt is no step
        assert difference(found, expected) < 2e-5


def test_it_is_said_once(fed, monkeypatch, caplog):
    monkeypatch.setattr(routes, "_said", set())
    with caplog.at_level(logging.INFO, logger=routes.logger.name):
        _, cache = fed()
        fed()
    (name,) = cache.step_routes
    assert [record.getMessage() for record in caplog.records] == [f"decode steps go by the route: {name}"]


def test_one_more_route_is_one_in_the_list(fed, monkeypatch):
    """Before the others it takes what it can, and what it cannot after all continues by the next."""
    seen = []

    class Watching(routes.Route[AttendRequest]):
        name, takes = "watching", AttendRequest

        def can(self, request):
            return request.tokens == 1

        def run(self, request):
            seen.append(request.context.layer)
            return routes.CacheStep().run(request) if request.context.layer else None

    monkeypatch.setattr(routes, "ROUTES", (Watching(), *routes.ROUTES))
    monkeypatch.setattr(all_layers.Stack, "begin", lambda *nothing: None)
    monkeypatch.setattr(fused, "_layer", lambda *nothing: None)
    _, cache = fed(steps=4)
    assert seen == [*range(LAYERS)] * 4
    assert cache.step_routes["watching"] == 4 * (LAYERS - 1)
    assert cache.step_routes.total() == 4 * LAYERS

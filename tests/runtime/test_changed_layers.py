"""Layers that are removed, reordered or run in part after a plan was put on a model: refused in every route."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moacompress.core.errors import UnsupportedError
from moacompress.models.source import model_shape
from moacompress.runtime import attach, detach
from moacompress.runtime.decode import all_layers
from tests.runtime.forwards import difference, in_parts, logits


def taken_out_and_numbered(model: Any) -> None:
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[2], layers[0]])
    model.config.num_hidden_layers = 2
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number


def in_place(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def attention_swapped(model: Any) -> None:
    one, other = model.model.layers[0], model.model.layers[1]
    one.self_attn, other.self_attn = other.self_attn, one.self_attn


def repeated(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[2]))
    model.config.num_hidden_layers = 4


def fewer_run(model: Any) -> None:
    model.config.num_hidden_layers = 2


def numbered_otherwise(model: Any) -> None:
    model.model.layers[1].self_attn.layer_idx = 2


CHANGES = [taken_out_and_numbered, in_place, attention_swapped, repeated, fewer_run, numbered_otherwise]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_layers_are_refused_in_every_route(
    change: Callable[[Any], None], model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, ids = model(), token_ids(2, 60)
    with torch.no_grad():
        fused, single = (made(ids[:, :50]).cache for _ in range(2))
        for cache in (fused, single):
            made(ids[:, 50:51], cache=cache)
        change(made)
        refusals = []
        for given in ({"use_cache": False}, {}, {"cache": fused}):
            with pytest.raises(UnsupportedError, match=r"moacompress.detach\(model\)") as refused:
                made(ids[:, :1] if "cache" in given else ids, **given)
            refusals.append(str(refused.value))
        monkeypatch.setattr(all_layers.Stack, "begin", lambda *nothing: None)
        with pytest.raises(UnsupportedError, match=r"moacompress.detach\(model\)"):
            made(ids[:, :1], cache=single)
    assert all(text.count(". ") == 0 for text in refusals)


@pytest.mark.usefixtures("fresh_dynamo")
def test_changed_layers_are_refused_compiled(model: Any, token_ids: Any) -> None:
    made, ids = model(), token_ids(2, 60)
    step = torch.compile(made, backend="eager")
    with torch.no_grad():
        expected = made(ids, use_cache=False).logits
        assert (step(ids, use_cache=False).logits - expected).abs().max() < 1e-4
        in_place(made)
        with pytest.raises(UnsupportedError, match=r"moacompress.detach\(model\)"):
            step(ids, use_cache=False)


def test_layers_changed_back_and_copies_run(model: Any, token_ids: Any, steps: Any) -> None:
    made, ids = model(), token_ids(2, 60)
    expected = steps(made, 2, 10)
    in_place(made)
    with pytest.raises(UnsupportedError):
        made(ids)
    in_place(made)
    assert torch.equal(steps(made, 2, 10), expected)
    assert torch.equal(steps(copy.deepcopy(made), 2, 10), expected)
    made.model.layers[1] = copy.deepcopy(made.model.layers[1])
    assert torch.equal(steps(made, 2, 10), expected)


def test_a_plan_for_what_the_layers_are_then(model: Any, random_plan: Any, token_ids: Any) -> None:
    made, ids = detach(model()), token_ids(2, 60)
    taken_out_and_numbered(made)
    attach(made, random_plan(model_shape(made), 4))
    assert difference(in_parts(made, ids, [50])[:, 50:], logits(made, ids, use_cache=False)[:, 50:]) < 2e-5


def test_early_exits_of_drafts_are_refused(model: Any, token_ids: Any) -> None:
    made, ids = model(), token_ids(1, 20)
    with pytest.raises(UnsupportedError, match="assistant_early_exit=2 is not supported"):
        made.generate(ids, assistant_early_exit=2, max_new_tokens=4)
    assert made.config.num_hidden_layers == 3
    assert made.generate(ids, max_new_tokens=4, do_sample=False, min_new_tokens=4).shape == (1, 24)

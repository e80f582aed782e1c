"""The formulas of benchmarks/scale.py against counted runs of a tiny model, and the table of docs/scale.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.estimate.live_bytes import weight_bytes
from moacompress.models.source import model_shape
from moacompress.recipe import Recipe
from moacompress.rules.candidates import candidate_rules
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.compat.alternates import returned_cache

ROOT = Path(__file__).resolve().parent.parent
LENGTH, TARGETS = 192, 7
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


@pytest.fixture(scope="module")
def scale(load_script: Callable[[Path], Any]) -> Any:
    return load_script(ROOT / "benchmarks" / "scale.py")


@pytest.fixture
def shape(scale: Any) -> Any:
    return scale.Shape("tiny", 3, 64, 4, 2, 16, 96, 160)


class Products(TorchDispatchMode):
    """Counts the operations of products of matrices outside attention, which is an operator of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry and str(packet).rpartition(".")[2] in PRODUCTS:
            self.count += flop_registry[packet](*args, **(kwargs or {}), out_val=found)
        return found


def test_weights_and_cache(shape: Any, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model: Any = tiny_model("llama")
    assert shape.parameters == model.num_parameters()
    assert abs(weight_bytes(model) - 4 * shape.parameters) < 1000  # rotary frequencies
    with torch.no_grad():
        cache = returned_cache(model(input_ids=torch.full((1, LENGTH), 5), use_cache=True))
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert stored == shape.kv_bytes(LENGTH) * 4 // 2  # in float32


def test_forward(shape: Any, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model: Any = tiny_model("llama", attn_implementation="eager")
    with Products() as counter, torch.no_grad():
        model(input_ids=torch.full((1, LENGTH), 5), logits_to_keep=TARGETS, use_cache=False)
    # plain attention computes hidden scores too: all pairs where half of them, and the diagonal, count
    hidden = 2 * shape.attended(LENGTH) * (2 * LENGTH / (LENGTH + 1) - 1)
    assert counter.count == pytest.approx(shape.forward(LENGTH, TARGETS) + hidden, rel=0.01)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("draws", [1, 3])
def test_sample(
    shape: Any,
    tiny_model: Callable[..., PreTrainedModel],
    scale: Any,
    draws: int,
    twice: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    if twice:
        monkeypatch.setattr(passes, "KEEP_TOKENS", LENGTH - 1)
        monkeypatch.setattr(scale, "KEEP_TOKENS", LENGTH - 1)
    recipe = Recipe().override(profile__draws=draws)
    table = RuleTable.of(candidate_rules(LENGTH, recipe.profile.sinks, recipe.profile.min_window), 32)
    ids = np.random.default_rng(0).integers(3, 150, LENGTH)
    sample = Sample(ids, np.arange(LENGTH) >= LENGTH - TARGETS, "random", LENGTH)
    with Products() as counter:
        found = sample_statistics(model, model_shape(model), table, sample, recipe.profile, None, 0, 0)
    attention = (2 + draws * (5 + 2 * twice)) * shape.attended(LENGTH)
    expected = shape.sample(LENGTH, TARGETS, draws, len(recipe.profile.formats)) - attention
    assert counter.count == pytest.approx(expected, rel=0.005)
    assert sum(array.nbytes for array in found.arrays.values()) == shape.statistics_bytes(len(table), recipe)


def test_the_models_are_as_large_as_they_are_called(scale: Any) -> None:
    for shape, parameters in zip(scale.MODELS, (1.24e9, 8.03e9, 70.6e9, 405.9e9), strict=True):
        assert shape.parameters == pytest.approx(parameters, rel=0.005), shape.name


def test_the_table_is_in_the_docs(scale: Any) -> None:
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    assert scale.table(scale.rules_of(scale.RECIPE)) in page
    hours = scale.table(10, 1000.0).splitlines()[2].split(" | ")[1]
    flops, _, rest = hours.partition(" (")
    assert float(rest.removesuffix(" h)")) == pytest.approx(float(flops) * 1e15 / 1e15 / 3600, rel=0.06)

"""Copies of an earlier layer's attention: the tiled sums against dense float64 attention and autograd through models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.influence import attend, attend_backward
from moacompress.calibration.profile.profiler import profile
from moacompress.calibration.profile.sample_statistics import FisherCotangent, cotangent_generator, sample_statistics
from moacompress.calibration.profile.sharing import Attended, CopySums, best_head_map, copy_influence, copyable
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.tiles import AttentionSpec
from moacompress.core.errors import UsageError
from moacompress.models.source import SourceModel, model_shape
from moacompress.recipe import Recipe
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests import oracle
from tests.calibration.conftest import random_sample

Factory = Callable[..., PreTrainedModel]
MIN_WINDOW = 16
TABLE = RuleTable.of((Rule.FULL, Rule(4, 16, 0)), MIN_WINDOW)
CHOSEN = ProfileRecipe(draws=2, anchors=2)
NAMES = ("copy_squares", "copy_cosine")
ONE = [True]


def probabilities_of(query: Tensor, key: Tensor, spec: AttentionSpec, sink: Tensor | None) -> Tensor:
    """Whole matrices by the book, `[kv_heads, group, n, n]`."""
    (kv_heads, n), found = key.shape[1:3], []
    mask = oracle.visible(Rule.FULL, n, MIN_WINDOW, spec.native_window)
    for head in range(kv_heads):
        own = slice(head * query.shape[1] // kv_heads, (head + 1) * query.shape[1] // kv_heads)
        logits = None if sink is None else sink[own]
        found.append(oracle.weigh(query[0, own], key[0, head], mask, spec.scaling, spec.softcap, logits)[0])
    return torch.stack(found)


def grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    return tensor.view(kv_heads, -1, *tensor.shape[1:])


def cosines(own: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    """Mean cosine over rows and groups, `[kv_heads, other's kv_heads]`, from `[kv_heads, group, n, n]`."""
    pair = torch.nn.functional.cosine_similarity(
        own[:, None][..., rows, :], other[None][..., rows, :], dim=-1, eps=1e-300
    )
    return pair.mean((2, 3))


CASES: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 4, "float32": True},
    "gqa": {},
    "native window": {"native": 40},
    "softcap": {"softcap": 2.0},
    "learned sink": {"learned": True},
    "everything": {"native": 70, "softcap": 3.0, "learned": True},
    "everything in float32": {"native": 70, "softcap": 3.0, "learned": True, "float32": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sums_match_the_definition(case: dict[str, Any]) -> None:
    torch.manual_seed(3)
    dtype = torch.float32 if case.get("float32") else torch.float64
    n, heads, kv_heads, size = 170, 4, case.get("kv_heads", 2), 8
    # values away from zero: what all keys have in common must cancel
    queries, keys = torch.randn(2, 1, heads, n, size).double() * 2, torch.randn(2, 1, kv_heads, n, size).double()
    value, grads = torch.randn(1, kv_heads, n, size).double() + 3, torch.randn(2, 1, heads, n, size).double()
    sinks = [torch.randn(heads).double() + 1 if case.get("learned") else None for _ in range(2)]
    spec = AttentionSpec(size**-0.5, case.get("native"), case.get("softcap"))
    alive = torch.arange(5, n)
    grads[:, :, :, :5] = 0

    other, own = (probabilities_of(queries[k], keys[k], spec, sinks[k]) for k in range(2))
    out = own @ value[0][:, None]
    copied = torch.einsum("mgij,hjd->hmgid", other, value[0])
    deltas = [((copied - out[:, None]) * grouped(grad[0], kv_heads)[:, None]).sum((2, 4)) for grad in grads]
    expected = {
        "copy_squares": torch.stack([d.square().sum(-1) for d in deltas]).mean(0),
        "copy_cosine": cosines(own, other, alive),
    }

    attended = {
        layer: Attended(queries[layer].to(dtype), keys[layer].to(dtype), None if sink is None else sink.to(dtype), spec)
        for layer, sink in enumerate(sinks)
    }
    sums, mine, value = CopySums(attended, 1, ONE, kv_heads), attended[1], value.to(dtype)
    found_out = attend(mine.query, mine.key, value, spec, mine.sink_logit).double()
    assert torch.allclose(found_out, out.reshape(1, heads, n, size), atol=1e-4)
    for grad in grads:
        attend_backward(mine.query, mine.key, value, grad.to(dtype), spec, mine.sink_logit, TABLE, [sums])
        sums.end()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, found in sums.tensors().items():
        assert found.shape == (1, kv_heads, kv_heads)
        largest = float(expected[name].max())
        assert float((found[0] - expected[name]).abs().max()) < tolerance * largest, name


def test_which_layers_may_be_copied() -> None:
    found = copyable((None, None, 64, None, 64, 32), 2)
    assert found[:, 0].tolist() == [False, True, False, False, False, False]
    assert found[:, 1].tolist() == [False, False, False, True, True, False]
    assert copyable((None, None), 0).shape == (2, 0)
    assert copyable((None, 8), 5).shape == (2, 5)


class Reference:
    """Dense attention by the book that moves towards every copy by weights, which are 0: `[own, anchor, n]` each.

    The derivative of the loss by such a weight is `d_i` by definition.
    """

    def __init__(self, shape: ModelShape, anchors: int) -> None:
        self.shape, self.anchors = shape, anchors
        self.probabilities: list[Tensor] = []
        self.weights: dict[tuple[int, int], Tensor] = {}

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 0.25, **extra: Any
    ) -> tuple[Tensor, None]:
        """As transformers calls it."""
        layer, n, kv_heads = int(module.layer_idx), query.shape[2], key.shape[1]
        spec = AttentionSpec(scaling, self.shape.native_windows[layer], extra.get("softcap"))
        own = probabilities_of(query, key, spec, extra.get("s_aux"))
        self.probabilities.append(own)
        out = own @ value[0][:, None]
        for index in range(min(self.anchors, layer)):
            if self.shape.native_windows[layer - 1 - index] == spec.native_window:
                weights = torch.zeros(kv_heads, kv_heads, n, dtype=query.dtype, requires_grad=True)
                self.weights[layer, index] = weights
                copied = torch.einsum("mgij,hjd->hmgid", self.probabilities[layer - 1 - index], value[0])
                moved = torch.einsum("hmi,hmgid->hgid", weights, copied - out[:, None])
                out = out + moved - moved.detach()
        return out.flatten(0, 1)[None].transpose(1, 2), None


def defined(model: PreTrainedModel, sample: Sample, chosen: ProfileRecipe) -> dict[str, Tensor]:
    """Statistics of copies by autograd through the whole model, in its own dtype."""
    shape, n = model_shape(model), len(sample.input_ids)
    rows = torch.from_numpy(sample.target_rows)
    size = shape.layers, chosen.anchors, shape.kv_heads, shape.kv_heads
    found = {name: torch.zeros(size, dtype=torch.float64) for name in NAMES}
    reference = Reference(shape, chosen.anchors)
    with oracle.attends_by(model, reference.attend):
        logits = model(torch.from_numpy(sample.input_ids)[None], use_cache=False).logits[0, rows]
    for draw in range(chosen.draws):
        cotangent = FisherCotangent(len(rows), cotangent_generator(7, 0, draw))(logits.detach(), slice(None))
        pairs = list(reference.weights)
        deltas = torch.autograd.grad(logits, [reference.weights[pair] for pair in pairs], cotangent, retain_graph=True)
        for pair, delta in zip(pairs, deltas, strict=True):
            found["copy_squares"][pair] += delta.square().sum(-1) / chosen.draws
    for layer, index in reference.weights:
        alive = rows if layer == shape.layers - 1 else torch.arange(n - 1)
        own, other = (reference.probabilities[place].detach() for place in (layer, layer - 1 - index))
        found["copy_cosine"][layer, index] = cosines(own, other, alive)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss"])
def test_statistics_of_a_model_match_autograd(tiny_model: Factory, family: str) -> None:
    model = tiny_model(family, num_hidden_layers=3).double()
    model.set_experts_implementation("eager")  # grouped products of experts know no float64
    shape, sample = model_shape(model), random_sample(130)
    expected = defined(model, sample, CHOSEN)
    found = sample_statistics(model, shape, TABLE, sample, CHOSEN, 7, 0)
    may = copyable(shape.native_windows, 2)
    assert may.any()
    for name in NAMES:
        array = found.arrays[name]
        assert array.shape == (3, 2, 2, 2)
        assert not array[~may].any()
        assert (array[may] > 0).all()
        largest = expected[name].amax((-1, -2), keepdim=True).clamp_min(1e-30)
        assert float(((torch.from_numpy(array) - expected[name]).abs() / largest).max()) < 1e-5, name


def test_copies_change_nothing_else_and_long_samples_agree(
    tiny_model: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sample = tiny_model("llama", num_hidden_layers=4), random_sample(150)
    shape = model_shape(model)
    plain = sample_statistics(model, shape, TABLE, sample, ProfileRecipe(draws=2), 0, 0)
    found = sample_statistics(model, shape, TABLE, sample, CHOSEN, 0, 0)
    assert set(found.arrays) == {*plain.arrays, *NAMES}
    for name, array in plain.arrays.items():
        assert np.array_equal(found.arrays[name], array)
    monkeypatch.setattr(passes, "KEEP_TOKENS", 10)
    twice = sample_statistics(model, shape, TABLE, sample, CHOSEN, 0, 0)
    for name in NAMES:
        assert np.array_equal(twice.arrays[name], found.arrays[name])


@pytest.mark.parametrize("limit", [10, 1000])
def test_nothing_is_held_after_the_tape(tiny_model: Factory, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(passes, "KEEP_TOKENS", limit)
    model, ids, rows = tiny_model("llama"), torch.arange(3, 43), torch.tensor([38])
    recording = passes.Recording.of(model_shape(model), TABLE, keep=True)
    attended = recording.attended
    assert attended is not None
    held = []
    with passes.Tape(model, recording, ids, rows) as tape:
        assert sorted(attended) == [0, 1, 2]
        tape.backward(lambda logits, part: logits, [[]] * 3, last=True)
        assert not any(one.query.requires_grad or one.key.requires_grad for one in attended.values())
        held = [weakref.ref(tensor) for one in attended.values() for tensor in (one.query, one.key)]
        assert all(reference() is not None for reference in held)
    gc.collect()
    assert attended == {}
    assert not any(reference() is not None for reference in held)
    with pytest.raises(IndexError), passes.Tape(model, recording, ids, torch.tensor([99])):
        pass
    assert attended == {}


def test_what_a_copy_is_predicted_to_cost() -> None:
    squares = np.arange(24, dtype=np.float32).reshape(2, 3, 1, 2, 2)
    found = copy_influence(Statistics({"copy_squares": squares}))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, ((squares.astype(np.float64) / 2) ** 0.75).mean(0) ** (4 / 3))
    with pytest.raises(UsageError, match="no statistics of copies; profile again with --anchors"):
        copy_influence(Statistics({"squares": squares}))
    assert best_head_map(np.array([[3.0, 1.0, 2.0], [0.5, 4.0, 0.75], [9.0, 8.0, 7.0]])) == ((1, 0, 2), 8.5)


def test_a_profile_records_heads_and_copies(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [random_sample(length) for length in (128, 160)]
    data = "moacompress.calibration.data.sample_sources"
    monkeypatch.setattr(f"{data}.build_samples", lambda *given: samples if given[2] == "calibration" else samples[:1])
    monkeypatch.setattr(f"{data}.make_drafts", lambda *arguments: [])
    calibration = {"lengths": [128, 160], "samples": 2, "validation_samples": 1}
    recipe = Recipe.from_dict({"calibration": calibration, "profile": {"draws": 2, "heads": True, "anchors": 2}})
    made = profile(source, tmp_path / "p", recipe)
    table = RuleTable.of(made.rules, made.min_window)
    for index, sample in enumerate(samples):
        alone = sample_statistics(source.model, source.shape, table, sample, recipe.profile, 0, index)
        assert {"distance", "sink_mass", "entropy", *NAMES} <= alone.arrays.keys()
        for name, array in alone.arrays.items():
            assert np.array_equal(made.statistics.arrays[name][index], array), name

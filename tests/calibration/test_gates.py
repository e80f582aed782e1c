"""Gates: what they are fitted to, that they find it on samples they were not fitted to, and that a profile keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moacompress.calibration.collectors import TokenSums
from moacompress.calibration.gates import (
    FIRST,
    FLOOR,
    LAG,
    SHARES,
    Gates,
    attention_inputs,
    left_out,
    target,
    train_gates,
)
from moacompress.calibration.influence import AttentionSpec, attend_backward
from moacompress.calibration.profiler import profile, sample_statistics
from moacompress.calibration.samples import Sample
from moacompress.calibration.store import Profile
from moacompress.core.artefact_names import GATES_FILE
from moacompress.core.errors import DataError
from moacompress.models.modules import attention_modules
from moacompress.models.source import load_source, model_shape
from moacompress.recipe import ProfileRecipe, Recipe
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

Models = Callable[..., PreTrainedModel]
TABLE = RuleTable.of([Rule.FULL, Rule(4, 32, 0)], 32)


def made(seed: int, count: int = 6, n: int = 150) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(3, 150, n + 7 * i), np.arange(n + 7 * i) >= n - 10, "test", 600) for i in range(count)]


def test_what_hiding_single_tokens_moves_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    n, heads, kv_heads, dim, lag = 60, 4, 2, 8, 9
    query, grad = (torch.randn(1, heads, n, dim, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(1, kv_heads, n, dim, dtype=torch.float64) for _ in range(2))
    sums = TokenSums(kv_heads, n, lag)
    attend_backward(query, key, value, grad, AttentionSpec(dim**-0.5), None, TABLE, [sums])
    expected = torch.zeros(kv_heads, n, dtype=torch.float64)
    for i in range(n):
        for h in range(kv_heads):
            moved = torch.zeros(i + 1, dtype=torch.float64)
            for g in range(heads // kv_heads):
                at = h * heads // kv_heads + g
                p = (key[0, h, : i + 1] @ query[0, at, i] * dim**-0.5).softmax(0)
                pull = value[0, h, : i + 1] @ grad[0, at, i]
                moved += p * (pull - p @ pull)
            expected[h, : max(0, i - lag + 1)] += moved[: max(0, i - lag + 1)] ** 2
    assert torch.allclose(sums.of_tokens, expected, rtol=1e-9)
    assert not sums.of_tokens[:, n - lag :].any()


def test_a_sample_has_it_as_a_mean_over_draws(tiny_model: Models) -> None:
    model = tiny_model("llama")
    shape, sample = model_shape(model), made(0)[0]
    found = [
        sample_statistics(model, shape, TABLE, sample, ProfileRecipe(draws=draws, gates=gates), None, 0, 0).arrays
        for draws, gates in ((1, True), (2, True), (2, False))
    ]
    n = len(sample.input_ids)
    assert found[0]["of_tokens"].shape == (shape.layers, shape.kv_heads, n)
    assert (found[0]["of_tokens"] >= 0).all()
    assert found[0]["of_tokens"][..., : n - LAG - 10].any()
    assert not found[0]["of_tokens"][..., n - LAG :].any()
    assert "of_tokens" not in found[2]
    np.testing.assert_array_equal(found[1]["squares"], found[2]["squares"])
    ratio = found[1]["of_tokens"].sum() / found[0]["of_tokens"].sum()
    assert 0.2 < ratio < 5  # a mean, not a sum of other draws


def test_what_is_fitted_to_is_of_mean_0_and_variance_1() -> None:
    rng = np.random.default_rng(0)
    influence = torch.from_numpy(rng.lognormal(0, 3, (2, 200)))
    influence[1] = 0
    y = target(influence)
    assert y.shape == (2, 200 - FIRST - LAG)
    assert float(y[0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(y[0].std()) == pytest.approx(1, rel=1e-4)
    assert not y[1].any()
    assert torch.allclose(y, target(1000 * influence), atol=1e-5)
    middle = influence[0, FIRST:-LAG]
    raw = torch.log(middle + FLOOR * middle.mean())
    assert torch.allclose(y[0].double(), (raw - raw.mean()) / raw.std(), atol=1e-4)


def test_what_is_left_out_is_counted_by_hand() -> None:
    n = 100 + FIRST + LAG
    influence = torch.zeros(1, n)
    influence[0, FIRST : FIRST + 100] = torch.arange(100.0, 0, -1)  # the oldest count most
    influence[0, 0] = influence[0, -1] = 1e9  # no part of it
    scores = torch.zeros(1, 100)
    scores[0, 50:] = 1 + torch.arange(50.0)
    found = left_out(influence, scores)[0]
    assert found[0] == 5050
    for number, share in enumerate(SHARES):
        count = round(100 * share)
        newest, most = sum(range(1, count + 1)), sum(range(101 - count, 101))
        assert found[1 + 3 * number :][:3] == pytest.approx([5050 - newest, 5050 - newest, 5050 - most])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_a_gate_finds_what_is_linear_in_what_enters_the_layer(family: str, tiny_model: Models) -> None:
    model = tiny_model(family)
    shape, samples = model_shape(model), made(1, 8, 400)
    rng = torch.Generator().manual_seed(0)
    entering = [dict(attention_inputs(model, sample, range(shape.layers))) for sample in samples]
    width = entering[0][0].shape[1]
    true = torch.randn(shape.layers, shape.kv_heads, width, generator=rng)
    of_tokens = []
    for sample, inputs in zip(samples, entering, strict=True):
        influence = torch.zeros(shape.layers, shape.kv_heads, len(sample.input_ids))
        for layer, x in inputs.items():
            scores = true[layer] @ x.T
            centred = scores - scores.mean(-1, keepdim=True)
            influence[layer, :, FIRST:-LAG] = (3 * centred / scores.std(-1, keepdim=True)).exp()
        of_tokens.append(influence.numpy())
    gates = train_gates(model, samples, of_tokens)
    assert gates.weight.shape == (shape.layers, shape.kv_heads, width - 1)
    assert gates.bias.shape == (shape.layers, shape.kv_heads)
    for row in gates.report["left"]:
        assert row["oracle"][0] <= row["gate"][0] < 0.3 * row["recency"][0] + 1e-9
        assert row["gate_of_all"] <= 0.3 * row["recency_of_all"]
    assert gates.report["samples"] == gates.report["judged"] == 8
    layer, x = next(iter(entering[0].items()))
    found = torch.from_numpy(gates.weight[layer]) @ x[:, :-1].T + torch.from_numpy(gates.bias[layer])[:, None]
    agreed = np.corrcoef(found[0], (true[layer] @ x.T)[0])[0, 1]
    assert agreed > 0.9


def test_what_has_nothing_to_do_with_it_is_not_found(tiny_model: Models) -> None:
    """Judged on samples that a gate was not fitted to, noise is as good as chance."""
    model = tiny_model("llama")
    shape, samples = model_shape(model), made(2, 8, 400)
    rng = np.random.default_rng(0)
    size = shape.layers, shape.kv_heads
    noise = [rng.lognormal(0, 2, (*size, len(sample.input_ids))).astype(np.float32) for sample in samples]
    for row in train_gates(model, samples, noise).report["left"]:
        assert row["gate"][0] == pytest.approx(1 - row["share"], abs=0.08)
        assert row["oracle"][0] < 0.75 * row["gate"][0]


def test_layers_are_fitted_in_groups_where_memory_is_short(tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from moacompress.calibration import repair as module

    model = tiny_model("llama")
    shape, samples = model_shape(model), made(3)
    rng = np.random.default_rng(0)
    size = shape.layers, shape.kv_heads
    noise = [rng.lognormal(0, 2, (*size, len(sample.input_ids))).astype(np.float32) for sample in samples]
    whole = train_gates(model, samples, noise)
    monkeypatch.setattr(module, "MAX_BYTES", 1)
    parts = train_gates(model, samples, noise)
    np.testing.assert_array_equal(whole.weight, parts.weight)
    assert whole.report == parts.report


def test_a_single_sample_is_refused(tiny_model: Models) -> None:
    with pytest.raises(DataError, match="judged on the other; profile two or more"):
        train_gates(tiny_model("llama"), made(0, 1), [np.zeros((3, 2, 150), np.float32)])


RECIPE = {
    "calibration": {
        "lengths": [700],
        "samples": 4,
        "validation_samples": 2,
        "sources": [{"generator": "needle"}],
        "text_samples": 0,
        "answer_tokens": 4,
    },
    "profile": {"draws": 1, "gates": True},
}


def test_a_profile_keeps_its_gates(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moacompress.calibration import profiler

    source = load_source(tiny_folder)
    recipe = Recipe.model_validate({"model": str(tiny_folder), **RECIPE})
    plain = profile(source, tmp_path / "profile", recipe.override(profile__gates=False))
    assert plain.gates is None
    assert not (plain.path / GATES_FILE).exists()
    made = profile(source, tmp_path / "profile", recipe)  # completes it
    assert (made.fingerprint, made.statistics.digest()) == (plain.fingerprint, plain.statistics.digest())
    gates = made.gates
    assert gates is not None
    assert gates.report["samples"] == 4
    assert gates.weight.shape[:2] == (source.shape.layers, source.shape.kv_heads)
    before = (made.path / GATES_FILE).read_bytes()

    def never(*arguments: Any) -> Any:
        raise AssertionError("it was done already")

    with monkeypatch.context() as patch:
        patch.setattr(profiler, "train_gates", never)
        patch.setattr(profiler, "sample_statistics", never)
        for again in (recipe, recipe.override(profile__gates=False)):  # what was recorded stays
            assert profile(source, tmp_path / "profile", again).gates is not None
        assert (made.path / GATES_FILE).read_bytes() == before
        (made.path / GATES_FILE).write_bytes(before[:100])
        assert Profile.load(made.path).gates is None
        with pytest.raises(AssertionError, match="done already"):
            profile(source, tmp_path / "profile", recipe)
    with monkeypatch.context() as patch:  # from the samples that are there
        patch.setattr(profiler, "sample_statistics", never)
        profile(source, tmp_path / "profile", recipe)
    assert (made.path / GATES_FILE).read_bytes() == before
    profile(source, tmp_path / "profile", recipe.override(seed=1), overwrite=True)
    assert (made.path / GATES_FILE).read_bytes() != before


def test_gates_of_another_profile_or_damaged_ones_are_none(tmp_path: Path) -> None:
    gates = Gates(np.ones((2, 1, 3), np.float32), np.zeros((2, 1), np.float32), {"left": []})
    gates.save(tmp_path, "a")
    found = Gates.load(tmp_path, "a")
    assert found is not None
    np.testing.assert_array_equal(found.weight, gates.weight)
    assert found.report == gates.report
    assert Gates.load(tmp_path, "b") is None
    Gates(np.full((2, 1, 3), np.nan, np.float32), gates.bias, {}).save(tmp_path, "a")
    assert Gates.load(tmp_path, "a") is None
    Gates(gates.weight, np.zeros((2, 2), np.float32), {}).save(tmp_path, "a")
    assert Gates.load(tmp_path, "a") is None


def test_what_enters_is_what_the_attention_is_given(tiny_model: Models) -> None:
    model = tiny_model("llama")
    sample, seen = made(4)[0], []
    handle = attention_modules(model)[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.from_numpy(sample.input_ids)[None], use_cache=False)
    handle.remove()
    found = dict(attention_inputs(model, sample, [1]))[1]
    assert torch.allclose(found[:, :-1], seen[0][0, FIRST:-LAG], atol=1e-5)
    assert (found[:, -1] == 1).all()

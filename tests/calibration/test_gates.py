"""Gates: what they are fitted to, that they find it on samples they were not fitted to, and that a profile keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.gates.training import (
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
from moacompress.calibration.profile.choices import choices_of
from moacompress.calibration.profile.collectors import InfluenceSums, TokenSums
from moacompress.calibration.profile.influence import attend, attend_backward
from moacompress.calibration.profile.passes import read_through
from moacompress.calibration.profile.profiler import profile
from moacompress.calibration.profile.sample_statistics import token_influence
from moacompress.calibration.profile.store import Profile
from moacompress.calibration.profile.tiles import AttentionSpec
from moacompress.core.artefact_names import GATES_FILE
from moacompress.core.errors import ArtefactError
from moacompress.models import least_squares
from moacompress.models.modules import attention_modules
from moacompress.models.source import load_source, model_shape
from moacompress.recipe import Recipe
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests import oracle
from tests.calibration.conftest import GATES, random_sample, random_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tests.calibration.conftest import Models

TABLE = RuleTable.of([Rule.FULL, Rule(4, 32, 0)], 32)


def known(model: PreTrainedModel, samples: list[Sample], of_tokens: Sequence[Any]) -> Callable[[int], Any]:
    """Influence that is given, of samples that go through the model for it."""

    def influence(index: int) -> Any:
        read_through(model, samples[index].input_ids)
        return of_tokens[index]

    return influence


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
    shape, sample = model_shape(model), random_sample(150)
    found = [token_influence(model, shape, sample, draws, 0, 0) for draws in (1, 2)]
    n = len(sample.input_ids)
    assert found[0].shape == (shape.layers, shape.kv_heads, n)
    assert (found[0] >= 0).all()
    assert found[0][..., : n - LAG - 10].any()
    assert not found[0][..., n - LAG :].any()
    ratio = found[1].sum() / found[0].sum()
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


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_gate_finds_what_is_linear_in_what_enters_the_layer(family: str, tiny_model: Models) -> None:
    model = tiny_model(family)
    shape, samples = model_shape(model), random_samples(1, 8, 400, more=7)
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
    gates = train_gates(model, samples, known(model, samples, of_tokens))
    weights = gates.weights
    assert weights.weight.shape == (shape.layers, shape.kv_heads, width - 1)
    assert weights.bias.shape == (shape.layers, shape.kv_heads)
    for row in gates.report["left"]:
        assert row["oracle"][0] <= row["gate"][0] < 0.3 * row["recency"][0] + 1e-9
        assert row["gate_of_all"] <= 0.3 * row["recency_of_all"]
    assert gates.report["samples"] == gates.report["judged"] == 8
    layer, x = next(iter(entering[0].items()))
    found = torch.from_numpy(weights.weight[layer]) @ x[:, :-1].T + torch.from_numpy(weights.bias[layer])[:, None]
    agreed = np.corrcoef(found[0], (true[layer] @ x.T)[0])[0, 1]
    assert agreed > 0.9


def test_what_has_nothing_to_do_with_it_is_not_found(tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged on samples that a gate was not fitted to, noise is as good as chance."""
    model = tiny_model("llama")
    shape, samples = model_shape(model), random_samples(2, 8, 400, more=7)
    rng = np.random.default_rng(0)
    size = shape.layers, shape.kv_heads
    noise = [rng.lognormal(0, 2, (*size, len(sample.input_ids))).astype(np.float32) for sample in samples]
    whole = train_gates(model, samples, known(model, samples, noise))
    for row in whole.report["left"]:
        assert row["gate"][0] == pytest.approx(1 - row["share"], abs=0.08)
        assert row["oracle"][0] < 0.75 * row["gate"][0]
    monkeypatch.setattr(least_squares, "MAX_BYTES", 1)  # layers are fitted one after the other
    parts = train_gates(model, samples, known(model, samples, noise))
    np.testing.assert_array_equal(whole.weights.weight, parts.weights.weight)
    assert whole.report == parts.report


def test_a_profile_keeps_its_gates(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moacompress.calibration.profile import preparation, sample_run

    source = load_source(tiny_folder)
    recipe = Recipe.model_validate({"model": str(tiny_folder), **GATES})
    made = profile(source, tmp_path / "profile", recipe)
    gates = made.gates
    assert gates is not None
    assert gates.report["samples"] == 3
    assert gates.weights.weight.shape[:2] == (source.shape.layers, source.shape.kv_heads)
    assert gates.weights.fingerprint == made.gates_fingerprint
    before = (made.path / GATES_FILE).read_bytes()

    def never(*arguments: Any) -> Any:
        raise AssertionError("it was done already")

    with monkeypatch.context() as patch:
        patch.setattr(sample_run, "sample_statistics", never)
        for name in ("train_gates", "token_influence"):
            patch.setattr(preparation, name, never)
        assert profile(source, tmp_path / "profile", recipe).gates is not None
        (made.path / GATES_FILE).write_bytes(before[:100])
        with pytest.raises(ArtefactError, match="it is missing, damaged, or has other gates"):
            Profile.load(made.path).gates  # noqa: B018
        with pytest.raises(AssertionError, match="done already"):
            profile(source, tmp_path / "profile", recipe)
    with monkeypatch.context() as patch:  # trained again, the gates are the same, and so are the samples
        patch.setattr(sample_run, "sample_statistics", never)
        profile(source, tmp_path / "profile", recipe)
    assert (made.path / GATES_FILE).read_bytes() == before
    # spans cost the same beside gates
    plain = profile(source, tmp_path / "plain", recipe.override(profile__gates=False))
    assert plain.gates is None
    assert not (plain.path / GATES_FILE).exists()
    same = made.without_gates()
    assert (same.rules, same.gates) == (plain.rules, None)
    for name, array in plain.statistics.arrays.items():
        np.testing.assert_allclose(same.statistics.arrays[name], array, rtol=1e-4, atol=1e-12)


def test_gates_of_another_profile_or_damaged_ones_are_none(tmp_path: Path) -> None:
    weights = GateWeights(np.ones((2, 1, 3), np.float32), np.zeros((2, 1), np.float32))
    Gates(weights, {}).save(tmp_path, "a")
    assert Gates.load(tmp_path, "a") is not None
    assert Gates.load(tmp_path, "b") is None
    for damaged in (
        GateWeights(np.full((2, 1, 3), np.nan, np.float32), weights.bias),
        GateWeights(weights.weight, np.zeros((2, 2), np.float32)),
    ):
        Gates(damaged, {}).save(tmp_path, "a")
        assert Gates.load(tmp_path, "a") is None


@pytest.mark.parametrize("compiled", [True, False])
def test_a_rule_that_selects_costs_what_its_mask_moves(compiled: bool, use_backend: Callable[[str], Any]) -> None:
    if not compiled:
        use_backend("reference")
    torch.manual_seed(0)
    n, heads, kv_heads, dim = 140, 4, 2, 16
    query, grad = (torch.randn(1, heads, n, dim) for _ in range(2))
    key, value = (torch.randn(1, kv_heads, n, dim) for _ in range(2))
    scores = torch.randint(-9, 9, (kv_heads, n)).to(torch.int16)
    selecting = [Rule(4, 16, 0, select_alpha=20), Rule(4, 0, 200, select_beta_q=300), Rule(16, 20, 0, select_alpha=1)]
    table = RuleTable.of([Rule.FULL, Rule(4, 16, 0), *selecting], 16)
    sums, choices, spec = InfluenceSums(kv_heads, len(table)), choices_of(table, scores), AttentionSpec(dim**-0.5)
    assert choices is not None
    attend_backward(query, key, value, grad, spec, None, table, [sums], choices=choices)
    out = attend(query, key, value, spec)
    for head in range(kv_heads):
        own = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)

        def under(rule: Rule, head: int = head, own: slice = own) -> torch.Tensor:
            mask = oracle.visible(rule, n, 16, scores=scores[head].tolist())
            return oracle.attend_head(query[0, own], key[0, head], value[0, head], mask)[0]

        now = under(Rule.FULL)
        assert torch.allclose(out[0, own].double(), now, atol=1e-5)
        for number, rule in enumerate(table.rules):
            moved = ((under(rule) - now) * grad[0, own]).sum((0, 2))
            assert torch.allclose(sums.total[head, number], moved.sum(), rtol=1e-4, atol=1e-4)
            assert torch.allclose(sums.squares[head, number], moved.square().sum(), rtol=1e-4, atol=1e-6)


def test_what_enters_is_what_the_attention_is_given(tiny_model: Models) -> None:
    model = tiny_model("llama")
    sample, seen = random_sample(150), []
    handle = attention_modules(model)[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.from_numpy(sample.input_ids)[None], use_cache=False)
    handle.remove()
    found = dict(attention_inputs(model, sample, [1]))[1]
    assert torch.allclose(found[:, :-1], seen[0][0, FIRST:-LAG], atol=1e-5)
    assert (found[:, -1] == 1).all()

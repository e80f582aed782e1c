"""What formats cost is told from the gradients of keys and values: by the definition, and against measured KL."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.influence import ProfiledAttention, attend
from moacompress.calibration.profile.precision import TOKENS, PrecisionSums, columns, rotate_quickly, rounding_errors
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.tiles import AttentionSpec, CachedPart
from moacompress.kernels.reference.codes import decode, encode, rotated
from moacompress.kernels.reference.rounding import round_to, rounded
from moacompress.models.source import model_shape
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.formats import CODED
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

Factory = Callable[..., PreTrainedModel]
BITS = {"native": 0, "int8": 8, "int4": 4}
SPANS = (Rule.FULL, Rule(4, 120, 0))


def kept_as(x: torch.Tensor, name: str) -> torch.Tensor:
    """What a format keeps of vectors, by the definition."""
    return round_to(x, BITS[name]) if BITS[name] else x.float()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 5, 24, 64])
def test_quick_errors_are_those_of_the_codes(dim: int) -> None:
    x = torch.randn(2, 300, dim, generator=torch.Generator().manual_seed(5)) * 3 + 1
    x[0, 0] = 0.25  # all equal: nothing is lost but what the zero point loses
    found = rounding_errors(x, (8, 4))
    for error, bits in zip(found, (8, 4), strict=True):
        exact = encode(x, bits)
        expected, step = decode(exact) - rotated(x), exact.scale.float()
        other = (error - expected).abs() > 1e-5  # half-way between two codes
        assert other.float().mean() < 1e-3
        assert ((error - expected).abs() <= 1.001 * step + 1e-5).all()
    torch.testing.assert_close(rotate_quickly(x), rotated(x), rtol=1e-5, atol=1e-5)


def test_quick_errors_of_vectors_that_are_not_finite_are_not_finite() -> None:
    x = torch.ones(3, 8)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    assert rounding_errors(x, (8,)).isfinite().all(-1).tolist() == [[False, False, True]]


@pytest.mark.parametrize("planned", [False, True])
def test_sums_are_those_of_the_definition(planned: bool) -> None:
    tokens = TOKENS + 30  # more than one piece
    now = (("native", "int4"), ("int4", "int8"), ("int8", "native"))
    plan = RuleTable.of([Rule(4, 20, 0, *pair) for pair in now], 16) if planned else None
    given = draw(1, 3, tokens, 16, seed=1), draw(1, 3, tokens, 8, seed=2)
    grads = draw(1, 3, tokens, 16, seed=3), draw(1, 3, tokens, 8, seed=4)
    formats = None if plan is None else plan.formats
    seen = given if formats is None else tuple(map(rounded, given, formats))
    sums = PrecisionSums(3, CODED, plan)
    for _ in range(2):  # the second pass forgets the first
        sums.reset()
        sums.take_gradients(*(CachedPart(*one) for one in zip(given, seen, grads, strict=True)))
    found = sums.tensors()
    for side, name in enumerate(("key", "value")):
        for head, (column, wanted) in product(range(3), enumerate(columns(CODED))):
            change = kept_as(given[side][0, head], wanted) - seen[side][0, head]
            moved = (change * grads[side][0, head]).sum(-1).double()
            for what, expected in (("squares", moved.square().sum()), ("total", moved.sum())):
                place = found[f"{name}_{what}"][head, column]
                assert float(place) == pytest.approx(float(expected), rel=0.02, abs=1e-3 * float(moved.abs().sum()))
            if wanted == (now[head][side] if planned else "native"):
                assert not found[f"{name}_squares"][head, column]


def test_half_the_square_is_what_the_output_moves_along_the_cotangent() -> None:
    """Of one layer: of values exactly, in which attention is linear, of keys to first order."""
    query, key, value, pulled = (draw(1, heads, 90, 16, seed=heads + 7 * n) for n, heads in enumerate((4, 2, 2, 4)))
    spec, table, sums = AttentionSpec(0.25), RuleTable.of([Rule.FULL], 16), PrecisionSums(2, CODED)
    leaf = query.requires_grad_()
    out = ProfiledAttention.apply(leaf, key, value, None, spec, table, [sums])  # type: ignore[no-untyped-call]
    out.backward(pulled)
    found = sums.tensors()
    for head, (column, name) in product(range(2), enumerate(columns(CODED))):
        for side, tolerance in (("value", 1e-3), ("key", 0.1)):
            changed = {"key": key.clone(), "value": value.clone()}
            changed[side][0, head] = kept_as(changed[side][0, head], name)
            with torch.no_grad():
                moved = float((pulled * (attend(query, changed["key"], changed["value"], spec) - out)).sum())
            scale = float(found[f"{side}_squares"][head, column]) ** 0.5
            predicted = float(found[f"{side}_total"][head, column])
            assert predicted**2 / 2 == pytest.approx(moved**2 / 2, rel=2 * tolerance, abs=(tolerance * scale) ** 2)


def test_attention_under_formats_is_that_of_rounded_keys_and_values() -> None:
    query, key, value = draw(1, 4, 40, 8), draw(1, 2, 40, 8, seed=1), draw(1, 2, 40, 8, seed=2)
    spec, table = AttentionSpec(0.3), RuleTable.of([Rule.FULL], 16)
    plan = RuleTable.of([Rule(4, 20, 0, "int4", "int8"), Rule(4, 0, 1024, "native", "int4")], 16)
    spans = RuleTable.of([Rule(4, 20, 0), Rule.FULL], 16)
    keys, values = rounded(key, [2, 0]), rounded(value, [1, 2])
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    ours = ProfiledAttention.apply(*leaves, None, spec, table, [], plan)  # type: ignore[no-untyped-call]
    others = [tensor.clone().requires_grad_() for tensor in (query, keys, values)]
    theirs = ProfiledAttention.apply(*others, None, spec, table, [], spans)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    pulled = draw(1, 4, 40, 8, seed=3)
    for got, wanted in zip(
        torch.autograd.grad(ours, leaves, pulled), torch.autograd.grad(theirs, others, pulled), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_bfloat16_model_attends_to_rounded_keys_in_float32(tiny_model: Factory) -> None:
    model = tiny_model("gpt_oss").bfloat16()
    shape, sample = model_shape(model), sample_of(100)
    plan = Plan(shape, 32, (tuple(Rule(4, 0, 1024, "int4", "int8") for _ in range(shape.kv_heads)),) * shape.layers)
    found = sample_statistics(model, shape, RuleTable.of(SPANS, 32), sample, ProfileRecipe(draws=1), plan, 0, 0)
    assert found.finite
    assert found.arrays["harm"] > 0


def sample_of(n: int, seed: int = 1) -> Sample:
    return Sample(np.random.default_rng(seed).integers(3, 150, n), np.arange(n) >= n - 24, "random", n)


def log_probabilities(model: Any, shape: ModelShape, sample: Sample, plan: Plan | None) -> torch.Tensor:
    """Of a sample's answer tokens, by the profile's own attention."""
    rows = torch.from_numpy(sample.target_rows)
    with torch.no_grad(), passes.recorded(model, passes.Recording.of(shape, RuleTable.of(SPANS, 32), plan)):
        states = passes.target_states(model, torch.from_numpy(sample.input_ids), rows)
        return passes.output_logits(model, states).double().log_softmax(-1)


def changed(plan: Plan, layer: int, head: int, rule: Rule) -> Plan:
    rows = [list(row) for row in plan.rules]
    rows[layer][head] = rule
    return Plan(plan.model, plan.min_window, tuple(map(tuple, rows)))


def test_predicted_kl_ranks_as_measured_kl(tiny_model: Factory) -> None:
    model = tiny_model("llama", num_hidden_layers=3, head_dim=32, initializer_range=0.15)
    shape, samples = model_shape(model), [sample_of(160, seed) for seed in (1, 2)]
    chosen = ProfileRecipe.model_construct(draws=8, baselines=False)
    found = [
        sample_statistics(model, shape, RuleTable.of(SPANS, 32), sample, chosen, None, 0, index).arrays
        for index, sample in enumerate(samples)
    ]
    dense = [log_probabilities(model, shape, sample, None) for sample in samples]
    predicted, measured = [], []
    for layer, head, side, name in product(range(shape.layers), range(shape.kv_heads), ("key", "value"), CODED):
        rule = with_format(Rule.FULL, side, name)
        plan = changed(Plan.full(shape), layer, head, rule)
        kls = [
            float((base.exp() * (base - log_probabilities(model, shape, sample, plan))).sum(-1).mean())
            for base, sample in zip(dense, samples, strict=True)
        ]
        column = columns(CODED).index(name)
        predicted.append(np.mean([one[f"{side}_squares"][layer, head, column] for one in found]) / 2)
        measured.append(np.mean(kls))
    assert spearmanr(predicted, measured).statistic > 0.95
    ratios = np.array(measured) / np.array(predicted)
    assert 0.5 < np.median(ratios) < 2


def test_around_a_plan_a_change_of_format_is_predicted_with_its_sign(tiny_model: Factory) -> None:
    """From a plan of spans and formats that costs something, one KV head's keys or values at a time."""
    model = tiny_model("llama", num_hidden_layers=2, head_dim=32, initializer_range=0.1)
    shape, sample = model_shape(model), sample_of(160)
    rows = ((Rule(4, 120, 0, "int4", "int8"), Rule(4, 120, 0)), (Rule(4, 0, 1024, "int8", "int4"), Rule(4, 120, 0)))
    plan = Plan(shape, 32, rows)
    chosen = ProfileRecipe.model_construct(draws=60, baselines=False)
    arrays = sample_statistics(model, shape, RuleTable.of(SPANS, 32), sample, chosen, plan, 0, 0).arrays
    dense = log_probabilities(model, shape, sample, None)

    def kl(of: Plan) -> float:
        return float((dense.exp() * (dense - log_probabilities(model, shape, sample, of))).sum(-1).mean())

    now = kl(plan)
    assert float(arrays["harm"][0]) == pytest.approx(now, rel=1e-3)
    pairs = []
    for layer, head, side, name in product(range(2), range(2), ("key", "value"), columns(CODED)):
        old = rows[layer][head]
        first = float(arrays[f"{side}_first"][layer, head, columns(CODED).index(name)])
        total = arrays[f"{side}_total"][:, layer, head, columns(CODED).index(name)].astype(np.float64)
        if getattr(old, f"{side}_format") == name:
            assert first == 0
            assert not total.any()
            continue
        new = with_format(old, side, name)
        pairs.append((first + (total**2).mean() / 2, kl(changed(plan, layer, head, new)) - now))
    predicted, measured = np.array(pairs).T
    assert {True, False} == set((measured > 0).tolist())
    assert np.corrcoef(predicted, measured)[0, 1] > 0.95
    large = np.abs(measured) > 0.1 * np.abs(measured).max()
    assert (np.sign(predicted[large]) == np.sign(measured[large])).all()


def with_format(rule: Rule, side: str, name: str) -> Rule:
    """The rule with its keys, or its values, in another format."""
    return rule.in_formats(*((name, rule.value_format) if side == "key" else (rule.key_format, name)))

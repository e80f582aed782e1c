"""What formats cost is told from the gradients of keys and values: by the definition, and against measured KL."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.influence import ProfiledAttention, attend
from moacompress.calibration.profile.precision import TOKENS, PrecisionSums, columns, rotate_quickly, rounding_errors
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.tiles import AttentionSpec, CachedPart
from moacompress.kernels.reference.codes import decode, encode, rotated
from moacompress.kernels.reference.rounding import round_to
from moacompress.models.source import model_shape
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.formats import CODED
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests import oracle
from tests.calibration.conftest import random_sample

Factory = Callable[..., PreTrainedModel]
BITS = {"native": 0, "int8": 8, "int6": 6, "int4": 4}
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


def test_sums_are_those_of_the_definition() -> None:
    tokens = TOKENS + 30  # more than one piece
    given = draw(1, 3, tokens, 16, seed=1), draw(1, 3, tokens, 8, seed=2)
    grads = draw(1, 3, tokens, 16, seed=3), draw(1, 3, tokens, 8, seed=4)
    sums = PrecisionSums(3, CODED)
    for _ in range(2):  # the second pass forgets the first
        sums.reset()
        sums.take_gradients(*(CachedPart(*one) for one in zip(given, grads, strict=True)))
    found = sums.tensors()
    for side, name in enumerate(("key", "value")):
        for head, (column, wanted) in product(range(3), enumerate(columns(CODED))):
            change = kept_as(given[side][0, head], wanted) - given[side][0, head]
            moved = (change * grads[side][0, head]).sum(-1).double()
            for what, expected in (("squares", moved.square().sum()), ("total", moved.sum())):
                place = found[f"{name}_{what}"][head, column]
                assert float(place) == pytest.approx(float(expected), rel=0.02, abs=1e-3 * float(moved.abs().sum()))
            if wanted == "native":
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


def test_statistics_of_a_bfloat16_model_are_finite(tiny_model: Factory) -> None:
    model = tiny_model("gpt_oss").bfloat16()
    table = RuleTable.of(SPANS, 32)
    found = sample_statistics(model, model_shape(model), table, random_sample(100, 24), ProfileRecipe(draws=1), 0, 0)
    assert found.finite
    assert all(found.arrays[f"{side}_squares"].any() for side in ("key", "value"))


def log_probabilities(model: PreTrainedModel, sample: Sample, plan: Plan) -> torch.Tensor:
    """Of a sample's answer tokens."""
    logits = oracle.logits(model, plan, torch.from_numpy(sample.input_ids)[None])
    return logits[0, sample.target_rows].double().log_softmax(-1)


def changed(plan: Plan, layer: int, head: int, rule: Rule) -> Plan:
    rows = [list(row) for row in plan.rules]
    rows[layer][head] = rule
    return Plan(plan.model, plan.min_window, tuple(map(tuple, rows)))


def test_predicted_kl_ranks_as_measured_kl(tiny_model: Factory) -> None:
    model = tiny_model("llama", num_hidden_layers=3, head_dim=32, initializer_range=0.15)
    shape, samples = model_shape(model), [random_sample(160, 24, seed) for seed in (1, 2)]
    chosen = ProfileRecipe.model_construct(draws=8, baselines=False)
    found = [
        sample_statistics(model, shape, RuleTable.of(SPANS, 32), sample, chosen, 0, index).arrays
        for index, sample in enumerate(samples)
    ]
    dense = [log_probabilities(model, sample, Plan.full(shape)) for sample in samples]
    predicted, measured = [], []
    for layer, head, side, name in product(range(shape.layers), range(shape.kv_heads), ("key", "value"), CODED):
        rule = with_format(Rule.FULL, side, name)
        plan = changed(Plan.full(shape), layer, head, rule)
        kls = [
            float((base.exp() * (base - log_probabilities(model, sample, plan))).sum(-1).mean())
            for base, sample in zip(dense, samples, strict=True)
        ]
        column = columns(CODED).index(name)
        predicted.append(np.mean([one[f"{side}_squares"][layer, head, column] for one in found]) / 2)
        measured.append(np.mean(kls))
    assert spearmanr(predicted, measured).statistic > 0.95
    ratios = np.array(measured) / np.array(predicted)
    assert 0.5 < np.median(ratios) < 2


def with_format(rule: Rule, side: str, name: str) -> Rule:
    """The rule with its keys, or its values, in another format."""
    return rule.in_formats(*((name, rule.value_format) if side == "key" else (rule.key_format, name)))

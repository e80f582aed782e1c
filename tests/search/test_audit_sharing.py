"""The audit of copies: which are measured, and what is said of them; and a search on a model two layers of which are alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.calibration.profile.store import Profile
from moacompress.core.progress import SILENT
from moacompress.models.source import SourceModel, model_shape
from moacompress.recipe import Recipe
from moacompress.report.profile_tables import audit_tables, scatter_html
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share
from moacompress.search.audit.audit import audit
from moacompress.search.audit.sharing import assess_copies, choose_copy_picks, copy_costs, copy_plans
from moacompress.search.measure.measuring import measured_kls
from moacompress.search.measure.objective import Objective
from moacompress.search.study import find_plan
from tests.conftest import tiny_model
from tests.search.conftest import make_profile, random_profile


def test_picks_are_spread_over_layers() -> None:
    profile = make_profile(layers=9, anchors=3)
    costs = copy_costs(profile, profile.validation)
    assert costs is not None
    picks = choose_copy_picks(costs, 12, 0)
    pairs = [(layer, share.anchor) for layer, share in picks]
    assert len(set(pairs)) == 12
    counts = Counter(layer for layer, _ in picks)
    assert set(counts) == {layer for layer, may in enumerate(costs.may) if may.any()}
    assert max(counts.values()) <= 3
    assert picks == choose_copy_picks(costs, 12, 0) != choose_copy_picks(costs, 12, 1)
    assert len(choose_copy_picks(costs, 1000, 0)) == costs.may.sum()
    for (layer, share), plan in zip(picks, copy_plans(profile, picks), strict=True):
        assert plan.shares == tuple(share if at == layer else None for at in range(9))
        assert all(rule.is_full for row in plan.rules for rule in row)
    assert copy_costs(make_profile(), profile.validation) is None


def test_what_is_said_of_predictions_that_are_half_too_small() -> None:
    profile = make_profile(layers=9, anchors=3)
    costs = copy_costs(profile, profile.validation)
    assert costs is not None
    picks = choose_copy_picks(costs, 15, 0)
    truth = np.array([costs.cost(plan.shares) for plan in copy_plans(profile, picks)])
    found = assess_copies(profile, costs, picks, 2 * truth, 0)
    row = found["audit_sharing"]
    assert (row["spearman"], row["n"], row["estimator"]) == (1.0, 15, "robust")
    assert row["ratio"] == pytest.approx(2)
    assert [point["measured"] for point in found["sharing_points"]] == pytest.approx(2 * truth)
    assert found["sharing_points"][0]["layer"] == picks[0][0]


def test_samples_count_by_length_and_kind() -> None:
    profile = make_profile(anchors=1)
    arrays = dict(profile.statistics.arrays)
    arrays["copy_squares"] = arrays["copy_squares"] * np.repeat([1, 5], 4)[:, None, None, None, None].astype(np.float32)
    profile = replace(profile, statistics=replace(profile.statistics, arrays=arrays))
    short, long = ([replace(sample, length=length) for sample in profile.validation[:1]] for length in (260, 9000))
    one, five, mixed = (copy_costs(profile, samples) for samples in (short, long, [*short, *short, *long]))
    assert one is not None
    assert five is not None
    assert mixed is not None
    np.testing.assert_allclose(five.influence, 5 * one.influence, rtol=1e-6)
    np.testing.assert_allclose(mixed.influence, (2 * 1 + 5) / 3 * one.influence, rtol=1e-6)


# On tiny models


def profiled(model: Any, tokenizer: Any, out: Path, anchors: int) -> tuple[Profile, SourceModel]:
    source = SourceModel(model, tokenizer, "tiny", model_shape(model), 4096)
    recipe = Recipe.from_dict(
        {
            "calibration": {"lengths": [160], "samples": 4, "validation_samples": 3},
            "profile": {"draws": 2, "anchors": anchors, "formats": "native"},
            "search": {"trials": 1, "alternatives": False},
        }
    )
    return random_profile(source, out, recipe), source


def test_small_copies_cost_what_is_predicted(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    for layer, block in enumerate(model.model.layers):  # attention then adds little, and that is second order
        block.self_attn.o_proj.weight.mul_(0.02 * 2**layer)
    profile, source = profiled(model, tiny_tokenizer, tmp_path / "profile", 2)
    found = audit(profile, source, 6, 0, "50%", out=tmp_path / "audit.json").data
    row = found["audit_sharing"]
    assert row["n"] == len(found["sharing_points"]) == 6
    assert row["spearman"] > 0.8
    assert row["ci95"] is None  # six points are too few for an interval
    assert 0.6 < row["ratio"] < 1.6
    repaired = found["audit_repair"]
    assert repaired["n"] == len(found["repair_points"]) == 6
    assert all(0 < point["left"] <= 1 for point in found["repair_points"])
    points = zip(found["sharing_points"], found["repair_points"], strict=True)
    assert all(after["predicted"] == pytest.approx(before["predicted"] * after["left"]) for before, after in points)
    assert [point["measured"] for point in found["repair_points"]] != [
        point["measured"] for point in found["sharing_points"]
    ]
    again = audit(profile, source, 6, 0, "50%", out=tmp_path / "audit.json").data
    assert again["repair_points"] == found["repair_points"]
    assert "6 layers that copy" in scatter_html(found)
    assert any("copy" in str(getattr(part, "title", part)) for part in audit_tables(found))


def alike(model: Any) -> None:
    """Makes layer 2 attend as layer 1 does, its two KV heads swapped: what lies between changes nothing."""
    first, second = model.model.layers[1:3]
    first.self_attn.o_proj.weight.zero_()
    first.mlp.down_proj.weight.zero_()
    second.input_layernorm.weight.copy_(first.input_layernorm.weight)
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        ours, theirs = (getattr(block.self_attn, name).weight for block in (second, first))
        size = len(theirs) // 2
        ours.copy_(torch.cat([theirs[size:], theirs[:size]]))
        assert len(theirs) == heads * 16


def test_a_layer_that_is_as_another_shares_at_no_loss(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    alike(model)
    profile, source = profiled(model, tiny_tokenizer, tmp_path / "profile", 2)
    copy = (None, None, Share(1, (1, 0)), None, None)
    free = replace(Plan.full(profile.shape), shares=copy)
    assert Objective(source.model, profile.validation).kls(free).max() < 1e-9
    kls = measured_kls(source, profile.validation, [free], tmp_path / "ledger.jsonl", SILENT)
    assert kls.max() < 1e-9
    found = {
        share: find_plan(profile, "40%", recipe=profile.recipe.override(search__share=share), model=source)
        for share in ("1", "layers=2:1")
    }
    for result in found.values():
        assert result.plan.shares == copy
        assert result.plan.kv_bytes(160) <= 0.4 * profile.shape.dense_kv_bytes(160)
        assert result.explanation["sharing"]["counts"][1]["copies"] < 1e-9

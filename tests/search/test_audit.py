"""The audit: what it measures, what its numbers mean, and that it can be stopped and taken up again."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.profiler import profile as profile_model
from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import of_audit
from moacompress.core.errors import ArtefactError, DataError, ModelError, UsageError
from moacompress.models.kl import kl_divergence
from moacompress.models.source import SourceModel, model_shape
from moacompress.recipe import Recipe
from moacompress.report.profile_tables import audit_tables, scatter_html, write_scatter
from moacompress.rules.rule import Rule
from moacompress.search.audit.audit import audit, predicted_influence
from moacompress.search.audit.split_half import split_half
from moacompress.search.audit.statistics import assess, rank_and_ratio, regret, spearman
from moacompress.search.audit.subjects import choose_ablations, equal_byte_choices, masking_rules
from moacompress.search.measure import objective
from moacompress.search.measure.objective import Objective
from moacompress.search.problem.knapsack import ablation, chosen_plan, total_cost
from moacompress.search.search_request import SearchRequest
from tests.conftest import tiny_model
from tests.printed import printed
from tests.search.conftest import make_profile, random_profile

COUNT, PLANS, BUDGET = 12, 5, "50%"


def masking(profile: Profile) -> list[list[int]]:
    return masking_rules(profile.shape, profile.rules, profile.min_window, list(profile.lengths))


# What is measured


def test_ablations_are_spread_and_always_mask_something() -> None:
    profile = make_profile(layers=7, kv_heads=3)
    masks = masking(profile)
    for layer, native in enumerate(profile.shape.native_windows):
        keeps = [sum(profile.rules[rule].kept(n, 32, native) for n in profile.lengths) for rule in masks[layer]]
        assert keeps == sorted(keeps)
        for rule in set(range(len(profile.rules))) - set(masks[layer]):
            assert all(profile.rules[rule].kept(n, 32, native) == min(n, native or n) for n in profile.lengths)
    assert len(masks[4]) < len(masks[0])  # a native window of 64 tokens is narrower than most rules
    every = 3 * sum(map(len, masks))
    assert len(set(choose_ablations(profile.shape, masks, every, 0))) == every
    picks = choose_ablations(profile.shape, masks, 60, 4)
    assert len(set(picks)) == 60
    layers = Counter(layer for layer, _, _ in picks)
    assert set(layers.values()) <= {60 // 7, 60 // 7 + 1}
    for layer in range(7):
        heads = Counter(head for at, head, _ in picks if at == layer)
        assert max(heads.values()) - min(heads.values()) <= 1
    places = [masks[layer].index(rule) / len(masks[layer]) for layer, _, rule in picks]
    assert np.histogram(places, 4, (0, 1))[0].min() >= 10
    assert choose_ablations(profile.shape, masks, 60, 4) == picks != choose_ablations(profile.shape, masks, 60, 3)


def test_plans_have_equal_bytes_and_lie_near_the_optimum() -> None:
    profile = make_profile(layers=12)
    request = SearchRequest.of(profile, "30%", profile.recipe)
    costs = request.surrogate.costs()
    chosen = equal_byte_choices(costs, request.space().knapsack, 12, seed=3)
    plans = [chosen_plan(profile, choice) for _, choice in chosen]
    assert len({plan.key() for plan in plans}) == len(plans) == 12
    for plan in plans:
        shares = [plan.kv_bytes(n) / limit for n, limit in request.limits.items()]
        assert 0.97 < max(shares) <= 1  # at the length that binds
    totals = [total_cost(costs, choice) for _, choice in chosen]
    assert totals[0] == min(totals)
    widths = [width for width, _ in chosen]
    assert widths == sorted(widths)
    assert (widths[0], widths[1], widths[-1]) == (0.0, 0.1, 2.0)
    assert np.mean(totals[1:4]) < np.mean(totals[-3:])
    assert equal_byte_choices(costs, request.space().knapsack, 0, seed=3) == []


# What the numbers mean


def assessed(profile: Profile, tables: dict[str, np.ndarray], truth: np.ndarray) -> Any:
    """An audit of a model whose KL is the sum of `truth` over its KV heads."""
    picks = choose_ablations(profile.shape, masking(profile), 40, 0)
    chosen = equal_byte_choices(truth, SearchRequest.of(profile, "30%", profile.recipe).space().knapsack, 15, 0)
    choices = [choice for _, choice in chosen]
    measured = np.array([truth[pick] for pick in picks])
    plans = np.array([total_cost(truth, choice) for choice in choices])
    return assess(tables, picks, measured, choices, plans, 0)


def test_an_estimator_that_is_the_kl_is_perfect_and_noise_is_not() -> None:
    profile = make_profile(layers=12)
    truth = predicted_influence(profile, profile.validation)["robust"]
    noise = np.exp(np.random.default_rng(0).normal(-4, 2, truth.shape))
    found = assessed(profile, {"robust": truth, "scaled": truth / 3, "noise": noise}, truth)
    for name, ratio in (("robust", 1), ("scaled", 3)):
        one, plans = found.ablations[name], found.plans[name]
        assert one["spearman"] == pytest.approx(1)
        assert one["ci95"] == pytest.approx((1, 1))
        assert (one["ratio"], *one["ratio_range"], plans["ratio"]) == pytest.approx((ratio,) * 4)
        assert plans["spearman"] == pytest.approx(1)
        assert plans["regret"] == pytest.approx(0, abs=1e-9)
        assert (one["n"], plans["n"]) == (40, 15)
    noisy = found.ablations["noise"]
    assert abs(noisy["spearman"]) < 0.5
    assert noisy["ci95"][0] < noisy["spearman"] < noisy["ci95"][1]
    assert noisy["ratio_range"][1] > 10 * noisy["ratio_range"][0]
    difference = found.correlations["robust"] - found.correlations["noise"]
    assert difference.value == pytest.approx(1 - noisy["spearman"])
    assert 0 < difference.ci95[0] < difference.value < difference.ci95[1]
    point = found.points[0]
    assert set(point["predicted"]) == {"robust", "scaled", "noise"}
    assert point["predicted"]["robust"] == pytest.approx(point["measured"])


def test_statistics_by_hand() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 30).astype(float), rng.integers(0, 9, 30).astype(float)
    assert spearman(x, y, 0).value == pytest.approx(spearmanr(x, y).statistic)
    ratios = rank_and_ratio(np.array([1.0, 2.0, 1.0, 0.0]), np.array([7.0, 2.0, 3.0, 9.0]), 0)
    assert ratios["ratio"] == pytest.approx(3)  # a prediction of 0 has none
    assert ratios["n"] == 4
    measured = np.array([0.3, 0.2, 0.5])
    assert regret(np.array([2.0, 1.0, 3.0]), measured) == 0
    assert regret(np.array([2.0, 3.0, 1.0]), measured) == pytest.approx(1.5)
    same = np.ones(5)
    assert np.isnan([spearman(same, np.arange(5.0), 0).value, rank_and_ratio(np.zeros(5), same, 0)["ratio"]]).all()


def test_predictions_are_for_the_lengths_and_kinds_of_the_samples() -> None:
    profile = make_profile()
    long = [sample for sample in profile.validation if sample.length == 512]
    short = [sample for sample in profile.validation if sample.length == 256]
    at_long, at_short = (predicted_influence(profile, samples)["robust"] for samples in (long, short))
    only_long = replace(profile, lengths=(512,)).influence("robust")[0]
    assert at_long.max() == pytest.approx(only_long.max())
    assert not np.allclose(at_long, at_short)
    beyond = Sample(np.arange(600) % 90 + 3, np.arange(600) > 590, "needle", 600)
    assert predicted_influence(profile, [beyond])["robust"] == pytest.approx(at_long)
    with pytest.raises(UsageError, match="no samples of kind 'text'"):
        predicted_influence(profile, [replace(beyond, kind="text")])


# Split halves


@pytest.mark.heavy
def test_more_samples_bring_the_halves_together() -> None:
    profile = make_profile(layers=10)
    rng = np.random.default_rng(0)
    base = profile.statistics.arrays["squares"][[0, 4]]  # one of each length
    squares = np.concatenate([base] * 16) * np.exp(rng.normal(0, 1.5, (32, *base.shape[1:3], 1))).astype(np.float32)
    noisy = replace(
        profile,
        sample_lengths=np.tile(np.array([256, 512]), 16),
        sample_kinds=("answer",) * 32,
        statistics=replace(profile.statistics, arrays={"squares": squares}),
    )
    found = split_half(SearchRequest.of(noisy, "30%", noisy.recipe), 0)
    assert [row["samples"] for row in found] == [16, 24, 32]
    ratios = [row["ratio"] for row in found]
    assert ratios[0] > ratios[-1] > 0.99
    assert ratios[0] > 1.02
    for row in found:
        assert set(row) == {"samples", "ratio", "max"}  # splits of the same samples tell no interval
        assert row["ratio"] <= row["max"]
    same = replace(noisy, statistics=replace(profile.statistics, arrays={"squares": np.concatenate([base] * 16)}))
    assert split_half(SearchRequest.of(same, "30%", same.recipe), 0)[-1]["ratio"] == pytest.approx(1)


# The whole of it, on a tiny model


@pytest.fixture(scope="module")
def audited(source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    recipe = Recipe.from_dict(
        {
            "calibration": {"lengths": [192, 256], "samples": 4, "validation_samples": 3},
            "profile": {"draws": 1, "baselines": True},
        }
    )
    return random_profile(source, tmp_path_factory.mktemp("audited") / "profile", recipe)


def run(profile: Profile, source: Path | SourceModel, out: Path, **more: Any) -> Any:
    return audit(profile, source, COUNT, PLANS, BUDGET, out=out / "audit.json", **more)


class Calls(list[float]):
    """The KLs that are really measured, in order.

    Attributes:
        dies_at: number of the KL at which it all ends; None for never.
    """

    dies_at: int | None = None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def counted(*args: Any) -> float:
        if len(calls) == calls.dies_at:
            raise KeyboardInterrupt
        calls.append(kl_divergence(*args))
        return calls[-1]

    monkeypatch.setattr(objective, "kl_divergence", counted)
    return calls


@pytest.fixture(scope="module")
def finished(audited: Profile, source: SourceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit."""
    out = tmp_path_factory.mktemp("finished")
    run(audited, source, out)
    return out


def test_what_an_audit_says(audited: Profile, source: SourceModel, finished: Path) -> None:
    data = json.loads((finished / "audit.json").read_text())
    found = run(audited, source, finished)
    assert {key: data[key] for key in found.data} == found.data
    assert set(data["audit"]) == set(data["audit_plans"]) == set(audited.estimators)
    assert set(data["audit"]) == {"robust", "moa", "mass"}
    for row in data["audit"].values():
        assert {"spearman", "ci95", "ratio", "n"} <= set(row)
        assert row["n"] == COUNT
        assert -1 <= row["ci95"][0] <= row["spearman"] <= row["ci95"][1] <= 1
    for row in data["audit_plans"].values():
        assert {"spearman", "ci95", "ratio", "regret", "n"} <= set(row)
        assert row["regret"] >= 0
    difference = data["chosen_minus_moa"]["value"]
    assert difference == pytest.approx(data["audit"]["robust"]["spearman"] - data["audit"]["moa"]["spearman"])
    assert [row["samples"] for row in data["split_half"]] == [4]
    precision = data["audit_precision"]
    assert {"spearman", "ci95", "ratio", "n", "kinds"} <= set(precision)
    assert (precision["n"], len(data["precision_points"])) == (COUNT, COUNT)
    assert precision["spearman"] > 0.8
    assert 0.3 < precision["ratio"] < 3
    assert data["audit"]["robust"]["spearman"] > 0.5  # second order is right about a tiny smooth model
    objective = Objective(source.model, audited.validation)
    index = {rule: number for number, rule in enumerate(audited.rules)}
    for point in data["points"][:4]:
        rule = index[Rule(**point["rule"])]
        plan = ablation(audited, (point["layer"], point["kv_head"], rule))
        assert point["measured"] == pytest.approx(objective.kls(plan).mean(), rel=1e-3, abs=1e-7)
        influence = predicted_influence(audited, audited.validation)["moa"]
        assert point["predicted"]["moa"] == influence[point["layer"], point["kv_head"], rule]
    assert len({plan["key"] for plan in data["plans"]}) == len(data["plans"])
    for n, limit in SearchRequest.of(audited, BUDGET, audited.recipe).limits.items():
        assert all(plan["kv_bytes"][str(n)] <= limit for plan in data["plans"])


def test_killed_resumed_and_begun_again(
    audited: Profile, source: SourceModel, finished: Path, tmp_path: Path, measured: Calls
) -> None:
    whole = (finished / "audit.json").read_bytes()
    total = (2 * COUNT + len(json.loads(whole)["plans"])) * 3
    measured.dies_at = total // 2
    with pytest.raises(KeyboardInterrupt):
        run(audited, source, tmp_path)
    measured.dies_at = None
    assert not (tmp_path / "audit.json").exists()
    assert getattr(source.model, "_moacompress", None) is None
    records = tmp_path / "audit.ledger.jsonl"
    records.write_bytes(records.read_bytes()[:-20])  # the last line was just being written
    first = run(audited, source, tmp_path)
    assert len(measured) == total + 1
    assert (tmp_path / "audit.json").read_bytes() == whole
    before = (tmp_path / "audit.json").stat().st_mtime_ns
    source.model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    for model in (source, tmp_path / "model"):  # loaded, or to be loaded
        again = run(audited, model, tmp_path)
        assert (again.request, again.data) == (first.request, first.data)
    assert len(measured) == total + 1
    assert (tmp_path / "audit.json").stat().st_mtime_ns == before
    with pytest.raises(ArtefactError, match="audit of another request .* or pass --overwrite"):
        run(audited, source, tmp_path, seed=1)
    (tmp_path / "audit.txt").write_text("mine")
    assert {path.name for path in tmp_path.iterdir()} == {
        "audit.txt",
        "model",
        *(path.name for path in of_audit(tmp_path / "audit.json") if path.suffix != ".html"),
    }
    assert run(audited, source, tmp_path, overwrite=True).data == first.data
    assert len(measured) == 2 * total + 1
    assert (tmp_path / "audit.txt").exists()
    (tmp_path / "folder" / "audit.json").mkdir(parents=True)
    with pytest.raises(ArtefactError, match="cannot read audit"):
        run(audited, source, tmp_path / "folder", overwrite=True)


def test_what_cannot_be_audited(audited: Profile, source: SourceModel, tmp_path: Path) -> None:
    other = tiny_model("llama", seed=1)
    stranger = replace(source, model=other, shape=model_shape(other))
    with pytest.raises(ModelError, match="is of other weights .* audit with the model that was profiled"):
        run(audited, stranger, tmp_path)
    with pytest.raises(DataError, match="no held-out samples"):
        run(replace(audited, validation=[]), source, tmp_path)
    (tmp_path / "audit.json").write_text('{"format": "something else"}')
    with pytest.raises(ArtefactError, match="not an audit"):
        run(audited, source, tmp_path)


def test_the_plot_and_the_tables_name_every_estimator(
    audited: Profile, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = json.loads((finished / "audit.json").read_text())
    write_scatter(tmp_path / "audit.json", data)
    page = (tmp_path / "audit.html").read_text("utf-8")
    assert page == scatter_html(data)
    text = printed(*audit_tables(data))
    for name in audited.estimators:
        assert page.count(f'"name":"{name}"') == 2 + (name == data["audit_precision"]["estimator"])
        assert text.count(name) >= 2
    assert f"{COUNT} ablations" in page
    assert 'src="http' not in page  # nothing is fetched
    assert all(said in text for said in ("robust*", "Spearman of robust minus that of moa", "int4 keys"))
    (tmp_path / "audit.html").unlink()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with caplog.at_level(logging.WARNING):
        write_scatter(tmp_path / "audit.json", data)
    assert [record.message for record in caplog.records if 'pip install "moacompress[report]"' in record.message]
    assert not (tmp_path / "audit.html").exists()


def test_without_gates_on_offer_ablations_are_of_the_spans_that_are(source: SourceModel, tmp_path: Path) -> None:
    """They are numbered as the search numbers rules, which leaves out those that select."""
    recipe = Recipe.from_dict(
        {
            "calibration": {
                "sources": [{"generator": "needle"}],
                "lengths": [400],
                "samples": 2,
                "validation_samples": 1,
                "longer_samples": 0,
                "answer_tokens": 4,
            },
            "profile": {"draws": 1, "gates": True, "gate_samples": 2, "formats": "int8,int4"},
            "search": {"gates": False},
        }
    )
    profile = profile_model(source, tmp_path / "profile", recipe)
    assert any(rule.selects for rule in profile.spans)
    points = audit(profile, source, 30, 0, BUDGET, out=tmp_path / "audit.json").data["points"]
    rules = [point["rule"] for point in points]
    assert len(rules) == 30
    assert {(rule["key_format"], rule["value_format"]) for rule in rules} == {("native", "native")}

"""Weights chosen together with a plan within a total of memory, on a tiny model: bytes, the choice, resumption, refusals."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moacompress.runtime.hf.loading  # noqa: F401
from moacompress.calibration.profile.passes import answer_logits
from moacompress.calibration.profile.profiler import profile
from moacompress.cli import app
from moacompress.core.errors import BudgetError, InfeasibleBudgetError, PlanError, UsageError
from moacompress.exporter.exporting import estimate_export, export
from moacompress.models.kl import kl_divergence
from moacompress.models.source import load_source
from moacompress.models.stored_plan import checkpoint_weights
from moacompress.models.weight_choices import CHOICES, WeightChoices, checkpoint_bytes
from moacompress.models.weight_rounding import ROUNDED, RoundedLayers
from moacompress.pipeline import measured_kv_bytes
from moacompress.recipe import Recipe
from moacompress.report.inspection import inspect_plan, overview
from moacompress.rules.budget import Budget
from moacompress.rules.plan import Plan
from moacompress.rules.planned_weights import planned_weights
from moacompress.search.deadline import Deadline
from moacompress.search.measure.objective import Objective
from moacompress.search.problem.solver import milp
from moacompress.search.search_request import SearchRequest
from moacompress.search.study import find_plan
from moacompress.search.weights.choosing import candidate_weights
from moacompress.search.weights.weight_choice import joint_choice, joint_problem

LENGTH = 700


@pytest.fixture(scope="module")
def source(tiny_folder):
    return load_source(tiny_folder)


@pytest.fixture(scope="module")
def profiled(source, small_run, tmp_path_factory):
    recipe = Recipe.from_dict({**small_run, "budget": []}).override(search__trials=2, search__rounds=1, search__moves=2)
    return profile(source, tmp_path_factory.mktemp("profile") / "profile", recipe)


def sizes_of(source, profiled):
    """The choices, and the bytes of the smallest cache at `LENGTH`."""
    choices = WeightChoices.of(source.model, source.shape.dtype)
    whole = memory(choices.bytes(np.zeros(len(choices.names), np.int64)) + source.shape.dense_kv_bytes(LENGTH))
    request = SearchRequest.of(profiled, whole, profiled.recipe.override(weights="auto"), model=source)
    sizes = request.space().knapsack.sizes
    return choices, int(sizes.min(axis=-1).sum())


def memory(size: int) -> str:
    return f"memory={size / 1024:.6f}KiB@{LENGTH}"


def between(source, profiled, share: float) -> int:
    """A total between the smallest and all that the dense model takes."""
    choices, cache = sizes_of(source, profiled)
    least = choices.bytes(choices.smallest) + cache
    most = choices.bytes(np.zeros(len(choices.names), np.int64)) + source.shape.dense_kv_bytes(LENGTH)
    return int(least + share * (most - least))


@pytest.fixture(scope="module")
def found(source, profiled, tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "plan.json"
    asked = between(source, profiled, 0.3)
    recipe = profiled.recipe.override(weights="auto", budget=[memory(asked)])
    return find_plan(profiled, None, recipe=recipe, out=out, model=source), out, asked, recipe


def test_files_and_cache_take_at_most_what_was_asked_for(found, tiny_folder, tmp_path):
    _, out, asked, _ = found
    plan = Plan.load(out)
    note = plan.budget["memory"][str(LENGTH)]
    assert note["limit"] in (asked, asked - 1)
    assert note["weights"] + note["kv_bytes"] <= asked
    assert planned_weights(plan)
    folder = export(tiny_folder, out, tmp_path / "model")
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert stored <= note["weights"] < stored + 32 * 1024
    assert stored + measured_kv_bytes(folder, LENGTH) <= asked
    assert checkpoint_weights(folder) == {name: ROUNDED[kind] for name, kind in planned_weights(plan).items()}
    card = (folder / "README.md").read_text()
    assert "A search chose the formats of linear layers" in card
    assert "asked for" in card
    assert export(tiny_folder, out, tmp_path / "model") == folder  # the same again is left as it is
    expected = estimate_export(tiny_folder, out, tmp_path / "other").facts["weight_bytes"]
    assert abs(expected - stored) < 32 * 1024


def test_measured_kl_is_of_the_exported_model(found, source, profiled, tiny_folder, tmp_path):
    result, out, _, _ = found
    folder = export(tiny_folder, out, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    kls = [
        kl_divergence(answer_logits(source.model, sample), answer_logits(loaded, sample))
        for sample in profiled.validation
    ]
    assert result.harm["plan"] == pytest.approx(np.mean(kls), rel=1e-3, abs=1e-7)


def test_the_notes_say_what_was_compared(found):
    plan = Plan.load(found[1])
    rows = plan.quality["weight_choices"]
    assert {"joint"} <= {row["name"] for row in rows}
    assert all(row["weight_bytes"] + row["kv_bytes"][str(LENGTH)] <= found[2] for row in rows)
    chosen = min(rows, key=lambda row: row["kl"])
    assert chosen["weight_bytes"] == plan.provenance["weights"]["bytes"]
    assert plan.quality["rounded_weights"]["weights"] == "auto"
    assert plan.quality["rounded_weights"]["kl"] > 0
    shown = inspect_plan(plan)
    assert shown["memory"] == plan.budget["memory"]
    overview(plan, shown)


def test_the_model_has_its_own_layers_afterwards(found, source, tiny_folder):
    plain = load_source(tiny_folder)
    assert [type(a) for a in source.model.modules()] == [type(b) for b in plain.model.modules()]
    for (name, one), (_, other) in zip(source.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_joint_choice_is_the_best_predicted_one(source, profiled):
    """Brute force: the KV heads have three rules each, and three layers may be chosen."""
    rng = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.7):
        asked = between(source, profiled, share)
        recipe = profiled.recipe.override(weights="auto", search__solver="milp")
        request = SearchRequest.of(profiled, memory(asked), recipe, model=source)
        picked = rng.choice(len(request.weights.choices.names), 3, replace=False)
        full = request.weights.choices
        few = replace(
            full,
            names=tuple(full.names[i] for i in picked),
            sizes=full.sizes[picked],
            fixed=full.fixed + int(full.sizes.min(axis=1).sum() - full.sizes[picked].min(axis=1).sum()),
        )
        prices = np.sort(rng.exponential(1, (3, 3)), axis=1) * [0, 0.1, 1]
        choice = replace(request.weights, choices=few, prices=prices, chosen=few.smallest)
        request = replace(request, weights=choice)
        costs = request.surrogate.raw() * 50
        got = joint_choice(request, choice, costs)
        all_costs, sizes, limits = joint_problem(request, choice, costs)
        heads = all_costs[:-3]
        best = np.inf
        for chosen in itertools.product(range(3), repeat=3):
            left = limits - sizes[:, -3:, :3][:, np.arange(3), chosen].sum(axis=1)
            if (left < sizes[:, :-3].min(axis=2).sum(axis=1)).any():
                continue

            kv = milp(heads, sizes[:, :-3], left).cost
            best = min(best, kv + prices[np.arange(3), chosen].sum())
        taken = limits - sizes[:, -3:, :3][:, np.arange(3), got].sum(axis=1)
        value = milp(heads, sizes[:, :-3], taken).cost + prices[np.arange(3), got].sum()
        assert value <= best * (1 + 1e-3) + 1e-9


def test_candidates_fit_and_differ(source, profiled):
    asked = between(source, profiled, 0.4)
    recipe = profiled.recipe.override(weights="auto", budget=[memory(asked)])
    request = SearchRequest.of(profiled, None, recipe, model=source)
    layers = len(request.weights.choices.names)
    prices = np.sort(np.random.default_rng(1).exponential(1, (layers, 3)), axis=1) * [0, 0.01, 1]
    choice = replace(request.weights, prices=prices)
    found = candidate_weights(request, choice, request.surrogate.raw())
    assert len({tuple(chosen) for chosen in found.values()}) == len(found) >= 2
    for chosen in found.values():
        one = request.with_weights(choice.taking(chosen))
        plan = one.plan(one.surrogate, one.parameters.neutral)
        assert one.weight_bytes.bytes + plan.kv_bytes(LENGTH) <= asked
        assert one.key == request.key


def test_a_stopped_search_resumes_to_the_same(found, source, profiled, tmp_path, monkeypatch):
    result, out, _, recipe = found
    again = find_plan(profiled, None, recipe=recipe, out=out, model=source)  # found before: nothing runs
    assert again.plan == result.plan
    target = tmp_path / "plan.json"
    calls = itertools.count()
    check = Deadline.check

    def killed(self):
        if next(calls) in (1, 9):
            raise KeyboardInterrupt
        check(self)

    monkeypatch.setattr(Deadline, "check", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            find_plan(profiled, None, recipe=recipe, out=target, model=source)
        first = Plan.load(target)  # what was there at once fits too
        note = first.budget["memory"][str(LENGTH)]
        assert note["weights"] + note["kv_bytes"] <= note["limit"]
        assert set(planned_weights(first).values()) == {"int4"}
    ended = find_plan(profiled, None, recipe=recipe, out=target, model=source)
    assert ended.plan == result.plan


def test_time_that_is_up_at_once_leaves_the_smallest_weights(source, profiled, found, tmp_path):
    recipe = found[3].override(search__timeout=1e-9)
    result = find_plan(profiled, None, recipe=recipe, out=tmp_path / "plan.json", model=source)
    assert result.harm["plan"] is None
    assert set(planned_weights(result.plan).values()) == {"int4"}


def test_memory_alone_leaves_the_weights(source, profiled):
    asked = checkpoint_bytes(source.model, source.shape.dtype) + source.shape.dense_kv_bytes(LENGTH) // 3
    recipe = profiled.recipe.override(budget=[memory(asked)], search__rounds=0, search__moves=0)
    result = find_plan(profiled, None, recipe=recipe)
    note = result.plan.budget["memory"][str(LENGTH)]
    assert note["weights"] == checkpoint_bytes(source.model, source.shape.dtype)
    assert result.plan.kv_bytes(LENGTH) <= source.shape.dense_kv_bytes(LENGTH) // 3
    assert planned_weights(result.plan) is None


def test_what_cannot_fit_is_refused_with_the_numbers(source, profiled):
    choices, cache = sizes_of(source, profiled)
    least = choices.bytes(choices.smallest)
    auto = profiled.recipe.override(weights="auto")
    with pytest.raises(
        InfeasibleBudgetError, match=f"weights take {least:,} at the smallest and the KV cache at least {cache:,}"
    ):
        SearchRequest.of(profiled, memory(least + cache - 1024), auto, model=source)
    SearchRequest.of(profiled, memory(least + cache + 1024), auto, model=source)
    whole = checkpoint_bytes(source.model, source.shape.dtype)
    with pytest.raises(InfeasibleBudgetError, match=f"weights take {whole:,} as they are .*--weights auto"):
        SearchRequest.of(profiled, memory(least + cache + 1024), profiled.recipe, model=source)
    with pytest.raises(BudgetError, match="--memory 6GiB@8k"):
        SearchRequest.of(profiled, "50%", auto, model=source)
    with pytest.raises(UsageError, match="share"):
        SearchRequest.of(profiled, memory(whole * 2), auto.override(search__share="1"), model=source)
    with pytest.raises(BudgetError, match="search. and .compress"):
        SearchRequest.of(profiled, memory(whole * 2), auto)


@pytest.mark.parametrize("text", ["memory=50%@8k", "memory=1GiB", "memory=x@8k", "memory="])
def test_a_memory_that_is_none_is_refused(text):
    with pytest.raises(BudgetError, match="memory"):
        Budget.parse(text)


def test_exports_by_hand(found, tiny_folder, source, tmp_path):
    plan = Plan.load(found[1])
    floats = export(tiny_folder, plan, tmp_path / "floats", weights="dense")
    assert checkpoint_weights(floats) == {}
    assert planned_weights(Plan.load(floats / "plan.json")) is None
    with pytest.raises(UsageError, match="no weights that a search chose"):
        export(tiny_folder, Plan.load(floats / "plan.json"), tmp_path / "none", weights="auto")
    with pytest.raises(UsageError, match="without --repair"):
        export(tiny_folder, plan, tmp_path / "none", repair=tmp_path / "profile")
    with pytest.raises(PlanError):
        export(tiny_folder, plan, tmp_path / "none", weights="int8")
    for formats in ({"model.layers.99.mlp": "int4"}, {"model.norm": "int8"}):
        other = plan.with_notes(provenance={**plan.provenance, "weights": {"formats": formats}})
        with pytest.raises(PlanError, match="cannot be rounded"):
            export(tiny_folder, other, tmp_path / "none")
    for note in (3, {"formats": ["a"]}, {"formats": {"a": "int2"}}):
        with pytest.raises(PlanError, match="provenance.weights"):
            planned_weights(plan.with_notes(provenance={"weights": note}))
    assert not (tmp_path / "none").exists()


def test_embedding_and_output_layer_are_rounded_where_that_is_asked_for(source):
    plain = WeightChoices.of(source.model, "float32")
    with_head = WeightChoices.of(source.model, "float32", "int8")
    assert with_head.names == plain.names
    assert with_head.fixed < plain.fixed
    assert set(with_head.ends.values()) == {"int8"}
    layers = RoundedLayers(source.model)
    with layers.in_place(with_head.formats(with_head.smallest)):
        assert checkpoint_bytes(source.model, "float32") == with_head.bytes(with_head.smallest)
    for pick, _ in enumerate(CHOICES):
        chosen = np.full(len(plain.names), pick)
        with layers.in_place(plain.formats(chosen)):
            assert checkpoint_bytes(source.model, "float32") == plain.bytes(chosen)
    assert checkpoint_bytes(source.model, "bfloat16") < checkpoint_bytes(source.model, "float32")


def test_an_objective_with_rounded_layers_is_dense_in_between(source, profiled):
    layers = RoundedLayers(source.model)
    choices = WeightChoices.of(source.model, "float32")
    formats = choices.formats(choices.smallest)
    plain = Objective(source.model, profiled.validation)
    rounded = plain.with_rounding(lambda: layers.in_place(formats))
    full = Plan.full(source.shape)
    assert np.allclose(plain.kls(full), 0, atol=1e-9)
    assert (rounded.kls(full) > 1e-9).all()
    assert [*rounded.many(0, [full], full)] == pytest.approx(rounded.kls(full, [0]).tolist(), rel=1e-4)
    assert np.allclose(plain.kls(full), 0, atol=1e-9)


def test_commands(source, profiled, tiny_folder, tmp_path):
    asked = between(source, profiled, 0.3)
    size = f"{asked / 1024:.3f}KiB@{LENGTH}"
    small = ("--trials", "1", "--rounds", "0", "--moves", "0", "--formats", "native")
    command = ("search", profiled.path, "--weights", "auto", "--memory", size, "-o", tmp_path / "plan.json", *small)
    dry = run(*command, "--dry-run")
    assert "Weights take" in dry
    assert "at the smallest they leave" in dry
    assert not (tmp_path / "plan.json").exists()
    shown = run(*command)
    assert f"Memory at {LENGTH} tokens: weights" in shown
    assert "all int4" in shown
    again = json.loads(run(*command, "--json"))
    assert again["memory"][str(LENGTH)]["weights"] < again["memory"][str(LENGTH)]["limit"]
    assert again["weights"][0]["name"] == "joint"
    assert "linear layers chosen with the plan" in run("inspect", tmp_path / "plan.json")
    beside = run("search", profiled.path, "--memory", size, "-o", tmp_path / "other.json", *small, code=1)
    assert "as they are" in beside
    least = f"{checkpoint_bytes(source.model, source.shape.dtype) / 1024 + 100:.3f}KiB@{LENGTH}"
    fixed = ("search", profiled.path, "--memory", least, "-o", tmp_path / "other.json", *small)
    assert "as they are, which leaves" in run(*fixed, "--dry-run")


def run(*arguments, code=0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return " ".join((done.stdout if code == 0 else done.stderr).split()) if "--json" not in arguments else done.stdout

"""What a page is made of: numbers of other plans and weights are left out, and damaged files are one sentence."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moacompress.core.errors import ArtefactError, PlanError
from moacompress.evaluation.runner import evaluate
from moacompress.pipeline import compress
from moacompress.recipe import Recipe
from moacompress.report.page.findings import FRONTS, Findings
from moacompress.report.page.report_page import page_sections, write_page
from moacompress.rules.plan import Plan


def test_another_plans_numbers_are_left_out(run_folder: Path, tmp_path: Path) -> None:
    for name in ("eval.json", "bench.json", "plan.explain.json", "summary.json"):
        shutil.copy(run_folder / name, tmp_path / name)
    plan = Plan.load(run_folder / "plan.json")
    assert json.loads((tmp_path / "summary.json").read_text())["plan"] == plan.key()
    Plan.full(plan.model).save(tmp_path / "plan.json")
    found = Findings.load(tmp_path / "plan.json")
    assert (found.evaluation, found.bench, found.explanation, found.summary) == (None, None, None, None)
    assert len(found.passed_over) == 4
    assert "summary.json is of another plan" in found.passed_over
    for noted in ({"plan": Plan.full(plan.model).key()}, {}):  # one without a note is taken
        (tmp_path / "summary.json").write_text(json.dumps({"seconds": {"search": 3.0}, **noted}))
        assert Findings.load(tmp_path / "plan.json").summary is not None
    (tmp_path / "eval.json").write_text("[]")
    with pytest.raises(ArtefactError, match="no JSON object"):
        Findings.load(tmp_path / "plan.json")
    (tmp_path / "eval.json").write_text("{}")
    with pytest.raises(ArtefactError, match="'checkpoint' is missing"):
        Findings.load(tmp_path / "plan.json")


def test_an_evaluation_of_earlier_weights_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    """A checkpoint that was repaired, or healed once more, in its place."""
    out = tmp_path / "out"
    shutil.copytree(run_folder, out)
    plan, evaluation = Plan.load(out / "model" / "plan.json"), json.loads((out / "eval.json").read_text())
    measured = evaluation["checkpoint"]["weights"]
    assert measured == plan.model.weights_fingerprint
    heal = {"improved": True, "train": "lora", "from_weights": "2-0000000000000000"}

    def passed(weights: str, **notes: Any) -> list[str]:
        changed = plan.with_notes(provenance={**plan.provenance, **notes})
        changed.save(out / "model" / "plan.json")
        config = json.loads((out / "model" / "config.json").read_text())
        config["quantization_config"]["plan"] = changed.to_dict()
        (out / "model" / "config.json").write_text(json.dumps(config))
        of = {**evaluation["checkpoint"], "weights": weights}
        (out / "eval.json").write_text(json.dumps({**evaluation, "checkpoint": of}))
        found = [Findings.load(out / file) for file in ("plan.json", "model/plan.json")]
        assert all((one.evaluation is None) == bool(one.passed_over) for one in found)
        assert found[0].passed_over == found[1].passed_over
        return found[0].passed_over

    said = ["eval.json is of weights that the checkpoint no longer has"]
    assert passed(measured) == []
    assert passed(measured, repair={"penalty": None}) == []
    assert passed(measured, repair={"penalty": 0.1}) == said
    assert passed("2-1111111111111111", repair={"penalty": 0.1}) == []
    assert passed(measured, heal=heal) == said
    assert passed(str(heal["from_weights"]), heal=heal) == said
    assert passed("2-1111111111111111", heal=heal) == []
    assert passed(measured, heal={**heal, "train": "gates", "changed_weights": False}) == []


def test_an_evaluation_of_other_weights_than_the_plans_is_said(run_folder: Path, tmp_path: Path) -> None:
    """Such as fine-tuned ones: no note tells of them."""
    out = tmp_path / "out"
    shutil.copytree(run_folder, out)
    assert Findings.load(out / "plan.json").warnings == []
    weights = load_file(out / "model" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, out / "model" / "model.safetensors", metadata={"format": "pt"})
    evaluate(out, against=(), lengths=(700,), prompts=1, out=out / "eval.json", overwrite=True)
    found = Findings.load(out / "plan.json")
    (said,) = found.warnings
    assert "are not those that the plan was made for" in said
    assert found.evaluation is not None
    write_page(found, out / "report.html")
    assert said in (out / "report.html").read_text()


def test_broken_files_of_others_cost_no_page(run_folder: Path, tmp_path: Path) -> None:
    shutil.copy(run_folder / "plan.json", tmp_path / "plan.json")
    shutil.copy(run_folder / "plan.explain.json", tmp_path / "plan.explain.json")
    for name, text in (("a.explain.json", "{"), ("a.front.json", "["), ("b.front.json", "{}"), ("c.front.json", "[]")):
        (tmp_path / name).write_text(text)
    found = Findings.load(tmp_path / "plan.json")
    assert found.explanation is not None
    assert found.passed_over == [
        "a.explain.json cannot be read",
        "a.front.json cannot be read",
        "b.front.json lists no plans",
        "c.front.json cannot be read",
    ]
    write_page(found, tmp_path / "page.html")


@pytest.mark.parametrize(
    "notes",
    [
        {"quality": {"measured_harm": {"plan": 0.1, "uniform": "x"}}},
        {"quality": {"measured_harm": "plan"}},
        {"provenance": {"versions": "x"}},
        {"provenance": {"repair": {"penalty": 1, "tokens": 3}}},
    ],
    ids=str,
)
def test_damaged_notes_are_one_sentence(run_folder: Path, tmp_path: Path, notes: dict[str, Any]) -> None:
    plan = Plan.load(run_folder / "plan.json")
    plan.with_notes(**{name: {**getattr(plan, name), **note} for name, note in notes.items()}).save(
        tmp_path / "plan.json"
    )
    with pytest.raises(PlanError, match=r"what the plan's notes say of .* is damaged: "):
        write_page(Findings.load(tmp_path / "plan.json"), tmp_path / "page.html")


@pytest.mark.parametrize(
    ("part", "name", "content"),
    [
        ("evaluation", "eval.json", {"results": [{"model": "plan"}]}),
        ("evaluation", "eval.json", {"results": [], "pooled": [1]}),
        ("bench", "bench.json", {"environment": {}, "runs": "x"}),
        ("explanation", "*.explain.json", {"stages": [], "heads": [{}]}),
        ("explanation", "*.explain.json", {"stages": [], "predicted": {"pairs": [1, 2]}}),
        ("front", FRONTS, {"points": [{"plan": "plan.json"}]}),
        ("audit", "audit.json", {"estimator": "robust"}),
        ("summary", "summary.json", {"seconds": "x"}),
    ],
)
def test_files_of_another_form_are_one_sentence(
    run_folder: Path, tmp_path: Path, part: str, name: str, content: dict[str, Any]
) -> None:
    changed: dict[str, Any] = {part: content}
    found = replace(Findings.load(run_folder / "plan.json"), **changed)
    with pytest.raises(ArtefactError, match=rf"^{re.escape(name)} is not what its name says \("):
        write_page(found, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_what_was_left_beside_under_other_names(run_folder: Path, tmp_path: Path) -> None:
    """As searches of several budgets and of a loss leave it: notes are known by their plan, a front by the file it lists."""
    shutil.copy(run_folder / "plan.json", tmp_path / "plan-50.json")
    shutil.copy(run_folder / "plan.explain.json", tmp_path / "other.explain.json")
    points = [{"plan": f"plan-{n}.json", "kv_share": {"800": n / 100}, "harm": {"plan": 1 / n}} for n in (25, 50)]
    (tmp_path / "plan.front.json").write_text(json.dumps({"points": points}))
    found = Findings.load(tmp_path / "plan-50.json")
    assert found.explanation is not None
    names = [picture.name for section in page_sections(found) for picture in section.pictures]
    assert "front" in names
    shutil.copy(run_folder / "plan.json", tmp_path / "plan-7.json")
    assert Findings.load(tmp_path / "plan-7.json").front is None


def test_another_profile_and_its_audit_are_left_out_unless_named(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "profile", tmp_path / "profile")
    plan = Plan.load(run_folder / "plan.json")
    plan.with_notes(provenance={**plan.provenance, "profile": "0" * 16}).save(tmp_path / "plan.json")
    found = Findings.load(tmp_path / "plan.json")
    assert (found.profile, found.audit) == (None, None)
    assert any("audit.json" in text for text in found.passed_over)
    for named, message in (("profile", "the plan was made from 0000"), ("nowhere", "does not exist")):
        with pytest.raises(ArtefactError, match=message):
            Findings.load(tmp_path / "plan.json", tmp_path / named)


def test_a_broken_file_costs_no_finished_run(run_folder: Path, tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    shutil.copytree(run_folder, out)
    (out / "bench.json").write_text("{")
    summary = compress(recipe, out)
    assert summary["kv_share"] <= 0.5

"""Export with a repair: the written checkpoint has the repaired weights, says so, and the model in memory keeps its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moacompress.calibration.profile.profiler import profile as make_profile
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ArtefactError, ModelError
from moacompress.exporter.card import model_card
from moacompress.exporter.exporting import check_reusable, export, exported_plan
from moacompress.models.source import load_source
from moacompress.recipe import Recipe
from moacompress.repair.plans import repair_by_profile
from moacompress.repair.projections import with_weights
from moacompress.report.inspection import inspect_plan, overview
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach
from moacompress.runtime.checkpoint import load_checkpoint

SAMPLES = {"lengths": [768], "samples": 4, "validation_samples": 4, "text_samples": 0}
RECIPE = {"calibration": {"sources": [{"generator": "needle"}], **SAMPLES}, "profile": {"draws": 1}}


@pytest.fixture(scope="module", autouse=True)
def _any_gain() -> Iterator[None]:
    """Takes a repair of whatever gain: four samples of a random model leave every gain in doubt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moacompress.repair.plans.SIGNIFICANT", 1.1)
        yield


@pytest.fixture(scope="module")
def profiled(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    torch.set_num_threads(1)
    recipe = Recipe.model_validate({"model": str(tiny_folder), **RECIPE})
    return make_profile(load_source(tiny_folder), tmp_path_factory.mktemp("repair") / "profile", recipe)


@pytest.fixture(scope="module")
def plan(profiled: Profile) -> Plan:
    return Plan.uniform(profiled.shape, Rule(4, 16, 0), 16)


@pytest.fixture(scope="module")
def repaired(profiled: Profile, plan: Plan, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_folder, plan, tmp_path_factory.mktemp("export") / "model", repair=profiled.path)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        found: torch.Tensor = model(torch.randint(4, 99, (1, 200))).logits
    return found


def test_the_checkpoint_has_the_repaired_weights(
    repaired: Path, profiled: Profile, plan: Plan, tiny_folder: Path, tmp_path: Path
) -> None:
    source = load_source(tiny_folder)
    own = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    done = repair_by_profile(source, plan, profiled)
    assert len(done.weights) == 3
    export(source, plan, tmp_path / "again", repair=profiled)
    assert all(torch.equal(tensor, own[name]) for name, tensor in source.model.state_dict().items())
    with with_weights(source.model, done.weights):
        expected = logits(attach(source.model, plan))
        detach(source.model)
    for folder in (repaired, tmp_path / "again"):
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), expected, atol=1e-5)
    assert not torch.allclose(logits(attach(source.model, plan)), expected, atol=1e-2)


def test_plan_card_and_inspect_say_so(repaired: Path, profiled: Profile, plan: Plan) -> None:
    written = exported_plan(repaired)
    assert written is not None
    assert written.model.weights_fingerprint == plan.model.weights_fingerprint
    notes = written.provenance["repair"]
    assert notes["profile"] == profiled.fingerprint
    assert notes["harm"]["after"]["mean"] < notes["harm"]["before"]["mean"]
    assert notes["tokens"] > 2000
    card = (repaired / "README.md").read_text()
    assert "the same weights" not in card
    assert "The weights are not the source's" in card
    assert f"{notes['harm']['after']['mean']:.3g}" in card
    data = inspect_plan(written, None, repaired)
    assert data["repair"] == notes
    assert "repair" in [row[0] for row in overview(written, data).rows]
    assert inspect_plan(plan)["repair"] is None


def test_the_same_repair_is_reused_and_another_refused(
    repaired: Path, profiled: Profile, plan: Plan, tiny_folder: Path, tmp_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in repaired.iterdir()}
    assert export(tiny_folder, plan, repaired, repair=profiled.path) == repaired
    # the plan of the checkpoint is the plan without its repair, which is the checkpoint's
    assert export(tiny_folder, repaired / "plan.json", repaired, repair=profiled) == repaired
    assert {file: file.stat().st_mtime_ns for file in repaired.iterdir()} == before
    with pytest.raises(ArtefactError, match=f"it was repaired with the profile {profiled.fingerprint}"):
        export(tiny_folder, plan, repaired)
    plain = export(tiny_folder, repaired / "plan.json", tmp_path / "plain")
    assert exported_plan(plain) == plan
    assert check_reusable(plain, plan)
    changed = [load_checkpoint(folder, "auto", "cpu").plan.changed_weights for folder in (repaired, plain)]
    assert changed == ["repaired", None]
    with pytest.raises(ArtefactError, match="with this repair .it has none."):
        export(tiny_folder, plan, plain, repair=profiled)


def test_a_repair_that_does_not_help_is_noted(profiled: Profile, plan: Plan) -> None:
    notes = {"penalty": None, "tokens": 3000, "profile": profiled.fingerprint}
    card = model_card(plan.with_notes(provenance={"repair": notes}))
    assert "the same weights" in card
    assert "changed nothing" in card
    assert "nothing to repair" in model_card(plan.with_notes(provenance={"repair": {**notes, "tokens": 0}}))
    tried = {"mean": -0.01, "error": 0.001, "p": 0.25}
    judged = {**notes, "harm": {"not_enough": tried}, "validation_samples": 3}
    card = model_card(plan.with_notes(provenance={"repair": judged}))
    assert "(a change of -0.01 ± 0.001 nats, mean and standard error, p .25)" in card
    assert "3 validation samples judged it, and a test needs 6" in card


def test_bad_profiles(profiled: Profile, plan: Plan, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="profile"):
        export(profiled.source, plan, tmp_path / "model", repair=tmp_path / "absent")
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    other = load_source(tmp_path / "other")
    theirs = Plan.uniform(other.shape, Rule(4, 16, 0), 16)
    with pytest.raises(ModelError, match="is of other weights"):
        export(other, theirs, tmp_path / "model", repair=profiled)
    (profiled.path / "calibration.safetensors").rename(tmp_path / "kept")
    try:
        with pytest.raises(ArtefactError, match="calibration"):
            export(profiled.source, plan, tmp_path / "model", repair=profiled)
    finally:
        (tmp_path / "kept").rename(profiled.path / "calibration.safetensors")
    assert not (tmp_path / "model").exists()


def test_nothing_is_left_of_one_that_is_stopped(
    profiled: Profile, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    source = load_source(profiled.source)
    own = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    stages = ("repair.projections.OutputProjection.changed", "repair.plans.kl_divergence")
    for name in (*stages, "exporter.exporting.verify_fresh"):
        with monkeypatch.context() as patch:
            patch.setattr(f"moacompress.{name}", stop)
            with pytest.raises(KeyboardInterrupt):
                export(source, plan, tmp_path / "model", repair=profiled)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, own[name]) for name, tensor in source.model.state_dict().items())
    assert not hasattr(source.model.config, "quantization_config")

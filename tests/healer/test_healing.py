"""A heal lowers held-out KL or leaves the weights, can be stopped at any step, and refuses what it should; its command."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moacompress
from moacompress.calibration.data.samples import load_samples
from moacompress.calibration.profile.store import Profile
from moacompress.cli import app
from moacompress.core.artefact_names import heal_folder
from moacompress.core.errors import ArtefactError, DataError, ModelError, PlanError, UsageError
from moacompress.core.progress import Progress
from moacompress.core.statistics import p_value, p_value_of_chosen
from moacompress.estimate.stopwatch import Stopwatch
from moacompress.healer.heal_estimate import estimate_heal
from moacompress.healer.heal_history import HealHistory, last_checkpoint
from moacompress.healer.heal_request import HealRequest
from moacompress.healer.heal_trainer import OneGpuArguments
from moacompress.healer.healing import heal
from moacompress.healer.teacher import HeldOut, Teacher
from moacompress.healer.trained_weights import as_written, check_installed, make_trainable, written_tensors
from moacompress.models.source import load_source, model_shape
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from moacompress.runtime.hf.attaching import attached_plan
from tests.healer.conftest import make_sharing

Place = dict[str, Path]
Make = Callable[..., Recipe]
RUNNER = CliRunner()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def measured(place: Place, folder: Path) -> list[float]:
    """Returns the held-out KL of a checkpoint as plain transformers loads it."""
    samples = load_samples(place["profile"] / "validation.safetensors")
    held_out = HeldOut(Teacher(load_source(place["dense"]).model), samples[:6])
    return held_out.kls(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        ({"steps": 10, "batch": 1000}, 0.8),
        ({"steps": 10, "batch": 1000, "lr": 1e-2, "train": "lora", "rank": 8}, 0.9),
        ({"steps": 10, "batch": 1000, "objective": "echoatt"}, 0.98),
    ],
    ids=["full", "lora", "echoatt"],
)
def test_held_out_kl_falls_and_is_that_of_what_is_written(
    flags: dict[str, Any], share: float, healable: Place, small: Make, tmp_path: Path, quick: None
) -> None:
    done = heal(healable["model"], tmp_path / "out", profile=healable["profile"], recipe=small(**flags))
    before, after = (done.notes["held_out_kl"][name]["mean"] for name in ("before", "after"))
    assert done.notes["improved"]
    assert after < share * before
    assert done.losses[-1] < done.losses[0]
    for folder, value in ((healable["model"], before), (done.folder, after)):
        found = measured(healable, folder)
        assert sum(found) / len(found) == pytest.approx(value, rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    plan, dense = Plan.load(done.folder / "plan.json"), Plan.load(healable["model"] / "plan.json")
    assert plan.key() == dense.key()
    assert plan.model.weights_fingerprint == dense.model.weights_fingerprint
    loaded = attached_plan(AutoModelForCausalLM.from_pretrained(done.folder))
    assert loaded is not None
    assert loaded.provenance["heal"] == done.notes


@pytest.mark.parametrize(("train", "modules"), [("lora", ("q_proj", "up_proj")), ("reuse", None), ("full", None)])
def test_layers_that_share_attention_are_healed(
    train: str,
    modules: tuple[str, ...] | None,
    healable: Place,
    small: Make,
    tmp_path: Path,
    quick: None,
    tiny_tokenizer: Any,
) -> None:
    """Their checkpoint has no queries and keys of theirs, and neither has the healed one."""
    plan = make_sharing(load_source(healable["dense"]), tiny_tokenizer, tmp_path / "shared")
    steps, rate = (16, 1e-2) if train == "lora" else (8, 3e-3)
    flags = {"steps": steps, "batch": 1000, "train": train, "lr": rate, "modules": modules}
    teacher: dict[str, Any] = {"profile": healable["profile"], "teacher": str(healable["dense"])}
    done = heal(tmp_path / "shared", tmp_path / "out", **teacher, recipe=small(**flags))
    assert done.notes["improved"]
    before, after = (done.notes["held_out_kl"][name]["mean"] for name in ("before", "after"))
    assert after < before
    found = measured(healable, done.folder)
    assert sum(found) / len(found) == pytest.approx(after, rel=1e-3)
    healed, shared, dense = (
        {name: tensor.shape for name, tensor in weights(folder).items()}
        for folder in (done.folder, tmp_path / "shared", healable["dense"])
    )
    assert healed == shared
    assert sum(shape.numel() for shape in healed.values()) < sum(shape.numel() for shape in dense.values())
    assert Plan.load(done.folder / "plan.json").shares == plan.shares


@pytest.mark.heavy
@pytest.mark.fresh_process
def test_what_is_written_loads_in_a_fresh_process_and_says_what_was_done(
    healable: Place, small: Make, tmp_path: Path
) -> None:
    done = heal(healable["model"], tmp_path / "out", profile=healable["profile"], recipe=small(steps=3))
    names = {"config.json", "model.safetensors", "tokenizer.json", "plan.json", "README.md", "LICENSE"}
    assert {path.name for path in done.folder.iterdir()} >= names
    notes = done.notes
    assert (notes["objective"], notes["train"], notes["steps"], len(done.losses)) == ("kl", "full", 3, 3)
    assert notes["tokens"] == pytest.approx(3 * 3 * 160, rel=0.2)
    assert notes["teacher"] == done.plan.model.weights_fingerprint != notes["from_weights"]
    assert notes["held_out_kl"]["samples"] == 6
    assert notes["held_out_kl"]["before"]["standard_error"] > 0
    card = (done.folder / "README.md").read_text()
    assert "## Healed" in card
    assert "distilled" in card
    assert f"{notes['held_out_kl']['after']['mean']:.4g}" in card
    shown = RUNNER.invoke(app, ["inspect", str(done.folder), "--json"])
    assert json.loads(shown.stdout)["healed"]["data"] == notes["data"]
    assert "held-out KL from" in RUNNER.invoke(app, ["inspect", str(done.folder)]).stdout


def test_the_same_heal_again_is_left_as_it_is(healable: Place, small: Make, tmp_path: Path, quick: None) -> None:
    arguments: dict[str, Any] = {"profile": healable["profile"], "recipe": small(steps=1)}
    done = heal(healable["model"], tmp_path / "out", **arguments)
    before = (done.folder / "model.safetensors").stat().st_mtime_ns
    again = heal(healable["model"], tmp_path / "out", **arguments)
    assert again.notes == done.notes
    found = estimate_heal(healable["model"], tmp_path / "out", **arguments)
    assert (found.seconds, found.facts["exists"]) == (0, True)
    assert (done.folder / "model.safetensors").stat().st_mtime_ns == before
    for asked in (heal, estimate_heal):
        with pytest.raises(ArtefactError, match="is not of this heal; choose another folder or pass --overwrite"):
            asked(healable["model"], tmp_path / "out", profile=healable["profile"], recipe=small(steps=2))
    arguments["recipe"] = small(steps=2)
    assert heal(healable["model"], tmp_path / "out", **arguments, overwrite=True).notes["steps"] == 2


class StopAfter(Progress):
    """Presses Ctrl-C in some step of the training."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, note: str = "") -> None:
        if note.startswith("loss"):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), 2)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_stopped_heal_ends_as_one_that_was_not(
    train: str, healable: Place, small: Make, tmp_path: Path, quick: None
) -> None:
    arguments: dict[str, Any] = {"profile": healable["profile"], "recipe": small(train=train, steps=4, evaluations=2)}
    whole = heal(healable["model"], tmp_path / "whole", **arguments)
    for stop in (1, 2) if train == "full" else (3,):  # in the step after so many
        with pytest.raises(KeyboardInterrupt):
            heal(healable["model"], tmp_path / "out", progress=StopAfter(stop), **arguments)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ArtefactError, match="holds another heal, which was stopped"):
        heal(healable["model"], tmp_path / "out", profile=healable["profile"], recipe=small(train=train, steps=3))
    resumed = heal(healable["model"], tmp_path / "out", **arguments)
    assert resumed.losses == whole.losses
    assert {**resumed.notes, "seconds": 0} == {**whole.notes, "seconds": 0}
    ours, theirs = weights(resumed.folder), weights(whole.folder)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_best_state_is_written_and_worse_ones_end_the_training(
    healable: Place, small: Make, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of the measured states is the best: what is written are its weights, two fruitless ones later.

    The p-value of its gain allows for the choice among the four that were measured after the start.
    """
    states, measured = [], []
    given, rng = iter([0.5, 0.4, 0.3, 0.6, 0.5, 0.1]), np.random.default_rng(0)

    def kls(self: HeldOut, model: Any) -> list[float]:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        measured.append((next(given) + rng.permutation(np.linspace(-0.2, 0.2, len(self.samples)))).tolist())
        return list(measured[-1])

    monkeypatch.setattr(HeldOut, "kls", kls)
    recipe = small(steps=8, evaluations=8, patience=2)
    done = heal(healable["model"], tmp_path / "out", profile=healable["profile"], recipe=recipe)
    assert [found["kl"] for found in done.notes["evaluations"]] == pytest.approx([0.5, 0.4, 0.3, 0.6, 0.5])
    assert (done.notes["best_step"], done.notes["steps"]) == (2, 4)
    start, *after = measured
    kl, chosen = done.notes["held_out_kl"], after.pop(1)
    assert kl["evaluations"] == 4
    assert kl["difference"]["p"] == p_value_of_chosen(chosen, after, start) > p_value(chosen, start)
    written = weights(done.folder)
    assert all(torch.equal(value, states[2][name]) for name, value in written.items())
    assert not all(torch.equal(value, states[3][name]) for name, value in written.items())


def test_where_nothing_was_better_the_start_is_written(
    healable: Place, small: Make, tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    done = heal(healable["model"], tmp_path / "out", profile=healable["profile"], recipe=small(lr=0.5, steps=3))
    assert not done.notes["improved"]
    assert done.notes["held_out_kl"]["after"] == done.notes["held_out_kl"]["before"]
    assert "no step lowered the held-out KL" in caplog.text
    before = weights(healable["model"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(done.folder).items())
    assert "the same weights" in (done.folder / "README.md").read_text()


@pytest.mark.parametrize(("train", "dtype"), [("full", "bfloat16"), ("lora", "float32"), ("lora", "bfloat16")])
def test_as_written_is_what_is_written_and_leaves_the_model(
    train: str, dtype: str, healable: Place, small: Make
) -> None:
    """Merged LoRA gives the logits of LoRA beside the weights, but for what the checkpoint's dtype rounds away."""
    model: Any = AutoModelForCausalLM.from_pretrained(healable["model"]).requires_grad_(False)
    plan = Plan.load(healable["model"] / "plan.json")
    made = make_trainable(model, plan, small(train=train).heal, 0)
    torch.manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    ids, wanted = torch.randint(4, 95, (1, 120)), getattr(torch, dtype)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        beside = made(input_ids=ids, use_cache=False).logits
        with as_written(made, wanted) as written:
            merged = written(input_ids=ids, use_cache=False).logits
        tensors = written_tensors(made, wanted)
        fresh: Any = AutoModelForCausalLM.from_pretrained(healable["model"])
        held = fresh.state_dict()
        for name, tensor in tensors.items():
            assert tensor.dtype == wanted
            held[name].copy_(tensor)
        loaded = fresh(ids, use_cache=False).logits
    assert (merged - loaded).abs().max() < 1e-4
    assert (merged - beside).abs().max() < (1e-3 if dtype == "float32" else 0.5) * beside.abs().max()
    if train == "lora":
        layers = {name.rpartition(".")[0].rpartition(".")[2] for name in tensors}
        assert layers == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def refused(error: type[Exception], match: str, healable: Place, out: Path, recipe: Recipe, **changed: Any) -> None:
    arguments: dict[str, Any] = {"target": healable["model"], "profile": healable["profile"], **changed}
    with pytest.raises(error, match=match):
        heal(arguments.pop("target"), out, recipe=recipe, **arguments)
    assert not out.exists()
    assert not heal_folder(out).exists()


def test_bad_requests_are_refused_and_leave_nothing(
    healable: Place, small: Make, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    refused(UsageError, "shares no attention", healable, out, small(train="reuse"))
    refused(UsageError, "cannot compute in float16", healable, out, small().override(dtype="float16"))
    refused(ArtefactError, "is not a profile", healable, out, small(), profile=healable["dense"])
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    refused(PlanError, "is for other weights", healable, out, small(), teacher=str(tmp_path / "other"))
    refused(UsageError, "none to train", healable, out, small(train="gates"))
    lost = replace(Profile.load(healable["profile"]), source=str(tmp_path / "gone"))
    refused(ModelError, r"is not at .*gone any more.*--teacher", healable, out, small(), profile=lost)
    validation = Profile.load(healable["profile"]).validation
    monkeypatch.setattr(Profile, "calibration_samples", lambda self: validation)
    seen = "training samples are validation samples of the profile"
    with pytest.raises(DataError, match=seen):
        heal(healable["model"], out, profile=healable["profile"], recipe=small(samples=2, text_share=0.5))
    assert not out.exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    for package in ("peft", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, gone=package: None if name == gone else there(name))
            with pytest.raises(UsageError, match=rf"needs the package {package}.*moacompress\[heal\]"):
                check_installed("lora")


def test_a_mistyped_folder_costs_nobody_s_files(healable: Place, small: Make, tmp_path: Path) -> None:
    for name in ("out", "other.heal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    for name, match in (("out", "is not a compressed model"), ("other", "no heal left it")):
        for asked in (heal, estimate_heal):
            with pytest.raises(ArtefactError, match=match):
                asked(healable["model"], tmp_path / name, profile=healable["profile"], recipe=small(), overwrite=True)
    assert len(list(tmp_path.rglob("mine.txt"))) == 2
    (tmp_path / "linked.heal").mkdir()
    (tmp_path / "linked.heal" / "heal.json").write_text("{}")
    (tmp_path / "linked.heal" / "checkpoints").symlink_to(tmp_path / "out")
    with pytest.raises(ArtefactError, match="checkpoints is a link, which is not followed"):
        heal(healable["model"], tmp_path / "linked", profile=healable["profile"], recipe=small(), overwrite=True)
    with pytest.raises(ArtefactError, match="is the model that is to be healed"):
        heal(healable["model"], healable["model"], profile=healable["profile"], recipe=small(), overwrite=True)
    shutil.copytree(healable["model"], tmp_path / "around")
    shutil.copytree(healable["profile"], tmp_path / "around" / "profile")
    profile = tmp_path / "around" / "profile"
    with pytest.raises(ArtefactError, match=r"profile is read by this command; choose another folder"):
        heal(healable["model"], tmp_path / "around", profile=profile, recipe=small(), overwrite=True)


def test_a_request_that_failed_before_it_trained_is_in_nobody_s_way(
    healable: Place, small: Make, tmp_path: Path, quick: None
) -> None:
    for asked in (estimate_heal, heal):
        with pytest.raises(DataError, match="takes at least 265 tokens; 128 were asked for"):
            asked(healable["model"], tmp_path / "out", profile=healable["profile"], recipe=small(samples=50))
    limited = small(steps=10_000, max_minutes=0.005, evaluations=1)
    done = heal(healable["model"], tmp_path / "out", profile=healable["profile"], recipe=limited)
    assert 1 <= done.notes["steps"] < 1000  # the time ended it
    assert done.notes["evaluations"][-1]["step"] == done.notes["steps"]


def test_a_dry_run_says_the_cost_and_writes_nothing(
    healable: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = f"--profile {healable['profile']} --train full --steps 7 --batch 576 --samples 12".split()
    command = ["heal", str(healable["model"]), "-o", str(tmp_path / "out"), *options, "--dry-run"]
    monkeypatch.setattr(Stopwatch, "slowdown", 10.0)
    said = RUNNER.invoke(app, [*command, "--json"])
    assert said.exit_code == 0, said.stderr
    data = json.loads(said.stdout)
    assert (data["steps"], data["tokens"], data["held_out_samples"], data["new_samples"]) == (7, 7 * 3 * 160, 6, 0)
    assert data["slowdown"] == 10
    fewer = "--steps 2 --samples 4 --batch 5760 --set heal.evaluations=8"  # a step takes each sample once at most
    few = json.loads(RUNNER.invoke(app, [*command, *fewer.split(), "--json"]).stdout)
    assert (few["tokens"], few["evaluations"]) == (2 * 4 * 160, 3)
    assert data["train_seconds"] > 0
    assert data["evaluation_seconds"] > 0
    assert data["peak_bytes"] > 4 * data["trained_parameters"]
    assert list(tmp_path.iterdir()) == []
    assert "nothing was trained or written" in RUNNER.invoke(app, command).stdout


def test_adapters_are_for_linear_layers_alone(tiny_model: Any, small: Make) -> None:
    """The experts of a mixture are one tensor, which is none."""
    model = tiny_model("qwen3_moe")
    plan = Plan.full(model_shape(model))
    moacompress.attach(model, plan)
    trained = make_trainable(model, plan, small(train="lora").heal, 0)
    found = written_tensors(trained, torch.float32)
    layers = {name.rpartition(".weight")[0].rpartition(".")[2] for name in found}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_batch_is_one_sample_where_a_process_sees_several_gpus(tmp_path: Path) -> None:
    arguments = OneGpuArguments(output_dir=str(tmp_path), per_device_train_batch_size=1, use_cpu=True, report_to=[])
    arguments._n_gpu = 4
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 1)


def test_a_checkpoint_that_was_cut_is_not_the_last(tmp_path: Path) -> None:
    states = {2: '{"global_step": 2}', 4: '{"global_step": 4}', 6: "", 8: '{"global_step": 2}', 10: None}
    for step, state in states.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "history.json").write_text('{"start": {"step": 0}}')
    with pytest.raises(ArtefactError, match="history.json is damaged"):
        HealHistory.read(tmp_path)
    for name, write in (("optimizer.pt", torch.save), ("adapter_model.safetensors", save_file)):
        file = tmp_path / "checkpoint-4" / name
        write({"moment": torch.zeros(50)}, file)
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        file.write_bytes(whole)


@pytest.mark.heavy
def test_two_processes_train_one_model(healable: Place, tmp_path: Path) -> None:
    options = "--train full --lr 1e-3 --steps 6 --batch 576 --samples 16 --set heal.evaluations=2"
    place = ["--profile", str(healable["profile"]), "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["moacompress", "heal", str(healable["model"]), *place, *options.split(), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    data = json.loads(ran.stdout)
    assert data["processes"] == 2
    assert data["tokens"] == pytest.approx(6 * 4 * 160, rel=0.2)
    after = measured(healable, tmp_path / "out")
    assert sum(after) / len(after) == pytest.approx(data["held_out_kl"]["after"]["mean"], rel=1e-3)
    assert data["held_out_kl"]["after"]["mean"] < data["held_out_kl"]["before"]["mean"]


@pytest.fixture
def command(healable: dict[str, Path], tmp_path: Path, quick: None) -> list[str]:
    (tmp_path / "run").mkdir()
    for name in ("model", "profile"):
        (tmp_path / "run" / name).symlink_to(healable[name])
    options = "--train full --lr 1e-3 --steps 2 --batch 576 --samples 12 --set heal.evaluations=1"
    return ["heal", str(tmp_path / "run"), "-o", str(tmp_path / "out"), *options.split()]


def test_json_then_a_table_of_the_same(command: list[str]) -> None:
    done = RUNNER.invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (data["steps"], len(data["losses"]), data["improved"]) == (2, 2, True)
    shown = RUNNER.invoke(app, command)  # the checkpoint is there already
    assert shown.exit_code == 0, shown.stderr
    assert f"{data['held_out_kl']['after']['mean']:.4g}" in shown.stdout
    assert "of the KL" in shown.stdout


def test_after_ctrl_c_the_command_is_said(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moacompress.healer.healing.heal", stopped)
    monkeypatch.setattr(sys, "argv", ["moacompress", *command])
    done = RUNNER.invoke(app, command)
    assert done.exit_code == 130
    assert f"resume with: moacompress heal {command[1]} -o" in done.stderr


def test_another_gpu_than_the_first(command: list[str]) -> None:
    with pytest.raises(UsageError, match="cannot train on cuda:1: .* set CUDA_VISIBLE_DEVICES=1 and give cuda"):
        HealRequest.of(command[1], None, None, Recipe().override(device="cuda:1"))

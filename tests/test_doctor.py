"""`doctor`: the environment, and models that can and can not be compressed, without their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moacompress import doctor
from moacompress.doctor import check_environment, check_model
from moacompress.runtime.attaching import attach, detach


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return check_environment()


def test_environment(environment: dict[str, Any]) -> None:
    assert environment["problems"] == []
    assert environment["autoload"] == {"registered": True, "switch": None, "reason": None}
    assert environment["versions"]["torch"]
    assert environment["cpu"]["cores"] >= 1
    assert set(environment["extras"]) == {"demo", "offload"}
    json.dumps(environment)


def test_the_kernel_is_said(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from moacompress.kernels import cpu_ops
    from moacompress.report.health import environment_table

    kernel = environment["kernel"]
    assert kernel["name"] == ("reference" if cpu_ops.load().isa is None else "cpu")
    assert kernel["isa"] == cpu_ops.load().isa
    monkeypatch.setenv("MOACOMPRESS_KERNEL", "reference")
    asked = doctor._kernel()
    assert asked == {"name": "reference", "isa": None, "reason": "MOACOMPRESS_KERNEL asks for it"}
    monkeypatch.setenv("MOACOMPRESS_KERNEL", "fast")
    wrong = doctor._kernel()
    assert wrong["name"] is None
    assert wrong["reason"] == "MOACOMPRESS_KERNEL is 'fast', not one of cpu, reference"
    for found, text in ((asked, "reference: MOACOMPRESS_KERNEL asks for it"), (wrong, "none: MOACOMPRESS_KERNEL is")):
        assert text in shown(environment_table({**environment, "kernel": found}))


def shown(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_switched_off_autoload_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert any("TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off" in problem for problem in check_environment()["problems"])


def test_an_autoload_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "raise SystemExit('nothing is registered')")
    problems = check_environment()["problems"]
    assert problems == ["from_pretrained would not see compressed checkpoints: nothing is registered"]


def test_a_model_needs_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_folder / "config.json", tmp_path / "config.json")
    found = check_model(str(tmp_path))
    assert found["problems"] == []
    assert (found["model_type"], found["layers"], found["heads"], found["kv_heads"]) == ("llama", 3, 4, 2)
    assert (found["sliding_layers"], found["context"], found["compressed"]) == (0, 4096, False)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2},
            "bloom does not dispatch its attention",
        ),
        ({"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}, "bert attends in both directions"),
        ({"model_type": "t5"}, "t5 is not a causal language model"),
        ({"model_type": "nonesuch"}, "is not a model that transformers knows"),
        ({}, "is not a model that transformers knows"),
    ],
)
def test_what_is_not_supported_is_said(config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    problems = check_model(str(tmp_path))["problems"]
    assert len(problems) == 1
    assert problem in problems[0]
    assert "\n" not in problems[0]


def test_not_a_model(tmp_path: Path) -> None:
    assert "without config.json" in check_model(str(tmp_path))["problems"][0]
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf is not a model that transformers knows" in check_model(str(tmp_path / "x.gguf"))["problems"][0]


def test_a_compressed_model_is_known(
    tmp_path: Path, tiny_model: Callable[..., Any], random_plan: Callable[..., Any]
) -> None:
    from moacompress.models import model_shape

    model = tiny_model("llama")
    plan = random_plan(model_shape(model))
    attach(model, plan)
    model.save_pretrained(tmp_path)
    detach(model)
    plan.save(tmp_path / "plan.json")
    found = check_model(str(tmp_path))
    assert (found["compressed"], found["problems"]) == (True, [])
    data = plan.to_dict()
    data["model"]["model_type"] = "mistral"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert "the plan is for another model" in check_model(str(tmp_path))["problems"][0]

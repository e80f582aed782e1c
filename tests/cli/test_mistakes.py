"""What a newcomer gets wrong: each ends in one sentence that says what to do, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moacompress.cli import app
from moacompress.exporter.exporting import export
from moacompress.models.source import load_source
from moacompress.rules.plan import Plan

RUNNER = CliRunner()
SMALL = ("--lengths", "700", "--samples", "4", "--validation-samples", "2", "--source", "needle", "--trials", "1")


@pytest.fixture(scope="module")
def compressed_model(
    tiny_folder: Path, random_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out: Path = tmp_path_factory.mktemp("mistakes") / "model"
    source = load_source(str(tiny_folder), dtype="float32")
    export(source, random_plan(source.shape, seed=5), out)
    return out


def mistake(exit_code: int, *arguments: str | Path) -> str:
    """Runs a command that must fail, and returns its one sentence."""
    result = RUNNER.invoke(app, list(map(str, arguments)))
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("moacompress: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0].removeprefix("moacompress: error: ")


def compress(exit_code: int, model: str | Path, out: Path, *more: str | Path) -> str:
    """Runs `compress` likewise; what it was to fill must not be there."""
    text = mistake(exit_code, "compress", model, "-o", out, *SMALL, *(more or ("--budget", "50%")))
    assert not out.exists()
    return text


def test_no_model() -> None:
    assert "name one as MODEL (hub id, folder or .gguf file)" in mistake(2, "compress", "--budget", "25%")


def test_a_wrong_folder(tiny_folder: Path, tmp_path: Path) -> None:
    text = compress(1, tiny_folder / "config.json", tmp_path / "out")
    assert text.endswith(f"is neither a model folder nor a .gguf file; give its folder {tiny_folder}")
    (tmp_path / "photos").mkdir()
    text = compress(1, tmp_path / "photos", tmp_path / "out")
    assert "is a folder without config.json, not a model" in text
    text = mistake(1, "inspect", tmp_path / "photos")
    assert "make a plan with `moacompress search` or `moacompress compress`" in text


def test_a_mistyped_model_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    assert "does not exist" in compress(1, f"{tiny_folder}x", out)
    assert list(tmp_path.iterdir()) == []
    for command in ("profile", "export"):
        rest = ["plan.json"] if command == "export" else ["--source", "needle"]
        mistake(1, command, f"{tiny_folder}x", *rest, "-o", out)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that loads a model."""

    def load(*arguments: Any, **options: Any) -> Any:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("moacompress.models.source.load_source", load)
    monkeypatch.setattr("moacompress.runtime.ready_model.load_source", load)


WRONG_DATA = [
    (2, ("--tasks", "needle-nois"), "unknown task 'needle-nois'; did you mean 'needle-noise'?"),
    (1, ("--tasks", "needle-prose"), "task needle-prose needs prose: give a .txt file or a folder of them as text"),
    (2, ("--tasks", "qa-squad"), "moacompress eval OUT --tasks qa-squad --squad FILE"),
    (1, ("--text", "no-such-folder"), "cannot read no-such-folder: there is no such file or folder; give its path"),
    (
        1,
        ("--source", "no-such-file.jsonl"),
        "cannot read no-such-file.jsonl: there is no such file or folder; give its path",
    ),
    (1, ("--source", "empty.jsonl"), "file:empty.jsonl has no rows"),
    (1, ("--source", "columns.jsonl"), "file:columns.jsonl has the columns a; rows need `messages`"),
    (1, ("--source", "broken.jsonl"), "line 1 of broken.jsonl is not valid JSON"),
    (1, ("--source", "needle-prose"), "calibration.text names no file or folder of it (--text)"),
]


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry"])
@pytest.mark.parametrize(("code", "wrong", "said"), WRONG_DATA, ids=[" ".join(row[1]) for row in WRONG_DATA])
@pytest.mark.usefixtures("no_model")
def test_wrong_data_is_found_before_the_model_is_loaded(
    code: int,
    wrong: tuple[str, ...],
    said: str,
    more: tuple[str, ...],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty", ""), ("columns", '{"a": 1}'), ("broken", "{")):
        Path(f"{name}.jsonl").write_text(text)
    assert said in compress(code, tiny_folder, tmp_path / "out", "--budget", "50%", *wrong, *more)
    if "--tasks" not in wrong:
        assert said in mistake(code, "profile", tiny_folder, "-o", tmp_path / "out", *wrong, *more)
    assert not (tmp_path / "out").exists()


TOO_SMALL = [
    (("--budget", "0.1%"), "the smallest takes"),
    (("--budget", "50%", "--source", "rows.jsonl"), "file:rows.jsonl has 0 calibration prompts of"),
    (("--budget", "50%", "--source", "prose.txt"), "prose.txt"),
    (("--budget", "50%", "--tasks", "line-lookup", "--lengths", "100"), "100"),
]


@pytest.mark.parametrize(("more", "said"), TOO_SMALL, ids=[" ".join(row[0]) for row in TOO_SMALL])
def test_what_cannot_be_is_found_before_anything_is_timed(
    more: tuple[str, ...], said: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a short one"}\n{"prompt": "and another"}\n{"prompt": "and a third"}\n')
    Path("prose.txt").write_text("Not many words.")
    monkeypatch.setattr("moacompress.pipeline.estimate_run", lambda *arguments: pytest.fail("something was timed"))
    monkeypatch.setattr("moacompress.run_estimate.estimate_run", lambda *arguments: pytest.fail("something was timed"))
    for dry in ((), ("--dry-run",)):
        assert said in compress(1, tiny_folder, tmp_path / "out", *more, *dry)


def test_weights_in_a_pickle(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    text = compress(1, folder, tmp_path / "out")
    assert "safetensors" in text
    assert "pickle" in text.lower()


def test_a_bare_25(tiny_folder: Path, tmp_path: Path) -> None:
    assert "did you mean '25%'?" in compress(2, tiny_folder, tmp_path / "out", "--budget", "25")


def test_a_budget_that_is_too_small(tiny_folder: Path, tmp_path: Path) -> None:
    text = compress(1, tiny_folder, tmp_path / "out", "--budget", "0.1%")
    assert "%" in text
    assert any(word in text for word in ("smallest", "least", "at least"))


def test_the_plan_of_another_model(
    compressed_model: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model("llama", seed=9).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    text = mistake(1, "export", other, compressed_model / "plan.json", "-o", tmp_path / "model")
    assert "weights" in text
    assert not (tmp_path / "model").exists()


def test_a_full_disk(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moacompress.core.files.os.fsync", full)
    assert "No space left on device; nothing was changed" in compress(1, tiny_folder, tmp_path / "out")


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("moacompress.models.hub.can_reach", lambda endpoint: False)
    begun = time.monotonic()
    text = compress(1, "nobody/such-a-model", tmp_path / "out")
    assert time.monotonic() - begun < 10
    assert "cannot be reached" in text
    assert "give a model folder or a .gguf file, or connect to the network" in text


def test_longer_than_the_context(tiny_folder: Path, tmp_path: Path) -> None:
    longest = json.loads((tiny_folder / "config.json").read_text())["max_position_embeddings"]
    text = mistake(1, "compress", tiny_folder, "--budget", "50%", "-o", tmp_path / "out", "--lengths", str(2 * longest))
    assert f"{longest:,}" in text or str(longest) in text


def test_an_unknown_family(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    text = compress(1, folder, tmp_path / "out")
    assert "did you mean 'llama'?" in text


def test_a_compressed_model_again(compressed_model: Path, tmp_path: Path) -> None:
    text = compress(1, compressed_model, tmp_path / "out")
    assert "is compressed already" in text
    assert "give the dense model it was made from" in text


def test_a_run_again(compressed_model: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(compressed_model, run / "model")
    (run / "recipe.json").write_text(json.dumps({"model": "somewhere/dense"}))
    said = "is the folder of a run, not a dense model; give the one that it was made from"
    assert f"{run} {said}: somewhere/dense" in compress(1, run, tmp_path / "out")
    (run / "recipe.json").write_text("{")
    assert compress(1, run, tmp_path / "out").endswith(said)
    shutil.copytree(tiny_folder, run / "dense")
    assert f"{said}: {run / 'dense'}" in compress(1, run, tmp_path / "out")


def test_a_plan_of_another_shape(
    compressed_model: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    text = mistake(1, "export", other, compressed_model / "plan.json", "-o", tmp_path / "model")
    assert "it is for 3 layers, and this model has 2 layers" in text


MISTAKEN = [
    ("search nothing --budget 25%", 1, "there is no profile nothing; make one with `moacompress profile`"),
    ("search RUN --budget 25%", 1, "is not a profile: it has no profile.json; give RUN/profile"),
    ("search MODEL --budget 25%", 1, "is not a profile: it has no profile.json; make one with `moacompress profile`"),
    ("compress MODEL --budget 25% -o MODEL/LICENSE", 1, "cannot write to MODEL/LICENSE: it is not a folder"),
    (
        "compress MODEL --budget 25% -o MODEL/LICENSE/out",
        1,
        "cannot write to MODEL/LICENSE/out: MODEL/LICENSE is not a",
    ),
    ("profile MODEL -o MODEL/LICENSE", 1, "cannot write to MODEL/LICENSE: it is not a folder; choose another one"),
    ("export MODEL MODEL", 1, "MODEL holds no plan.json; make a plan with `moacompress search`"),
    ("export MODEL zero.json", 1, "plan zero.json is not valid JSON"),
    ("eval nothing", 2, "nothing does not exist; give a compressed model, or the folder of a run"),
    ("bench MODEL", 2, "MODEL is a model but not a compressed one; compress it first"),
    ("chat nothing --ask hi", 2, "nothing does not exist; give a compressed model, or the folder of a run"),
    ("heal RUN -o out", 2, "there is no profile beside"),
    ("eval RUN --lm-eval no_such_task --tasks needle-noise", 2, "lm-evaluation-harness has no task 'no_such_task'"),
    ("compress MODEL --budget 25% --recipe bad.yaml", 2, "recipe bad.yaml is not valid YAML"),
]


@pytest.mark.parametrize(("command", "code", "said"), MISTAKEN, ids=[row[0] for row in MISTAKEN])
@pytest.mark.usefixtures("no_model")
def test_mistaken_places(
    command: str,
    code: int,
    said: str,
    tiny_folder: Path,
    compressed_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--lm-eval" in command:
        pytest.importorskip("lm_eval")
    monkeypatch.setattr("moacompress.evaluation.runner.load_checkpoint", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(compressed_model, run / "model")
    if command.startswith("search"):
        (run / "profile").mkdir()
        (run / "profile" / "profile.json").write_text('{"format": "moacompress-profile"}')
    Path("zero.json").touch()
    Path("bad.yaml").write_text("budget: [25%")
    before = sorted(tmp_path.rglob("*"))
    places = {"MODEL": str(tiny_folder), "RUN": str(run)}

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    assert placed(said) in mistake(code, *map(placed, command.split()))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_may_not_be_written(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode))
    said = f"{tmp_path} may not be written; choose another folder"
    assert said in compress(1, tiny_folder, tmp_path / "out")
    assert said in mistake(1, "profile", tiny_folder, "-o", tmp_path / "out")


def test_a_run_that_is_given_where_a_plan_is(
    compressed_model: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = RUNNER.invoke(
        app, ["export", str(tiny_folder), str(compressed_model), "-o", str(tmp_path / "m"), "--dry-run"]
    )
    assert done.exit_code == 0, done.output


def test_stopped_midway(tiny_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C names the command that resumes; what it resumes from is tested with kills in `tests/pipeline`."""
    out = tmp_path / "out"
    arguments = [
        "compress",
        str(tiny_folder),
        "--budget",
        "50%",
        "-o",
        str(out),
        "--prompts",
        "2",
        "--tasks",
        "needle-noise",
        *SMALL,
    ]
    arguments += ["--effort", "quick"]
    command = [sys.executable, "-m", "moacompress", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background are born deaf to it
    )
    deadline = time.monotonic() + 120
    while not (out / "profile" / "profile.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted; what was written is kept; resume with: moacompress compress " in said
    assert "Traceback" not in said

"""Devices: what cannot be computed on is refused in one sentence, by the command line and by whatever loads a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moacompress.cli import app
from moacompress.core.errors import UsageError
from moacompress.models.device import check_device
from moacompress.models.source import load_source
from moacompress.runtime.checkpoint import load_checkpoint

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
CASES = [
    ("cud", "'cud' is not the name of a torch device; did you mean 'cuda'?"),
    ("zzzzzz", "'zzzzzz' is not the name of a torch device; give one such as cpu, cuda, mps, xpu or cuda:0"),
    ("cuda:x", "'cuda:x' is not the name of a torch device; a number may follow the colon, such as cuda:0"),
    ("meta", "the device meta cannot be used: tensors on it have no numbers"),
    ("cpu:3", "the device cpu:3 cannot be used: all cores are one device"),
    pytest.param("cuda", "the device cuda cannot be used: torch", marks=NO_CUDA),
    pytest.param("cuda:9", "the device cuda:9 cannot be used: torch", marks=NO_CUDA),
    pytest.param("mps", "the device mps cannot be used: torch .* finds no Apple GPU; give --device cpu"),
]


@pytest.mark.parametrize(("name", "message"), CASES)
def test_refused(name: str, message: str, tiny_folder: Path, compressed: Path) -> None:
    for refusing in (
        lambda: check_device(name),
        lambda: load_source(tiny_folder, device=name),
        lambda: load_checkpoint(compressed / "model", "auto", name),
    ):
        with pytest.raises(UsageError, match=message.replace("?", r"\?")):
            refusing()


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, message in ((1, "there is one GPU, cuda:0"), (4, "the GPUs are cuda:0 to cuda:3")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(UsageError, match=f"the device cuda:9 cannot be used: {message}"):
            check_device("cuda:9")


@pytest.mark.parametrize(
    "command",
    [
        "profile MODEL -o OUT",
        "compress MODEL --budget 50% -o OUT --dry-run",
        "search NOTHING --budget 50% -o OUT",
        "eval RUN",
        "heal RUN -o OUT",
        "chat RUN --ask hello",
        "data preview MODEL",
        "demo -o OUT --model MODEL",
        "doctor MODEL",
        "export MODEL PLAN -o OUT",
        "inspect RUN --show-tokens NOTHING",
    ],
)
def test_every_command_says_so_at_once(command: str, tiny_folder: Path, compressed: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(tiny_folder), "RUN": str(compressed), "OUT": str(tmp_path / "out"), "NOTHING": "nothing"}
    done = CliRunner().invoke(app, [*(places.get(word, word) for word in command.split()), "--device", "meta"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.strip().startswith("moacompress: error: the device meta cannot be used: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("inspect RUN --device cpu", "--device has no effect without --show-tokens"),
        ("doctor --device cpu", "--device has no effect without MODEL"),
        ("bench RUN --quick --device auto", "bench keeps a model on one device, and auto is a device map"),
        ("heal RUN -o OUT --device auto", "heal keeps a model on one device, and auto is a device map"),
        ("chat RUN --ask hello --device auto", "chat keeps a model on one device, and auto is a device map"),
    ],
)
def test_a_command_that_takes_no_such_device_says_so(command: str, said: str, compressed: Path, tmp_path: Path) -> None:
    places = {"RUN": str(compressed), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(app, [places.get(word, word) for word in command.split()])
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr

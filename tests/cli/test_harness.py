"""What holds for every command: help, one JSON object, exit codes, one line for an error, nothing heavy for help."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import moacompress
from moacompress.cli import COMMANDS, app
from moacompress.cli.bars import RichProgress
from moacompress.cli.harness import Command, CommandRun, Output, resumes_with
from moacompress.core.errors import BudgetError, ModelError
from moacompress.core.tables import facts
from moacompress.kernels import dispatch
from moacompress.kernels.capabilities import Status
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.triton.triton_backend import TritonBackend
from tests.weight_blocks import types_of, write_gguf

RUNNER = CliRunner()
PLAN = Path(__file__).resolve().parents[2] / "docs" / "plans" / "smollm2-135m-quarter.json"


def call(function: Callable[[CommandRun], Output], *arguments: str, runner: CliRunner = RUNNER, **settings: Any) -> Any:
    """Runs a command of its own, made of `function`, beside another so that it keeps its name."""
    program = typer.Typer(rich_markup_mode=None)
    program.command("probe")(Command(function, **settings))
    program.command("other")(lambda: None)
    return runner.invoke(program, ["probe", *arguments])


@pytest.mark.parametrize("name", [*COMMANDS, "data preview", "recipe init", "recipe validate", "recipe show"])
def test_help_ends_with_examples_that_parse(name: str) -> None:
    shown = RUNNER.invoke(app, [*name.split(), "--help"]).stdout
    for option in ("--json", "--verbose", "--quiet", "--debug", "--log-file"):
        assert option in shown
    assert "--out" not in shown or shown.index("--out") < shown.index("--json")  # its own come first
    examples = shown.partition("Examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        program, *words = shlex.split(example)
        group, found = typer.main.get_command(app), words[: len(name.split())]
        assert (program, found) == ("moacompress", name.split())
        for word in found:
            group = group.commands[word]  # type: ignore[attr-defined]
        group.make_context(name, words[len(found) :])


LIGHT = """
import sys
from moacompress.cli import main
for line in sys.argv[1].splitlines():
    sys.argv = ["moacompress", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
    heavy = [name for name in ("torch", "transformers", "optuna", "datasets") if name in sys.modules]
    assert not heavy, (line, heavy)
"""


def test_nothing_heavy_is_imported() -> None:
    lines = f"--help\n--version\ncompress --help\ndata preview --help\ninspect {PLAN}"
    done = subprocess.run([sys.executable, "-c", LIGHT, lines], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


PRINTING = """
import ctypes, os, subprocess, sys
from moacompress.cli.harness import Output, command, group

def prints(run):
    print("python")
    ctypes.CDLL(None).puts(b"held back by C")
    os.write(1, b"system\\n")
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    run.write("asked for\\n")
    return Output({"found": 1}, ["one"])

group("", {"prints": command()(prints)})()
"""


def test_what_libraries_print_goes_to_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTING, "prints", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},  # C would not hold back
    )
    assert done.stdout == 'asked for\n{"found": 1}\n'
    assert {"python", "held back by C", "system", "child"} <= set(done.stderr.splitlines())


CLOSING = """
import os, sys
for number in sys.argv.pop(1).split(","):
    os.close(int(number))
os.execv(sys.executable, [sys.executable, "-m", "moacompress", *sys.argv[1:]])
"""


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_stream_may_be_closed(closed: str) -> None:
    command = [sys.executable, "-c", CLOSING, closed, "inspect", str(PLAN), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == ("1" not in closed)


@pytest.mark.heavy
def test_quiet_is_quiet_where_a_library_has_a_bar_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf", types_of("Q8_0"))
    options = f"profile {file} --weights dense --lengths 128 -q --dry-run".split()
    done = subprocess.run([sys.executable, "-m", "moacompress", *options], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_password_is_printed_or_logged(tmp_path: Path) -> None:
    """Whatever a library's error says; the traceback and the log show the chain of errors."""
    url = "mysql://me:s3/cret@host/db?passwd=s3cret"

    def failing(run: CommandRun) -> Output:
        logging.getLogger("moacompress.somewhere").warning("the storage is %s", url)
        try:
            raise ValueError(f"no such host in {url}")
        except ValueError as error:
            logging.getLogger("moacompress.somewhere").warning("failed", exc_info=True)
            raise ModelError(f"cannot use '{url}'") from error

    result = call(failing, "--debug", "--log-file", str(tmp_path / "run.log"))
    for text in (result.stderr, (tmp_path / "run.log").read_text("utf-8")):
        assert "Traceback" in text
        assert "mysql://me@host/db" in text
        assert "cret" not in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_result_that_cannot_be_printed_is_said_in_a_line() -> None:
    ask = [sys.executable, "-m", "moacompress", "inspect", str(PLAN)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(ask, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "error: the result cannot be printed: " in done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"moacompress {moacompress.__version__}\n")


def test_an_error_is_one_line_and_its_exit_code() -> None:
    def fails(run: CommandRun) -> Output:
        raise ModelError("it is\nnot a model")

    result = call(fails, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "moacompress: error: it is not a model\n"

    def misused(run: CommandRun) -> Output:
        raise BudgetError("no")

    assert call(misused).exit_code == 2

    def breaks(run: CommandRun) -> Output:
        raise KeyError("oops")

    result = call(breaks)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "moacompress: error: KeyError: 'oops'; run again with --debug\n"
    for failing in (fails, breaks):
        assert "Traceback" in call(failing, "--debug").stderr


def test_an_interrupt_says_that_the_same_command_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])

    def interrupted(run: CommandRun) -> Output:
        raise KeyboardInterrupt

    result = call(interrupted)
    assert (result.exit_code, result.stdout) == (130, "")
    said = "moacompress: interrupted; what was written is kept, and the same command resumes from there\n"
    assert result.stderr == said
    again = call(interrupted, "--overwrite", takes=("overwrite",)).stderr
    assert "resumes from there without --overwrite, with which it starts from scratch\n" in again
    argv = ["/usr/bin/moacompress", "compress", "my model", "--overwrite", "-o", "out"]
    wanted = "interrupted; what was written is kept; resume with: moacompress compress 'my model' -o out"
    assert resumes_with(argv, overwrite=True) == wanted
    assert resumes_with(["/site/moacompress/__main__.py", "demo"], overwrite=False).endswith("moacompress demo")


def noisy(run: CommandRun) -> Output:
    print("a library talks")
    warnings.warn("and warns", stacklevel=1)
    logging.getLogger("moacompress.somewhere").warning("be careful")
    logging.getLogger("moacompress.somewhere").info("by the way")
    run.progress.start("work", 2)
    run.progress.step()
    run.progress.done()
    return Output({"a": float("nan"), "b": (1, "ä\n")}, ["shown [to] people"], exit_code=1)


def test_json_is_one_object_on_one_line_and_nothing_else() -> None:
    result = call(noisy, "--json")
    assert result.exit_code == 1
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == {"a": None, "b": [1, "ä\n"]}
    assert "a library talks" in result.stderr
    assert "work: 1/2" in result.stderr
    assert "moacompress: warning: be careful" in result.stderr
    assert "and warns" not in result.stderr
    assert "by the way" not in result.stderr


def test_people_see_text_and_choose_how_much() -> None:
    assert call(noisy).stdout == "shown [to] people\n"
    assert "moacompress: info: by the way" in call(noisy, "-v").stderr
    quiet = call(noisy, "-q").stderr
    assert "work" not in quiet
    assert "be careful" not in quiet
    unprintable = call(lambda run: Output({}, ["→"]), runner=CliRunner(charset="latin-1"))
    assert unprintable.exit_code == 1
    assert "error: the result cannot be printed: " in unprintable.stderr


def test_a_log_file_has_everything_behind_what_is_there(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.log"
    for _ in range(2):
        result = call(noisy, "--log-file", str(log), "-q")
        assert "by the way" not in result.stderr
    text = log.read_text("utf-8")
    assert text.count("WARNING moacompress.somewhere: be careful") == 2
    assert text.count("INFO moacompress.somewhere: by the way") == 2
    result = call(noisy, "--log-file", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "cannot write the log" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no file that is always full")
def test_a_log_on_a_full_disk_costs_no_result() -> None:
    result = call(noisy, "--log-file", "/dev/full")
    assert (result.exit_code, result.stdout) == (1, "shown [to] people\n")  # as without a log
    assert result.stderr.count("warning: the log /dev/full cannot be written: ") == 1
    assert "Traceback" not in result.stderr
    assert "Logging error" not in result.stderr


def test_the_first_line_says_which_kernels_run(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    def call_computing(*arguments: str) -> str:
        return str(call(noisy, *arguments, settings=("device",), computes=True).stderr)

    assert "kernels" not in call(noisy).stderr
    assert "kernels" not in call_computing("-q")
    lines = [line for line in call_computing().splitlines() if "talks" not in line and "careful" not in line]
    assert lines[0].startswith("kernels: ")
    request.addfinalizer(dispatch.forget)
    monkeypatch.setattr(CpuBackend, "status", lambda self: Status(False, "there is no compiler"))
    dispatch.forget()
    text = call_computing()
    slower = f"a decode step takes {dispatch.REFERENCE_TIMES} times as long as with compiled kernels"
    assert f"kernels: plain PyTorch, as there is no compiler; {slower}" in text
    monkeypatch.setattr("moacompress.models.placement.check_device", lambda name: None)
    text = call_computing("--device", "cuda")
    assert f"plain PyTorch on cuda, as {TritonBackend().status().reason}; how much slower that is there was not" in text
    for status in (
        Status(False, "there is no compiler"),
        Status(True, "compiled"),
    ):  # the CPU's kernels run nothing there
        monkeypatch.setattr(CpuBackend, "status", lambda self, status=status: status)
        monkeypatch.setattr(TritonBackend, "status", lambda self: Status(True, "there is a card"))
        monkeypatch.setattr(TritonBackend, "supports", lambda self, device, dtype: device == "cuda")
        dispatch.forget()
        found = call_computing("--device", "cuda:1")
        assert "kernels: triton on cuda:1, whose speed there has not been measured" in found
        assert "kernels: plain PyTorch, as there is no compiler" in call_computing() or status.works


def test_colours_are_left_out_where_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[3" not in call(lambda run: Output({}, [facts("Title", {"a": "b"})])).stdout


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_ends_what_it_began(terminal: bool, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as file:
        progress = RichProgress(Console(file=file, force_terminal=terminal, width=100))
        progress.done()
        progress.start("first", 2)
        progress.step("half [way]")
        progress.start("second", 1)
        progress.step()
        progress.done()
        progress.done()
        file.seek(0)
        text = file.read()
    assert "first" in text
    assert "1/1" in text


def test_a_piped_log_has_stage_percent_and_time_left_now_and_then(tmp_path: Path) -> None:
    now = [0.0]
    with (tmp_path / "out").open("w+") as file:
        progress = RichProgress(Console(file=file, width=100), clock=lambda: now[0])
        progress.plan({"profile": 60.0, "search": 120.0}, in_seconds=True)
        progress.stage("profile")
        progress.start("profiling", 60)
        for _ in range(60):
            now[0] += 1
            progress.step()
        progress.stage("search")
        progress.start("searching", 2)
        for _ in range(4):  # one step that takes a minute, of which every sample is a beat
            now[0] += 15
            progress.beat()
        progress.step("best 0.1 nats")
        progress.done()
        file.seek(0)
        lines = file.read().splitlines()
    assert lines == [
        "1 of 2: profile, 0%, about 3 min left",
        "1 of 2: profile, profiling: 60 steps, 0%, about 3 min left",
        *(
            f"1 of 2: profile, profiling: {spent}/60, {spent / 180:.0%}, about {left} left"
            for spent, left in ((15, "3 min"), (30, "2 min"), (45, "2 min"), (60, "2 min"))
        ),
        "1 of 2: profile, profiling: 60/60 in 60 s",
        "2 of 2: search, 33%, about 2 min left",
        "2 of 2: search, searching: 2 steps, 33%, about 2 min left",
        "2 of 2: search, searching: 0/2, 42%, about 2 min left",
        "2 of 2: search, searching: 0/2, 50%, about 2 min left",
        "2 of 2: search, searching: 0/2, 58%, about 75 s left",
        "2 of 2: search, searching: 0/2, 67%, about 60 s left",
        "2 of 2: search, searching: 1/2 in 60 s",
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "2", "runs in one process, and this is one of 2; start it without torchrun"),
        ("WORLD_SIZE", "many", "the environment has WORLD_SIZE='many'"),
        ("RANK", "first", "the environment has RANK='first'"),
    ],
)
def test_a_command_of_one_process_is_refused_in_several(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(name, value)
    done = call(lambda run: Output({}, ["done"]))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1

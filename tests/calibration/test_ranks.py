"""Profiles by the processes of `torchrun` are those of one process, to the bit; what a killed run left is taken up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moacompress.calibration.profile.store import Profile
from moacompress.cli import app
from moacompress.core.artefact_names import GATES_FILE, SAMPLES_FOLDER
from tests.preloaded import Preloaded

OPTIONS = (
    "--lengths",
    "700,800",
    "--samples",
    "5",
    "--validation-samples",
    "2",
    "--set",
    "profile.draws=1",
    "--gates",
    "--json",
)
KILLED = """
import os, signal, time
from moacompress.calibration.profile import sample_run
from moacompress.cli import main
from moacompress.core.ranks import rank

run, numbers = sample_run.sample_statistics, []

def once(*arguments):
    if numbers:  # it has written its first one
        time.sleep(1000 if rank() == 0 else 1)
        os.kill(os.getpid(), signal.SIGKILL)
    numbers.append(arguments[6])
    return run(*arguments)

sample_run.sample_statistics = once
main()
"""


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Returns the profile of one process."""
    out = tmp_path_factory.mktemp("alone") / "profile"
    done = CliRunner().invoke(app, ["profile", str(tiny_folder), "-o", str(out), *OPTIONS])
    assert done.exit_code == 0, done.stderr
    return Profile.load(out)


@pytest.mark.heavy
def test_a_killed_run_of_two_processes_is_finished_by_three(
    alone: Profile, tiny_folder: Path, tmp_path: Path, preloaded: Preloaded
) -> None:
    out, script = tmp_path / "profile", tmp_path / "killed.py"
    script.write_text(KILLED)
    killed = preloaded.run(script, "profile", tiny_folder, "-o", out, *OPTIONS, ranks=2)
    assert killed.returncode != 0
    assert killed.stdout == ""
    samples = {path: path.stat().st_mtime_ns for path in (out / SAMPLES_FOLDER).glob("*.safetensors")}
    assert 1 <= len(samples) <= 2
    gates = (out / GATES_FILE).stat().st_mtime_ns
    with pytest.raises(Exception, match="not finished"):
        Profile.load(out)

    resumed = preloaded.run("profile", tiny_folder, "-o", out, *OPTIONS, "--log-file", tmp_path / "run.log", ranks=3)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stdout.count("\n") == 1
    assert json.loads(resumed.stdout)["samples"] == 5
    assert resumed.stderr.count("profiling: 5/5") == 1
    assert all(path.stat().st_mtime_ns == written for path, written in samples.items())
    assert (out / GATES_FILE).stat().st_mtime_ns == gates
    assert {path.name for path in tmp_path.glob("run*.log")} == {"run.log", "run.1.log", "run.2.log"}

    made = Profile.load(out)
    assert made.fingerprint == alone.fingerprint
    assert made.gates_fingerprint == alone.gates_fingerprint
    assert made.gates is not None
    assert alone.gates is not None
    assert made.gates.report == alone.gates.report
    assert made.statistics.shapes == alone.statistics.shapes
    for name, array in made.statistics.arrays.items():
        assert np.array_equal(array, alone.statistics.arrays[name]), name
    assert [list(sample.input_ids) for sample in made.validation] == [list(s.input_ids) for s in alone.validation]


def test_one_process_says_what_is_wrong_and_all_fail(tiny_folder: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    log = tmp_path / "run.log"
    options = ("-o", tmp_path / "profile", "--lengths", "9k", "--log-file", log, "--json")
    failed = preloaded.run("profile", tiny_folder, *options, ranks=2)
    assert failed.returncode != 0
    assert failed.stdout == ""
    errors = [line for line in failed.stderr.splitlines() if line.startswith("moacompress: error")]
    assert len(errors) == 1
    assert "in rank 0 of 2 on " in errors[0]
    assert "9,216 is beyond the model's context" in errors[0]
    assert "9,216 is beyond the model's context" in log.read_text()
    assert not (tmp_path / "profile").exists()

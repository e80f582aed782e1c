"""The benchmark for GPUs, tried on a CPU at sizes whose times mean nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "gpu.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MOACOMPRESS_KERNEL": "triton"}
    command = [sys.executable, str(SCRIPT), "-o", str(folder / "gpu.json"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "gpu.json").read_text("utf-8").splitlines()]


def test_results_are_lines_and_a_table_that_says_that_nothing_was_measured(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--small", "--parts", "ceiling,prefill")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(tmp_path)
    assert [row["part"] for row in found] == ["ceiling", "ceiling", "prefill", "prefill"]
    assert {row["card"] for row in found} == {"a CPU, not a measurement"}
    assert found[0]["GB/s"] > 0
    assert {row.get("kernel") for row in found[2:]} == {"triton"}
    assert done.stdout.count("| prefill |") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "speed"], "'speed' is no part"),
        (["--parts", "ruler,decode", "--model", "there"], "goes alone"),
        (["--parts", "ceiling"], "there is no CUDA device"),
    ],
)
def test_what_cannot_be_asked(arguments, said, tmp_path):
    import torch

    if said == "there is no CUDA device" and torch.cuda.is_available():
        arguments = ["--parts", "speed"]
        said = "is no part"
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.heavy
def test_all_parts(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--small", "--minutes", "60")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(tmp_path)
    assert {row["part"] for row in found} == {"correct", "ceiling", "decode", "prefill", "profile", "e2e"}
    compared = [row for row in found if row["part"] == "correct"]
    assert len(compared) == 12
    assert all(row["right"] for row in compared)
    failed = [str(row["what"]) for row in found if "failed" in row]
    assert all("FlashInfer" in what or "quantized" in what for what in failed)
    assert not any(row["what"] == "its time is over" for row in found)

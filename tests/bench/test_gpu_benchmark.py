"""The benchmark for GPUs, tried on a CPU at sizes whose times mean nothing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.clock import Clock

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"
SCRIPT = FOLDER / "gpu.py"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _beside_the_script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MOACOMPRESS_KERNEL": "triton"}
    command = [sys.executable, str(SCRIPT), "-o", str(folder / "gpu.json"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "gpu.json").read_text("utf-8").splitlines()]


@pytest.mark.heavy
@needs_triton
def test_results_are_lines_and_tables_that_say_that_nothing_was_measured(tmp_path, load_script, monkeypatch, capsys):
    done = run(tmp_path, "--device", "cpu", "--small", "--parts", "prefill,ceiling")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(tmp_path)
    assert [row["part"] for row in found if row["part"] != "targets"] == [*["ceiling"] * 2, *["prefill"] * 3]
    assert {row["card"] for row in found if "card" in row} == {"a CPU, not a measurement"}
    assert found[0]["GB/s"] > 0
    assert [row.get("kernel") for row in found[2:5]] == ["triton", "triton", None]
    assert all(row["share_of_ceiling"] > 0 for row in found[2:4])
    assert "cuDNN" in str(found[4]["skipped"])
    assert {row["met"] for row in found if row["part"] == "targets"} == {"not measured"}
    assert done.stdout.count("| prefill |") == 3
    assert "| decode, bfloat16: share of copying | >= 0.85 | not measured | not measured |" in done.stdout
    monkeypatch.setattr("sys.argv", ["gpu.py", "-o", str(tmp_path / "gpu.json"), "--show"])
    load_script(SCRIPT).main()
    assert capsys.readouterr().out == done.stdout


def test_what_a_killed_run_left_half_written(load_script, tmp_path, monkeypatch, capsys):
    script, out = load_script(SCRIPT), tmp_path / "gpu.json"
    out.write_text('{"part": "ceiling"}\nnonsense\n{"part": "dec')
    monkeypatch.setattr("sys.argv", ["gpu.py", "-o", str(out), "--device", "cpu", "--small"])
    monkeypatch.setattr(script, "run_parts", lambda asked, write: write({"part": "ceiling", "what": "a"}))
    script.main()
    lines = out.read_text().splitlines()
    assert lines[:3] == ['{"part": "ceiling"}', "nonsense", '{"part": "ceiling", "what": "a"}']
    assert {json.loads(line)["part"] for line in lines[3:]} == {"targets"}
    assert capsys.readouterr().err == ""  # what this run wrote can all be read
    assert [row["part"] for row in script.read_rows(out)][:2] == ["ceiling", "ceiling"]
    assert "1 lines cannot be read and are left out" in capsys.readouterr().err


def test_what_cannot_be_asked(load_script, tmp_path, monkeypatch, capsys):
    script, out = load_script(SCRIPT), str(tmp_path / "gpu.json")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for parts, said in (("speed", "'speed' is none of: correct, ceiling"), ("ceiling", "there is no CUDA device")):
        monkeypatch.setattr("sys.argv", ["gpu.py", "-o", out, "--parts", parts])
        with pytest.raises(SystemExit, match="2"):
            script.main()
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_part_does_not_use_goes_to_the_next_ones():
    from gpu_rows import Boxes

    clock = Clock()
    boxes = Boxes({"a": 1, "b": 2, "c": 3}, 60, clock)
    assert boxes.begin("a") == 10
    clock.now = 5
    assert boxes.begin("b") == 5 + 55 * 2 / 5
    clock.now = 50
    assert boxes.begin("c") == 60


def test_what_would_begin_after_the_end_of_a_box_is_a_row_that_says_so():
    from gpu_rows import TIME_IS_OVER, NotHereError, Task, run_tasks

    clock = Clock()

    def takes(seconds, error=None):
        clock.now += seconds
        if error is not None:
            raise error
        return {"ms": 1.5}

    tasks = [
        Task("left out", lambda: takes(99)),
        Task("done", lambda: takes(4)),
        Task("not there", lambda: takes(1, NotHereError("no such card"))),
        Task("wrong", lambda: takes(1, RuntimeError("out of memory\nat 0x0"))),
        Task("too long", lambda: takes(10)),
        Task("too late", lambda: takes(99)),
        Task("too late as well", lambda: takes(99)),
    ]
    begun, found = [], []
    run_tasks(tasks, 10.0, clock, lambda *task: begun.append(task), found.append, first=1)
    assert begun == [(1, "done"), (2, "not there"), (3, "wrong"), (4, "too long")]
    assert found == [
        {"what": "done", "ms": 1.5, "seconds": 4.0},
        {"what": "not there", "skipped": "no such card", "seconds": 1.0},
        {"what": "wrong", "failed": "RuntimeError: out of memory", "seconds": 1.0},
        {"what": "too long", "ms": 1.5, "seconds": 10.0},
        {"what": "too late", "skipped": TIME_IS_OVER},
        {"what": "too late as well", "skipped": TIME_IS_OVER},
    ]


def _dies_and_hangs(connection, asked):
    """A process of two parts of two tasks: the first dies in its second task, the second hangs in its first."""
    from gpu_worker import Begun

    for part in asked.parts:
        for number in range(asked.first if part == asked.parts[0] else 0, 2):
            connection.send(Begun(part, number, f"task {number}", time.monotonic()))
            if (part, number) == ("a", 1):
                os._exit(3)
            if (part, number) == ("b", 0):
                time.sleep(600)
            connection.send({"part": part, "what": f"task {number}", "ms": 1})
    connection.send(None)


def test_another_process_goes_on_behind_a_task_in_which_one_ended(monkeypatch):
    import gpu_worker

    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])  # where the other process finds this module
    monkeypatch.setattr(gpu_worker, "GRACE", 0.5)
    found = []
    gpu_worker.run_parts(gpu_worker.Asked("cpu", True, ("a", "b"), 0.0), found.append, _dies_and_hangs)
    assert [(row["part"], row["what"], row.get("ms")) for row in found] == [
        ("a", "task 0", 1),
        ("a", "task 1", None),
        ("b", "task 0", None),
        ("b", "task 1", 1),
    ]
    assert "ended with 3" in found[1]["failed"]
    assert "it took" in found[2]["failed"]


def test_a_process_that_cannot_begin_is_not_started_again(monkeypatch):
    import gpu_worker

    found = []
    gpu_worker.run_parts(gpu_worker.Asked("cpu", True, ("a",), 0.0), found.append, os._exit)  # which takes one argument
    assert [(row["what"], "ended with" in row["failed"]) for row in found] == [("start", True)]


def test_targets_are_met_or_not_or_not_measured():
    from gpu_targets import targets

    def ring(pair, us, **more):
        return {"part": "decode", "what": f"56 x 8,192 {pair}, a step in rings", "us": us, **more}

    def step(cell, side, ms, size, graph):
        return {"part": "e2e", "what": f"{cell} {side}", "ms": ms, "bytes": size, "graph": graph}

    rows = [
        ring("native/native", 100.0, share_of_ceiling=0.8),
        ring("int8/int4", 40.0),
        {"part": "decode", "what": "56 x 8,192 int4/int4, a step in rings", "failed": "RuntimeError: no"},
        step("8 x 32,768", "full span", 16.0, 50, True),
        step("8 x 32,768", "a quarter, native/native", 8.0, 24, True),
        step("8 x 32,768", "a quarter, int8/int4", 7.0, 18, False),
        step("8 x 32,768", "plain", 40.0, 50, False),
        {"part": "e2e", "what": "8,192 tokens, plain, its largest batch", "tokens/s": 1000.0},
        {"part": "e2e", "what": "8,192 tokens, a quarter, native/native, its largest batch", "tokens/s": 7000.0},
        {"part": "prefill", "what": "4,096 tokens, a quarter", "x visible share": 1.05},
        {"part": "correct", "what": "300 steps, gates", "right": True},
        {"part": "correct", "what": "300 steps, native/native", "right": False},
        {"part": "correct", "what": "decode int8/int8", "right": True},
        {"part": "correct", "what": "waits of the host in a step, gates", "skipped": "not here"},
    ]
    found = targets(rows)
    assert all({"part", "what", "wanted", "measured", "met"} == {*row} for row in found)
    measured = {row["what"]: (row["measured"], row["met"]) for row in found if row["met"] != "not measured"}
    assert measured == {
        "decode, bfloat16: share of copying": (0.8, "no"),
        "decode, int8/int4: times as fast as bfloat16": (2.5, "yes"),
        "8 x 32,768, a quarter, native/native: share of R over full span, both graphs": (2 * 24 / 50, "yes"),
        "8 x 32,768: times as fast as plain transformers": (5.0, "yes"),
        "tokens a second at the largest batch: times those of plain transformers": (7.0, "no"),
        "prefill of 4,096: times the visible share of FlashAttention-2": (1.05, "yes"),
        "300 replayed steps are the steps: share of plans": (0.5, "no"),
        "kernels as plain PyTorch: share": (1.0, "yes"),
    }


def test_flashinfer_is_given_its_own_layout_before_it_is_timed(monkeypatch):
    """A stand-in that takes what those functions take, and refuses what it would have to copy."""
    import gpu_layers
    import torch
    from gpu_runner import Runner
    from gpu_sizes import SMALL

    given, planned = [], []

    def attend(query, pool):
        assert pool.is_contiguous()
        assert query.is_contiguous()
        given.append((query, pool))

    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str, **_: bool) -> None:
            assert layout == "NHD"

        def plan(self, indptr, indices, last, heads, kv_heads, dim, page, **dtypes):
            planned.append((indptr.tolist(), indices.tolist(), last.tolist(), heads, kv_heads, dim, page))

        def run(self, query, pool):
            attend(query, pool)

    def xqa(query, pool, workspace, tables, lengths, longest, *, bmm1_scale, kv_layout):
        assert (tables.tolist(), lengths.tolist(), longest) == ([[*range(5)], [*range(5, 10)]], [80, 80], 80)
        assert (bmm1_scale, kv_layout) == (0.25, "NHD")
        attend(query, pool)

    for name in ("flashinfer", "flashinfer.decode"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.BatchDecodeWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
        module.xqa_batch_decode_with_kv_cache = xqa  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    runner = Runner("cpu", SMALL)
    query, key, value = packed = gpu_layers._packed(runner, 2, 96)
    monkeypatch.setattr(gpu_layers, "_packed", lambda *_: packed)
    for kernel in gpu_layers.FLASHINFER:
        given.clear()
        row = gpu_layers._flashinfer_row(runner, 2, 96, kernel)
        assert row["kept"] == 80
        assert len(given) == 2
        assert len({pool.data_ptr() for _, pool in given}) == 1
        for side, wanted in enumerate((key, value)):
            for token in (0, 17, 79):
                found = given[0][1][5 + token // 16, side, token % 16]  # of the second row
                assert torch.equal(found, wanted[1, :, token])
        assert torch.equal(given[0][0], query[:, :, 0])
    assert planned == [([0, 5, 10], [*range(10)], [16, 16], 4, 2, 16, 16)]


def test_a_trace_says_who_waits():
    from gpu_correct import host_traffic

    before = [("cudaDeviceSynchronize", 1.0), ("Memcpy HtoD (Pageable -> Device)", 2.0), ("steps", 3.0)]
    step = [("cudaLaunchKernel", 4.0), ("Memcpy DtoD (Device -> Device)", 4.5), ("cudaGraphLaunch", 5.0)]
    after = [("cudaDeviceSynchronize", 9.0)]
    assert host_traffic([*before, *step, *after]) == (0, 0)
    waiting = [("cudaMemcpyAsync", 4.1), ("cudaStreamSynchronize", 4.2), ("Memcpy DtoH (Device -> Pageable)", 4.3)]
    assert host_traffic([*before, *step, *waiting, *after]) == (1, 1)


@needs_triton
@pytest.mark.heavy
def test_all_parts(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--small", "--minutes", "60")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [row for row in rows(tmp_path) if row["part"] != "targets"]
    assert {row["part"] for row in found} == {"correct", "ceiling", "decode", "prefill", "e2e"}
    compared = [row for row in found if "right" in row]
    assert len(compared) == 4 + 4 + 11
    assert all(row["right"] for row in compared)
    assert [row["what"] for row in found if "failed" in row] == []
    skipped = [str(row["what"]) for row in found if "skipped" in row]
    named = ("FlashInfer", "cuDNN", "waits", "static cache")
    assert all(any(name in what for name in named) for what in skipped)
    assert str(next(row["what"] for row in found if row["part"] == "e2e")).endswith("plain, its largest batch")

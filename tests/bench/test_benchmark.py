"""A whole benchmark of a tiny checkpoint: what is in it, how it resumes, what it refuses. No time is asserted."""

import json
import math
import subprocess
from dataclasses import replace

import pytest
import torch

from moacompress.bench import benchmark, peak
from moacompress.bench.bench_request import SIDES, BenchRequest, Cell
from moacompress.bench.benchmark import run_bench
from moacompress.core.errors import ArtefactError, MoaCompressError
from moacompress.rules.plan import Plan

SMALL = BenchRequest((96, 160), (1, 2), ("float32",), tokens=2, repeats=2, prefill_repeats=1, peak=False)
ONE = replace(SMALL, lengths=(96,), batches=(2,))


def test_every_cell_has_its_fields(compressed, tmp_path):
    out = tmp_path / "deep" / "bench.json"
    report = run_bench(compressed, replace(SMALL, batches=(2,)), out=out)
    assert json.loads(out.read_text()) == report
    assert sorted(path.name for path in out.parent.iterdir()) == ["bench.cells.jsonl", "bench.json"]
    places = [(row["phase"], row["length"], row["batch"], row["dtype"]) for row in report["runs"]]
    assert places == [(phase, n, 2, "float32") for n in (96, 160) for phase in ("decode", "prefill")]
    plan = Plan.load(compressed / "model" / "plan.json")
    for row in report["runs"]:
        assert all(math.isfinite(row[f"{side}_ms"]) and row[f"{side}_ms"] > 0 for side in SIDES)
        assert row["kv_bytes_plan"] == plan.kv_bytes(row["length"], row["batch"])
        assert row["kv_bytes_dense"] == plan.model.dense_kv_bytes(row["length"], row["batch"])
        assert row["weight_bytes"] == 4 * sum(
            p.numel() for p in benchmark.load_checkpoint(compressed / "model", "float32", "cpu").model.parameters()
        )
        assert row["kernel"] in ("cpu", "reference")
        steps = {"cpu": ["all layers"], "reference": ["cache step"]}[row["kernel"]]
        assert row["routes"].get("plan") == (steps if row["phase"] == "decode" else None)
        assert row["dense_best"] in ("dense", "static cache, compiled")
        assert (row["peak_bytes_plan"], row["peak_bytes_dense"]) == (None, None)
        graphs = row["graphs"].get("dense_static")
        assert (graphs is None) == (row["phase"] == "prefill")
        assert graphs is None or graphs["steps"] == graphs["graph_calls"] == 2 * 3
    assert [(row["batch"], row["against"]) for row in report["break_even"]] == [
        (2, against) for against in ("dense", "dense_best")
    ]
    assert {"cpu", "threads", "torch", "kernel", "isa"} <= set(report["environment"])


def test_it_goes_on_where_it_was_stopped(compressed, tmp_path, monkeypatch):
    out, small = tmp_path / "bench.json", replace(SMALL, sides=("plan", "dense"))
    original, taken = benchmark.interleave, []

    def interleave(turns, *rest):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(list(turns))
        return original(turns, *rest)

    monkeypatch.setattr(benchmark, "interleave", interleave)
    with pytest.raises(KeyboardInterrupt):
        run_bench(compressed, small, out=out)
    assert not out.exists()
    assert (tmp_path / "bench.cells.jsonl").exists()
    monkeypatch.setattr(benchmark, "interleave", lambda *arguments: taken.append("again") or original(*arguments))
    report = run_bench(compressed, small, out=out)
    assert taken.count("again") == 5
    monkeypatch.setattr(benchmark, "interleave", None)
    monkeypatch.setattr(benchmark, "load_checkpoint", None)  # nothing is left to measure, so nothing is loaded
    assert run_bench(compressed, small, out=out) == report
    before = out.read_bytes()
    with pytest.raises(ArtefactError, match="another configuration: tokens 2 where this one has 3"):
        run_bench(compressed, replace(small, tokens=3), out=out)
    assert out.read_bytes() == before
    monkeypatch.undo()
    other = replace(small, tokens=3, batches=(1,), lengths=(96,))
    assert len(run_bench(compressed, other, out=out, overwrite=True)["runs"]) == 2


@pytest.mark.heavy
def test_a_compiled_step_whose_graph_breaks_is_never_the_best(compressed, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward

    def broken(self, x):
        torch._dynamo.graph_break()
        return original(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", broken)
    (row,) = run_bench(compressed, replace(ONE, prefill_repeats=0))["runs"]
    assert row["dense_best"] == "dense"
    assert row["dense_best_ms"] == row["dense_ms"]
    assert "its graph breaks" in row["dense_best_refused"]
    with pytest.raises(MoaCompressError, match=r"compiled step of plan cannot be timed, because its graph breaks"):
        run_bench(compressed, replace(ONE, compile=True, sides=("plan",)))


def test_without_a_compiler_the_best_is_plain_dense(compressed, monkeypatch):
    from moacompress.bench import graphs

    def fails(module, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(graphs, "_lookup_backend", lambda name: fails)
    (row,) = run_bench(compressed, replace(ONE, prefill_repeats=0, sides=("plan", "dense_best")))["runs"]
    assert (row["dense_best"], row["dense_ms"]) == ("dense", None)
    assert row["dense_best_ms"] > 0
    assert row["dense_best_refused"].startswith("it cannot be compiled: ")


@pytest.mark.heavy
def test_all_sides_compiled(compressed):
    (row,) = run_bench(compressed, replace(ONE, prefill_repeats=0, compile=True))["runs"]
    assert row["compiled"] == ["dense_static", "full_span", "plan"]
    for graphs in row["graphs"].values():
        assert (graphs["graph_breaks"], graphs["recompiles"]) == (0, 0)
        assert graphs["graph_calls"] == graphs["steps"]


@pytest.mark.heavy
def test_peaks_come_from_processes_of_their_own(compressed, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    cell, request = Cell("bfloat16", 1024, 2), replace(ONE, prefill_repeats=1)
    found = peak.peak_bytes(compressed / "model", "dense", cell, request)
    assert set(found) == {"loaded", "decode", "prefill"}
    assert 2**26 < found["loaded"] < 2**32
    assert found["decode"] > found["loaded"] - 2**26


def test_peaks_are_filed_by_side_and_phase(compressed, monkeypatch):
    asked = []

    def peaks(folder, side, cell, request):
        asked.append(side)
        return {"loaded": 1, "decode": 10 * len(asked), "prefill": 10 * len(asked) + 1}

    monkeypatch.setattr(benchmark, "peak_bytes", peaks)
    decode, prefill = run_bench(compressed, replace(ONE, peak=True))["runs"]
    assert asked == ["plan", "full_span", "dense"]
    assert [decode[f"peak_bytes_{side}"] for side in asked] == [10, 20, 30]
    assert [prefill[f"peak_bytes_{side}"] for side in asked] == [11, 21, 31]


@pytest.mark.parametrize(
    ("code", "said"), [(-9, "ended by signal 9, as the system does where memory runs out"), (1, "ValueError: no")]
)
def test_a_peak_that_fails_is_one_sentence(code, said, compressed, monkeypatch):
    done = subprocess.CompletedProcess([], code, "", "a warning\nValueError: no\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **more: done)
    with pytest.raises(MoaCompressError) as caught:
        peak.peak_bytes(compressed / "model", "plan", Cell("float32", 96, 1), ONE)
    assert said in str(caught.value)
    assert "--no-peak leaves it out" in str(caught.value)

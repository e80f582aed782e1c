"""`moacompress bench` on a tiny checkpoint: what it prints and writes, and how it fails. No time is asserted."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cli import commands
from tests.printed import printed

invoke = partial(commands.invoke, "bench")
SMALL = ("--lengths", "96", "--tokens", "2", "--repeats", "6", "--prefill-repeats", "1", "--no-peak")
FIELDS = {
    "phase", "length", "batch", "dtype", "plan_ms", "full_span_ms", "dense_ms", "dense_best_ms", "kv_bytes_plan",
    "kv_bytes_dense", "bits", "weight_bytes", "peak_bytes_plan", "peak_bytes_dense", "kernel",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from moacompress.bench import graphs

    monkeypatch.setattr(graphs, "BACKEND", "eager")


def test_json_is_one_line(compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = (*SMALL, "--sides", "plan,full_span,dense", "--batch", "2,1", "--dtype", "float32,bfloat16")
    result = invoke(compressed, *arguments, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    data = json.loads(result.stdout)
    assert json.loads(out.read_text()) == data
    assert len(data["runs"]) == 2 * 2 * 2  # phases, batches, dtypes
    assert all(set(row) >= FIELDS for row in data["runs"])
    assert {row["dtype"] for row in data["runs"]} == {"float32", "bfloat16"}
    assert {"batch", "dtype", "against", "length", "how", "text"} == set(data["break_even"][0])


def test_tables(compressed: Path) -> None:
    result = invoke(compressed / "model", *SMALL, "--batch", "8", "-q")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for part in ("Decode, ms a step", "Prefill, seconds", "8 x 96 fp32", "full span", "best dense", "ceiling"):
        assert part in result.stdout
    assert sum("decoding is " in line for line in lines) == 2
    assert sum("steps under the plan go by " in line for line in lines) == 1


def test_what_was_not_measured_is_not_in_the_tables(compressed: Path) -> None:
    text = invoke(compressed, *SMALL, "--prefill-repeats", "0", "--sides", "plan", "-q").stdout
    for part in ("Prefill", "best dense", "peak, ", "times as fast", "decoding is"):
        assert part not in text


def test_where_a_plan_is_slower_it_is_said() -> None:
    from moacompress.report.bench_tables import bench_tables

    ms = {"plan": 10.0, "full_span": 12.0, "dense": 20.0, "dense_best": 9.0}
    row: dict[str, Any] = {f"{side}_ms": value for side, value in ms.items()}
    row |= {
        "phase": "decode", "length": 1024, "batch": 1, "dtype": "float32", "repeats": 20, "kernel": "cpu",
        "routes": {"plan": ["all layers"]},
        "spread_ms": {side: [value - 1, value + 1] for side, value in ms.items()}, "load_per_core": None,
        "speedup": {
            "dense": {"value": 2.1, "ci95": [1.9, 2.2]}, "dense_best": {"value": 0.9, "ci95": None},
            "full_span": {"value": 1.25, "ci95": None},
        },
        "dense_best": "static cache, compiled", "dense_best_refused": None, "graphs": {}, "byte_ratio": 1.5,
        "weight_bytes": 100, "kv_bytes_plan": 25, "kv_bytes_dense": 100,
        "bits": {"keys": 10.0, "values": 6.25},
    }  # fmt: skip
    report = {
        "runs": [row],
        "break_even": [{"batch": 1, "dtype": "float32", "text": "not faster than the best dense at 1k tokens"}],
        "environment": {"cpu": "a CPU", "threads": 2, "torch": "2", "kernel": "cpu", "isa": "avx2"},
    }
    text = printed(*bench_tables(report))
    assert "0.90*" in text
    assert "2.10 [1.90, 2.20]" in text
    assert "the median of the turns' ratios, 95% interval" in text
    assert "1 x 1k fp32: 2.10x dense's speed: 1.68x from the kernels, 1.25x from the plan." in text  # not of medians
    assert "* The plan is slower here" in text
    assert "10.0/6.2" in text
    assert "1 x 1k fp32: the best dense is the static cache, compiled." in text
    assert "Batch 1, fp32: decoding is not faster than the best dense at 1k tokens." in text


def test_weights_caches_and_peaks_are_one_table() -> None:
    from moacompress.report.bench_tables import memory_table
    from moacompress.report.page.figures import peak_picture

    row: dict[str, Any] = {
        "phase": "decode", "length": 1024, "batch": 1, "dtype": "bfloat16", "weight_bytes": 1 << 28,
        "kv_bytes_plan": 3 << 20, "kv_bytes_dense": 24 << 20, "bits": {"keys": 10.0, "values": 6.25}, "byte_ratio": 1.08,
        "peak_bytes_plan": None, "peak_bytes_dense": None,
    }  # fmt: skip
    prefill = {**row, "phase": "prefill"}
    table = memory_table([row, prefill])
    assert [found[0] for found in table.rows] == ["1 x 1k bf16"]
    assert not any("peak" in column for column in table.columns)
    assert peak_picture({"runs": [row, prefill]}) is None
    row |= {"peak_bytes_plan": 700 << 20, "peak_bytes_dense": 1900 << 20}
    runs = [row, prefill | {"peak_bytes_plan": 800 << 20}]
    table = memory_table(runs)
    assert table.columns[-2:] == ("peak, this plan", "peak, dense")
    assert [(found[0], *found[-2:]) for found in table.rows] == [
        ("decode 1 x 1k bf16", "700", "1,900"),
        ("prefill 1 x 1k bf16", "800", "-"),
    ]
    said = printed(memory_table([row | {"peak_bytes_full_span": 1 << 30}]))
    assert all(part in said for part in ("256.0", "24.0", "3.0,", "12.5%", "10.0/6.2", "1.08", "1,024", "1,900"))
    picture = peak_picture({"runs": runs})
    assert picture is not None
    assert {trace["name"]: trace["x"] for trace in picture.traces} == {"this plan": [700, 800], "dense": [1900, None]}
    assert picture.rows == table.rows


def test_defaults_and_quick(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moacompress.bench import benchmark
    from moacompress.bench.bench_request import SIDES
    from moacompress.report import bench_tables as tables

    asked: list[Any] = []

    def run_bench(path: Path, request: Any, **more: Any) -> dict[str, Any]:
        asked.append(request)
        return {"runs": []}

    monkeypatch.setattr(benchmark, "run_bench", run_bench)
    monkeypatch.setattr(tables, "bench_tables", lambda report: [])
    for arguments in ((), ("--quick",), ("--quick", "--lengths", "2k", "--repeats", "9", "--seed", "5")):
        assert invoke(compressed, *arguments).exit_code == 0
    default, quick, changed = asked
    assert (default.lengths, default.batches, default.sides, default.dtypes) == ((1024, 4096), (1,), SIDES, ("auto",))
    assert (default.tokens, default.repeats, default.peak, default.compile) == (16, 20, True, False)
    assert (quick.lengths, quick.tokens, quick.repeats) == ((1024,), 8, 7)
    assert (changed.lengths, changed.tokens, changed.repeats, changed.seed) == ((2048,), 8, 9, 5)


def test_serving(compressed: Path, tmp_path: Path) -> None:
    small = ("--serve", "--requests", "4", "--prompt", "200", "--new", "6", "--kv-memory", "500k", "--dtype", "float32")
    out = tmp_path / "serve.json"
    result = invoke(compressed, *small, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert json.loads(out.read_text()) == data
    assert data["runs"] == []
    fields = {
        "side", "dtype", "kv_memory", "requests", "prompt_tokens", "new_tokens", "seconds", "requests_per_s", "tokens_per_s",
        "first_token_s", "token_s", "running", "preemptions", "steps", "reserved_bytes", "kernel", "load_per_core",
    }  # fmt: skip
    assert [row["side"] for row in data["serve"]] == ["dense", "plan"]
    assert all(set(row) == fields for row in data["serve"])
    assert all(row["kv_memory"] == 500 * 1024 for row in data["serve"])
    text = invoke(compressed, *small, "-o", out, "-q").stdout  # from what was measured
    assert "4 requests of 800 + 24 tokens in all, in 500.0 KiB of KV cache" in text
    assert "fp32: the plan serves " in text

"""What rows say of times: medians, intervals, speed-ups, the best dense side, and the break-even length."""

from dataclasses import replace

import pytest

from moacompress.bench.bench_request import Cell
from moacompress.bench.timing_rows import COMPILED_NAME, break_even, first_faster, make_row
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

SHAPE = ModelShape("llama", 2, 4, 2, 16, "float32", (None, None), "0" * 16)
PLAN = Plan.uniform(SHAPE, Rule(4, 60, 0))
PROOF = {"graphs": 1, "graph_breaks": 0, "recompiles": 0, "graph_calls": 9, "steps": 9}
ALL = ["plan", "full_span", "dense", "dense_best"]


def measured(seconds, proof=None, refused=None, sides=ALL):
    return {
        "seconds": seconds,
        "proofs": {} if proof is None else {"dense_static": {**PROOF, **proof}},
        "refused": {} if refused is None else {"dense_static": refused},
        "kv_bytes": {},
        "weight_bytes": 1000,
        "kernel": "cpu",
        "routes": {"plan": ["all layers"]},
        "load_per_core": 0.1,
        "sides": sides,
    }


def row(seconds, phase="decode", steps=4, batch=2, **more):
    return make_row(phase, Cell("float32", 1024, batch), measured(seconds, **more), {}, PLAN, steps)


TIMES = {"plan": [0.4, 0.6, 0.5], "full_span": [0.8, 0.9, 1.0], "dense": [1.0] * 3, "dense_static": [0.8] * 3}


def test_a_row_of_decoding():
    found = row(TIMES, proof={})
    assert [found[f"{side}_ms"] for side in ALL] == pytest.approx([125, 225, 250, 200])
    assert found["dense_best"] == COMPILED_NAME
    assert found["dense_best_refused"] is None
    assert found["tokens_per_s"]["plan"] == pytest.approx(2 / 0.125)
    assert found["speedup"]["dense"]["value"] == pytest.approx(2.0)
    assert found["speedup"]["full_span"]["value"] == pytest.approx(2.0)  # of the turns, not of the medians: 2, 1.5, 2
    assert found["speedup"]["dense"]["ci95"] is None
    assert found["spread_ms"]["plan"] == pytest.approx([105, 145])
    assert found["kv_bytes_plan"] == PLAN.kv_bytes(1024, 2)
    assert found["kv_bytes_dense"] == SHAPE.dense_kv_bytes(1024, 2)
    assert found["byte_ratio"] == pytest.approx((1000 + found["kv_bytes_dense"]) / (1000 + found["kv_bytes_plan"]))
    assert (found["peak_bytes_plan"], found["peak_bytes_dense"], found["kernel"]) == (None, None, "cpu")


def test_bits_go_by_the_formats_and_the_dtype():
    coded = Plan.uniform(SHAPE, Rule(4, 60, 0, "int8", "int4"))
    bits = [
        make_row("decode", Cell(dtype, 1024, 1), measured(TIMES, proof={}), {}, plan, 4)["bits"]
        for plan, dtype in ((PLAN, "float32"), (PLAN, "bfloat16"), (coded, "float32"))
    ]
    assert bits == [{"keys": 32, "values": 32}, {"keys": 16, "values": 16}, {"keys": 10, "values": 6}]


def test_a_row_of_prefilling():
    found = row({side: TIMES[side] for side in ("plan", "dense")}, phase="prefill", steps=1)
    assert (found["plan_ms"], found["full_span_ms"], found["dense_ms"]) == (500, None, 1000)
    assert (found["dense_best_ms"], found["dense_best"]) == (1000, "dense")
    assert found["tokens_per_s"]["dense"] == pytest.approx(2048)


@pytest.mark.parametrize(
    ("proof", "refused", "said"),
    [
        ({"graph_breaks": 2}, None, "its graph breaks (2 times)"),
        ({"recompiles": 1}, None, "it was compiled again 1 times while it was timed"),
        ({"graph_calls": 18}, None, "9 steps ran 18 graphs, not one each"),
        ({"graph_calls": 0}, None, "9 steps ran 0 graphs, not one each"),
        (None, "it cannot be compiled: no compiler", "it cannot be compiled: no compiler"),
    ],
)
def test_a_compiled_step_without_proof_is_not_the_best(proof, refused, said):
    found = row(TIMES, proof=proof, refused=refused)
    assert (found["dense_best_ms"], found["dense_best"], found["dense_best_refused"]) == (250, "dense", said)


def test_a_slower_compiled_step_is_not_the_best_either():
    found = row({**TIMES, "dense_static": [1.5] * 3}, proof={})
    assert (found["dense_best_ms"], found["dense_best"], found["dense_best_refused"]) == (250, "dense", None)
    assert found["dense_static_ms"] == 375


def test_sides_that_were_not_asked_for_are_none():
    found = row(TIMES, proof={}, sides=["plan", "dense_best"])
    assert found["dense_ms"] is None
    assert found["dense_best_ms"] == pytest.approx(200)
    alone = row({"plan": TIMES["plan"]}, sides=["plan"])
    assert (alone["dense_best_ms"], alone["dense_best"], alone["speedup"]) == (None, None, {})


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([(1024, 2.0), (4096, 9.0)], (1024, "measured")),
        ([(1024, -1.0), (4096, -2.0)], (None, None)),
        ([(1024, -1.0), (2048, 3.0), (4096, 9.0)], (1280, "interpolated")),
        ([(1024, 5.0), (2048, -1.0), (4096, 1.0)], (3072, "interpolated")),  # what comes before a slower one is chance
        ([(1024, 5.0), (4096, -1.0)], (None, None)),
        ([(1024, 0.0), (4096, 1.0)], (1024, "interpolated")),
    ],
)
def test_first_length_at_which_a_plan_is_faster(gaps, expected):
    assert first_faster(gaps) == expected


def test_break_even_for_each_batch_and_dtype():
    def decode(length, batch, plan, dense, best):
        names = {"plan_ms": plan, "dense_ms": dense, "dense_best_ms": best}
        ratios = {name: {"value": ms / plan} for name, ms in (("dense", dense), ("dense_best", best)) if plan and ms}
        return {"phase": "decode", "length": length, "batch": batch, "dtype": "float32", "speedup": ratios, **names}

    runs = [
        decode(1024, 1, 10, 9, 8),
        decode(4096, 1, 10, 12, 9),
        decode(1024, 8, 10, 20, None),
        {**decode(8192, 1, 99, 1, 1), "phase": "prefill"},
        {**decode(8192, 1, None, 1, 1)},
    ]
    found = break_even(runs)
    assert [(r["batch"], r["against"], r["length"], r["how"]) for r in found] == [
        (1, "dense", 2048, "interpolated"),
        (1, "dense_best", None, None),
        (8, "dense", 1024, "measured"),
    ]
    assert found[0]["text"] == "faster than dense from about 2,048 tokens on (interpolated)"
    assert found[1]["text"] == "not faster than the best dense at 4k tokens, the longest measured"
    assert found[2]["text"] == "faster than dense at 1k tokens, the only length measured"


def test_what_is_faster_goes_by_the_ratios_of_turns():
    """The plan has the lower median, but is the slower one in two turns of three."""
    found = row({"plan": [1.0, 2.0, 3.1], "dense": [4.0, 1.9, 3.0]}, sides=["plan", "dense"])
    assert found["speedup"]["dense"]["value"] == pytest.approx(3.0 / 3.1)
    slower = row({"plan": [1.0, 2.0, 3.1], "dense": [1.1, 2.9, 0.9]}, sides=["plan", "dense"])
    assert slower["dense_ms"] < slower["plan_ms"]
    assert break_even([slower])[0]["how"] == "measured"
    assert break_even([found])[0]["length"] is None


def test_bytes_are_those_of_the_dtype():
    cell = Cell("bfloat16", 1024, 2)
    found = make_row("decode", cell, measured(TIMES, proof={}), {"plan": {"decode": 7}}, PLAN, 1)
    half = replace(SHAPE, dtype="bfloat16")
    assert found["kv_bytes_dense"] == half.dense_kv_bytes(1024, 2) == SHAPE.dense_kv_bytes(1024, 2) // 2
    assert found["kv_bytes_plan"] == PLAN.kv_bytes(1024, 2) // 2
    assert found["peak_bytes_plan"] == 7

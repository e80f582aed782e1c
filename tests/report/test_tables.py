"""The tables that runs end with, and what of them the page says too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import RenderableType

from moacompress.report.evaluation_tables import csv_text, evaluation_tables, failure_lines, headline
from moacompress.report.page.figures import baselines_picture, history_picture
from moacompress.report.search_tables import (
    MOA_NOTE,
    baseline_line,
    explanation_tables,
    kl_table,
    refused_line,
    steps_table,
)
from moacompress.report.summary_tables import summary_tables
from tests.printed import printed

SUMMARY: dict[str, Any] = {
    "model": "some/model",
    "budget": ["25%"],
    "reference_length": 1024,
    "kv_bytes": {"dense": 4 * 2**20, "planned": 2**20, "measured": 2**20},
    "kept": [],
    "not_measured": ["long answers"],
    "quality": {
        "needle-noise@1024": {
            "kind": "calibrated kinds",
            "dense": 1.0,
            "plan": 0.9,
            "prompts": 20,
            "nll": {"dense": 0.01, "plan": 0.02},
        },
    },
    "seconds": {"profile": 10.4, "search": 20.0},
}


def shown(*parts: RenderableType) -> str:
    text = printed(*parts)
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_a_summary_has_the_models_that_were_measured() -> None:
    of_task = SUMMARY["quality"]["needle-noise@1024"]
    text = shown(*summary_tables(SUMMARY))
    for part in ("some/model, budget 25%", "at 1k tokens", "1.0 MiB", "25.0%", "0.90 (0.020)", "profile 10 s"):
        assert part in text
    row = next(line for line in text.splitlines() if "needle-noise" in line).split()
    assert row == ["needle-noise@1024", "1.00", "(0.010)", "0.90", "(0.020)", "20"]
    more = {**of_task, "uniform": 0.5, "split": None, "nll": {**of_task["nll"], "uniform": 1.0, "split": 2.0}}
    text = shown(*summary_tables({**SUMMARY, "quality": {"t@8": more}}))
    head = next(line for line in text.splitlines() if "this plan" in line)
    assert head.split() == ["task", "dense", "uniform", "split", "this", "plan", "prompts"]


def test_kl_names_what_was_measured() -> None:
    text = shown(kl_table({"plan": 0.01, "trial0": 0.02, "uniform": None}, KV_BYTES))
    assert "KV bytes 25.0% at 512" in text
    lines = [line for line in text.splitlines() if "plan  " in line or "uniform" in line]
    assert [line.split()[-1] for line in lines] == ["0.01", "0.02", "-"]


@pytest.mark.parametrize("moa", [1.55, None])
def test_moas_number_says_that_its_estimator_is_rebuilt(moa: float | None) -> None:
    """On the page too; without its number nothing is said of it."""
    kl = {"plan": 0.027, "uniform": 0.75} | ({} if moa is None else {"moa": moa})
    quality = {"measured_harm": kl, "samples": 28}
    found: Any = SimpleNamespace(explanation=None, plan=SimpleNamespace(quality=quality))
    picture = baselines_picture(found)
    assert picture is not None
    for text in (shown(kl_table(kl, KV_BYTES)), picture.note):
        assert (" ".join(MOA_NOTE.split()) in " ".join(text.split())) is (moa is not None)


KV_BYTES = {"512": {"plan": 1, "dense": 4}}
EMPTY = {
    "results": [],
    "differences": [],
    "at_floor": [],
    "kinds": {},
    "pooled": {"results": [], "differences": []},
    "answers": [],
    "not_measured": ["prompts beyond 64 tokens"],
}
"""An evaluation of nothing."""


def result(model: str, metric: str, value: float, **changes: Any) -> dict[str, Any]:
    row = {"model": model, "task": "multi-needle-noise", "length": 4096, "metric": metric, "value": value}
    row |= {"ci95": [value - 0.25, value + 0.25], "prompts": 100, "kv_bytes": 25165824, "tokens": 4000}
    return row | changes


def test_models_are_beside_each_other_on_lines_that_fit() -> None:
    names = ("plan", "dense", "uniform-elastic", "a/folder/with/a/very/long/name/model")
    metrics = ("exact_match", "accuracy", "nll", "retention")
    rows = [result(name, metric, 0.5) for name in names for metric in metrics]
    rows = [row for row in rows if (row["model"], row["metric"]) != ("plan", "retention")]
    paired = [result(name, metric, -0.5, kv_bytes_of_model=1, p=0.01) for name in names[1:] for metric in metrics[:3]]
    floor = [{"task": "multi-needle-noise", "length": 4096}]
    text = shown(*evaluation_tables({**EMPTY, "results": rows, "differences": paired, "at_floor": floor}))
    lines = text.splitlines()
    assert sum("multi-needle-noise@4k*" in line for line in lines) == 4  # each table goes on in a second one
    at = next(index for index, line in enumerate(lines) if "@4k*" in line)
    plan, dense, elastic, folder = lines[at + 1 : at + 5]
    assert plan.split() == ["plan", "24.0", "MiB", "100", "0.50", "[0.25,", "0.75]", "-", "0.50"]
    assert "0.50 [0.25, 0.75] (100)" in dense
    assert elastic.strip().startswith("uniform-elastic ")
    assert folder.strip().startswith("…ery/long/name/model ")
    assert "-0.50* [-0.75, -0.25]" in text
    assert "no evidence" in lines[-1]


def test_pooled_prompts_have_tables_of_their_own() -> None:
    names = ("plan", "a/folder/with/a/very/long/name/model")
    row = {"task": "unseen kinds", "length": None, "prompts": 240}
    rows = [result(name, metric, 0.5, **row) for name in names for metric in ("exact_match", "nll", "retention")]
    paired = [result(names[1], metric, -0.5, p=0.3, ci95=None, **row) for metric in ("exact_match", "nll", "retention")]
    of_tasks = [
        result("plan", metric, 0.5, **{**row, "task": task, "length": 64})
        for task in ("recall", "tool-call")
        for metric in ("exact_match", "accuracy", "nll")
    ]
    report = {
        **EMPTY,
        "results": of_tasks,
        "kinds": {"recall": "unseen kinds", "tool-call": "unseen kinds"},
        "pooled": {"results": rows, "differences": paired},
    }
    text = shown(*evaluation_tables(report))
    assert "0.50 [0.25, 0.75] (240)" in text
    assert "…ery/long/name/model" in text
    assert text.count("-0.50 ") == 3  # no interval, no brackets
    assert "differences is tested alone" in text
    assert (
        sum(line.startswith(("result,plan,unseen kinds,,", "difference,a/")) for line in csv_text(report).splitlines())
        == 6
    )


def test_failures_are_those_that_dense_answers_otherwise_and_move_no_cursor() -> None:
    row = {"task": "code-question", "length": 1024, "question": "Which\nfunction?", "references": ["f", "g"]}
    same = {**row, "dense": "f", "plan": "f", "dense_match": 1.0, "plan_match": 1.0}
    other = {**same, "plan": "\x1b[2Jh\n", "plan_match": 0.0}
    assert failure_lines({"answers": [same, other]}) == [
        "1 of 2 prompts are answered differently well by the plan and by dense.",
        "\ncode-question@1k\n  question: Which ⏎ function?\n  reference: f | g\n  dense (100% right): f\n"
        "  this plan (0% right): \\x1b[2Jh",
    ]


def test_sentences_of_kinds() -> None:
    """The kind that a claim rests on first, whatever the order of the rows; of small numbers no interval."""

    def rows(kind: str, right: int | None, **more: Any) -> list[dict[str, Any]]:
        made = [
            result("plan", "exact_match", 0.5, task=kind, prompts=9),
            result("dense", "exact_match", 0.5, task=kind),
        ]
        return made if right is None else [*made, result("plan", "retention", 0.6, task=kind, prompts=right, **more)]

    kinds = {"needle-noise": "calibrated kinds", "recall": "unseen kinds", "mine": "own rows"}
    report = {
        **EMPTY,
        "results": [
            result("plan", "exact_match", 0.5, task=task, length=length) for task in kinds for length in (512, 64)
        ],
        "kinds": kinds,
        "pooled": {
            "results": [
                *rows("calibrated kinds", 4, ci95=None),
                *rows("unseen kinds", 7, ci95=[0.31, 0.83]),
                *rows("own rows", None),
            ],
            "differences": [],
        },
    }
    own, unseen, calibrated, missing = headline(report)
    assert "(mine; 64, 512 tokens): dense answers none of 9 prompts" in own
    assert (
        "no calibration has (recall; 64, 512 tokens): dense answers 7 of 9 prompts, and the plan 60% of these" in unseen
    )
    assert "(95% interval 31% to 83%); exact match on all 9: dense 50%, plan 50%." in unseen
    assert "calibrated on (needle-noise; 64, 512 tokens)" in calibrated
    assert "(n too small for an interval)" in calibrated
    assert missing == "Not measured: prompts beyond 64 tokens."


def test_csv_has_every_row() -> None:
    report = {
        **EMPTY,
        "results": [result("plan", "nll", 0.5, sink=4)],
        "differences": [result("dense", "nll", 0.1, p=0.25)],
        "lm_eval": [
            {"model": "plan", "task": "t", "length": None, "metric": "acc", "value": 1.0, "ci95": None, "prompts": 3}
        ],
    }
    head, first, second, third = csv_text(report).splitlines()
    assert head.startswith("kind,model,task,length,metric,value,low,high,prompts,kv_bytes")
    assert first == "result,plan,multi-needle-noise,4096,nll,0.5,0.25,0.75,100,25165824,,4000,4,,,,,"
    assert second.startswith("difference,dense,")
    assert third == "lm_eval,plan,t,,acc,1.0,,,3,,,,,,,,,"


def apart(value: float, ci95: list[float] | None = None, samples: int = 6, candidates: int = 1) -> dict[str, Any]:
    found = {"value": value, "standard_error": 0.001, "ci95": ci95, "samples": samples, "p": 0.25}
    return {**found, "candidates": candidates}


def test_what_was_not_kept_though_its_kl_is_lower_has_a_reason() -> None:
    def stage(name: str, kept: bool, difference: dict[str, Any] | None) -> dict[str, Any]:
        return {"name": name, "harm": 0.1, "kept": kept, "difference": difference}

    table = steps_table(
        {
            "stages": [
                stage("surrogate", True, None),
                stage("study", False, apart(-0.003, [-0.008, 0.002])),
                stage("round 1", True, apart(-0.02, [-0.03, -0.01])),
                stage("moves", False, apart(0.02, None, 4)),
                stage("rest", True, apart(0.001, [-0.001, 0.003])),
            ]
        }
    )
    assert [row[2:] for row in table.rows] == [
        ("-", "yes"),
        ("-0.003 [-0.008, +0.002], p .25, 6 samples", "no: gain too small for its error"),
        ("-0.02 [-0.03, -0.01], p .25, 6 samples", "yes"),
        ("+0.02, p .25, 4 samples", "no: not lower"),
        ("+0.001 [-0.001, +0.003], p .25, 6 samples", "yes: higher by less than its error"),
    ]
    trials = [
        {"trial": 0, "harm": 0.1, "pruned": False, "kept": True, "difference": apart(0.0)},
        {"trial": 1, "harm": 0.09, "pruned": False, "kept": False, "difference": apart(-0.01, [-0.03, 0.01])},
        {"trial": 2, "harm": 0.3, "pruned": True, "kept": False, "difference": apart(0.2)},
        {"trial": 3, "harm": 0.2, "pruned": False, "kept": False, "difference": apart(0.1)},
    ]
    picture = history_picture({"trials": trials})
    assert picture is not None
    remark = "gain too small for its error: -0.01 [-0.03, +0.01], p .25, 6 samples"
    assert [row[-1] for row in picture.rows] == ["kept", remark, "pruned", ""]
    assert picture.note.startswith("Pruned trials saw fewer samples. A trial replaces trial 0 only if its gain")


def test_a_plan_that_measured_better_and_was_refused_has_a_line() -> None:
    found = {"name": "trial 3", "harm": 0.000418, "difference": apart(-0.00066, [-0.0016, 0.0003], candidates=9)}
    (line,) = refused_line({"refused": found})
    assert line.startswith(
        "Trial 3 measured 0.000418 nats (-0.00066 [-0.0016, +0.0003], p .25 as the lowest of 9 plans, 6 samples against"
    )
    (few,) = refused_line({"refused": {**found, "difference": apart(-1, None, 4)}})
    assert "nats (-1, p .25, 4 samples against the chosen plan)" in few
    assert refused_line({"refused": None}) == refused_line({}) == []


@pytest.mark.parametrize(
    ("verdict", "saved", "share", "said"),
    [
        (
            "alike",
            False,
            1.0,
            "Not shown to differ from full and streaming heads (DuoAttention-style) at the same bytes: 0.0285 vs 0.0268 nats (",
        ),
        (
            "alike",
            False,
            1.25,
            "(DuoAttention-style) at 20% fewer bytes: 0.0285 vs 0.0268 nats (",
        ),
        ("worse", True, 1.0, "(0.0268 nats) beats the best searched plan (0.0285), so its plan was saved"),
        ("worse", False, 1.0, "is better, but has too many classes of KV heads"),
    ],
)
def test_one_line_says_whether_the_plan_beats_the_best_baseline(
    verdict: str, saved: bool, share: float, said: str
) -> None:
    found = {"family": "duo", "harm": 0.0268, "found_harm": 0.0285, "difference": apart(0.0017, [-0.002, 0.005])}
    (line,) = baseline_line({**found, "bytes_share": share, "verdict": verdict, "saved": saved})
    assert said in line
    assert "[-0.002, +0.005], p .25, 6 samples" in line or "classes" in line


def test_samples_that_no_test_can_judge_are_not_called_alike() -> None:
    found = {"family": "duo", "harm": 0.1, "found_harm": 0.01, "difference": apart(-0.09, [-0.1, -0.08], 5)}
    (line,) = baseline_line({**found, "bytes_share": 1.0, "verdict": "alike", "saved": False})
    assert line.startswith("Too few samples to compare with full and streaming heads")
    assert baseline_line(None) == []


def test_an_explanation_says_where_the_bytes_are() -> None:
    rule = {"sink": 4, "alpha": 64, "beta_q": 0}
    head = {"layer": 1, "kv_head": 0, "kept": 80, "of": 512, "saves": 0.25}
    told: dict[str, Any] = {
        "stages": [{"name": "surrogate", "harm": 0.1, "difference": None, "kept": True}],
        "heads": [
            {**head, "rule": {**rule, "key_format": "int8", "value_format": "int4"}},
            {**head, "rule": "full"},
            {**head, "layer": 9, "saves": -0.125, "rule": "full"},
        ],
        "knobs": {"precision": 1.0},
        "predicted": {"pairs": [], "spearman": None},
        "kinds": {"answer": 0.125, "text": 0.5},
        "formats": {
            "bits": {"keys": 8.5, "values": 4.5},
            "pairs": [
                {"key_format": "int8", "value_format": "int4", "kv_heads": 5, "kv_bytes": 300},
                {"key_format": "native", "value_format": "native", "kv_heads": 1, "kv_bytes": 100},
            ],
        },
    }
    text = shown(*explanation_tables(told))
    assert "8.5 bits per number in kept keys, 4.5 in kept values" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["int8", "int4", "5", "75%"] in rows
    assert ["native", "native", "1", "25%"] in rows
    assert any(row[:5] == ["1", "0", "80", "512", "int8/int4"] for row in rows)
    assert any(row[:5] == ["1", "0", "80", "512", "native/native"] for row in rows)
    assert not any(row[:1] == ["9"] for row in rows)  # its bytes are worth less than the average head's
    assert "worth most" not in shown(*explanation_tables({**told, "heads": told["heads"][2:]}))
    assert "answer 0.12, text 0.5" in text
    native = {"bits": {"keys": 16.0, "values": 16.0}, "pairs": told["formats"]["pairs"][1:]}
    plain = {**told, "kinds": {}, "formats": native}
    assert "bits" not in shown(*explanation_tables(plain))

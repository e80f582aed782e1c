"""What a notebook shows: every result of the Python interface as the tables of its command, with texts as they are written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import moacompress
from moacompress.core.shown import Shown, ShownDict
from moacompress.healer.healing import HealResult
from moacompress.pipeline import Summary
from moacompress.report.notebook import SHOWN
from moacompress.rules.plan import Plan
from moacompress.search.audit.audit import Audit
from moacompress.search.result.search_result import SearchResult

NAME = "<b>[red]it</b>"
"""A name that would be markup, of HTML and of rich."""
SUMMARY = {
    "model": NAME,
    "budget": ["25%"],
    "reference_length": 1024,
    "kv_bytes": {"dense": 4096, "planned": 1024, "measured": 1024},
    "kept": [],
    "not_measured": ["long answers"],
    "quality": {NAME: {"dense": 1.0, "uniform": 0.5, "plan": 0.75, "prompts": 4, "nll": {"dense": 0.1}}},
    "seconds": {"profile": 2.0},
}
ESTIMATOR = {"spearman": 0.9, "ci95": [0.8, 1.0], "ratio": 1.0, "ratio_range": [0.9, 1.1], "n": 7}
AUDIT = {
    "estimator": NAME, "samples": 2, "points": [], "audit": {NAME: ESTIMATOR}, "audit_plans": {}, "split_half": [],
}  # fmt: skip
KL = {name: {"mean": 0.1, "standard_error": 0.01} for name in ("before", "after")}
HEALED = {
    "held_out_kl": {**KL, "difference": {"mean": -0.1, "ci95": None, "p": 0.25}, "samples": 3, "evaluations": 1},
    "improved": True, "objective": "kl", "train": "lora", "tokens": 100, "seconds": 2.0,
    "steps": 5, "best_step": 4, "training_samples": 6, "recipe": {"modules": [NAME]},
}  # fmt: skip


class Printer:
    """What IPython prints with."""

    def __init__(self) -> None:
        self.written = ""

    def text(self, obj: str) -> None:
        self.written += obj


def html_of(value: Shown) -> str:
    """Returns what a notebook shows; a terminal shows the same text."""
    page, printer = value._repr_html_(), Printer()
    value._repr_pretty_(printer, False)
    assert page.count("<pre") == page.count("</pre>") == 1
    assert printer.written.strip()
    assert "<pre" not in printer.written
    return page


@pytest.fixture(scope="module")
def plan(compressed: Path) -> Plan:
    return Plan.load(compressed / "model" / "plan.json")


def test_a_plan(plan: Plan) -> None:
    page = html_of(plan)
    assert "KV cache, batch 1" in page
    assert "Kept share of each KV head" in page


def test_a_search(plan: Plan) -> None:
    kv_bytes = {"1024": {"dense": 8, "plan": 2}}
    found = SearchResult(plan, None, 1, 1, 0, {"plan": 0.125, "uniform": 0.5}, kv_bytes, 1.0, {})
    page = html_of(found)
    assert "KL(dense || plan) on validation samples; KV bytes 25.0% at 1k" in page
    assert "Kept share of each KV head" in page


def same_dict(value: ShownDict) -> bool:
    """Whether a value is a dict to everything but a notebook."""
    plain = dict(value)
    return value == plain == pickle.loads(pickle.dumps(value)) and repr(value) == repr(plain)


def test_an_inspection(compressed: Path, plan: Plan) -> None:
    found = moacompress.inspect(compressed, [300])
    assert same_dict(found)
    assert list(json.loads(json.dumps(found))["kv_bytes"]) == ["300"]
    page = html_of(found)
    assert "KV cache, batch 1" in page
    assert "Kept share of each KV head" in page
    assert found.plan == plan


def test_an_evaluation(compressed: Path) -> None:
    found = moacompress.evaluate(compressed, against=["dense"], lengths=[600], prompts=2)
    assert same_dict(found)
    page = html_of(found)
    assert "Tasks, mean and 95% interval" in page
    assert "needle-noise@600" in page


def test_a_benchmark(compressed: Path) -> None:
    found = moacompress.benchmark(
        compressed, lengths=[64], sides=["plan", "dense"], tokens=2, repeats=1, prefill_repeats=1, peak=False
    )
    assert {(row["phase"], row["length"]) for row in found["runs"]} == {("prefill", 64), ("decode", 64)}
    assert same_dict(found)
    page = html_of(found)
    assert "Decode, ms a step" in page
    assert "Memory in MiB" in page


def test_a_summary_shows_texts_as_they_are() -> None:
    page = html_of(Summary(SUMMARY))
    assert "KV cache at 1k tokens" in page
    assert page.count("&lt;b&gt;[red]it&lt;/b&gt;") == 2
    assert "<b>" not in page


def test_an_audit_and_a_heal(plan: Plan) -> None:
    audited = html_of(Audit("", AUDIT))
    assert "ablations of one KV head" in audited
    assert "&lt;b&gt;[red]it&lt;/b&gt;*" in audited
    healed = html_of(HealResult(Path("healed"), plan.with_notes(provenance={"heal": HEALED})))
    assert "Held-out KL(dense || model), before and after" in healed
    assert "lora of &lt;b&gt;[red]it&lt;/b&gt;" in healed


def kinds_of(kind: type[Any]) -> set[str]:
    """Returns the names of the classes that are a kind of one, as far as they are imported."""
    return {name for each in kind.__subclasses__() for name in (each.__name__, *kinds_of(each))}


def test_whatever_is_shown_has_tables() -> None:
    for name in moacompress.__all__:
        getattr(moacompress, name)
    assert kinds_of(Shown) - {"ShownDict"} == set(SHOWN)

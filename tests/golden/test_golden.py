"""This checkout gives what the record here holds: a plan to the last rule, logits, and the names of what a run leaves.

`MOACOMPRESS_WRITE_GOLDEN=1 pytest tests/golden` writes the record from scratch, for a change that is meant to change it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moacompress

HERE = Path(__file__).resolve().parent
WRITES = os.environ.get("MOACOMPRESS_WRITE_GOLDEN") == "1"
RECIPE = {
    "calibration": {
        "sources": [{"generator": "needle"}, {"generator": "key-value"}],
        "lengths": [600, 800],
        "samples": 8,
        "validation_samples": 6,
        "longer_samples": 1,
        "answer_tokens": 8,
    },
    "profile": {"draws": 2},
    "search": {"trials": 8},
}
"""Of the profile here: every step of a search is taken, each with little work."""
RUN = {
    **RECIPE,
    "budget": "50%",
    "search": {"trials": 2},
    "evaluation": {"tasks": ["needle-noise"], "lengths": [700], "prompts": 2},
}
TOLERANCE = 1e-5
"""Of a logit, relative to the largest: other processors and numbers of threads add up in another order."""


def held(name: str, found: Any) -> Any:
    """Returns what the record holds under a name; where it is being written, what was found."""
    path = HERE / name
    if WRITES:
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def record(load_script: Callable[[Path], Any]) -> Any:
    return load_script(HERE / "record.py")


@pytest.fixture(scope="module", autouse=True)
def profile(record: Any, tiny_tokenizer: Any) -> None:
    if WRITES:
        shutil.rmtree(record.PROFILE, ignore_errors=True)
        recipe = moacompress.Recipe.from_dict(RECIPE)
        moacompress.profile(record.tiny_source(tiny_tokenizer), record.PROFILE, recipe)
        shutil.rmtree(record.PROFILE / "samples", ignore_errors=True)


def test_a_search_from_a_finished_profile_finds_the_same_plan(record: Any) -> None:
    found = record.found_plan()
    expected = held("plan.json", found)
    kl = expected.pop("harm")
    assert found.pop("harm") == pytest.approx(kl, rel=1e-3)
    assert found == expected


@pytest.mark.real
def test_a_published_plan_gives_the_same_logits(record: Any, smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    logits = record.published_logits(model)
    for row, expected in zip(logits, held("logits.json", record.shown_logits(logits)), strict=True):
        values = torch.tensor(expected["logits"])
        assert row.topk(1).indices.tolist() == expected["tokens"][:1]
        assert (row[expected["tokens"]] - values).abs().max() <= TOLERANCE * values.abs().max()


def test_a_run_leaves_the_same_names(tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "out"
    moacompress.compress(moacompress.Recipe.from_dict({**RUN, "model": str(tiny_folder)}), out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    names = {name for name in names if not name.endswith(".lock")}
    assert sorted(names) == held("artefacts.json", sorted(names))

"""Commands in the README and in docs are run: quick ones here, others by `make test-all`, and each that is not has a reason."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moacompress.doctor import checks
from moacompress.recipe import Recipe
from moacompress.report.recipe_text import recipe_yaml
from moacompress.rules.plan import Plan
from tests.browser import needs_browser
from tests.cli.commands import answer, invoke
from tests.doc_commands import (
    CANNOT,
    COMMANDS,
    PYTHON,
    PYTHON_CANNOT,
    PYTHON_SLOW,
    PYTHON_SMALLER,
    QUICK,
    ROOT,
    SLOW,
    SMALLER,
    reason,
    smaller,
)


def test_every_command_is_run_or_has_a_reason() -> None:
    assert set(COMMANDS) >= QUICK, "a quick command is in no page any more"
    found = {command: reason(command) for command in COMMANDS}
    assert all(why for command, why in found.items() if command not in QUICK and command not in SLOW)
    for pattern in CANNOT:
        assert any(re.search(pattern, command) for command in COMMANDS), f"{pattern} matches no command any more"
    assert len(QUICK) + len(SLOW) > 60


@pytest.fixture(scope="module")
def place(tiny_folder: Path, compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the pages name."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_folder, place / "path" / "to" / "model")
    answer("export", tiny_folder, compressed / "model" / "plan.json", "-o", place / "model")
    for run in ("mine", "quarter"):
        shutil.copytree(place / "model", place / "runs" / run / "model")
        shutil.copy(compressed / "model" / "plan.json", place / "runs" / run / "plan.json")
        (place / "runs" / run / "recipe.json").write_text(json.dumps(Recipe(budget=("25%",)).resolved()))
    shutil.copy(compressed / "model" / "plan.json", place)
    (place / "recipe.yaml").write_text(recipe_yaml(Recipe(model="path/to/model", budget=("25%",))))
    sentences = " ".join(f"The {number}th day was much like the one before it." for number in range(3000))
    (place / "prose").mkdir()
    for name in ("one", "two", "three", "four"):
        (place / "prose" / f"{name}.txt").write_text(f"{name}. {sentences}")
    for name, lengths in {"support": (700, 1600), "qa": (400, 800), "held-out": (3400,), "mine": (3400,)}.items():
        rows = [
            {"prompt": f"What is {number}? {sentences[:length]}", "answer": str(number)}
            for length in lengths
            for number in range(320 if len(lengths) > 1 else 40)
        ]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "squad.json").write_text(json.dumps(squad()))
    shape = Plan.load(place / "plan.json").model
    pattern, checkpoint = place / "path" / "to" / "pattern", place / "path" / "to" / "checkpoint"
    pattern.mkdir()
    checkpoint.mkdir()
    (pattern / "config.json").write_text(json.dumps({"sink_size": 64, "recent_size": 256}))
    heads = np.random.default_rng(0).random((shape.layers, shape.kv_heads))
    np.savetxt(pattern / "full_attention_heads.tsv", heads, delimiter="\t")
    spans = {name: [[value] * shape.heads] * shape.layers for name, value in (("alphas", 64), ("betas", 0.25))}
    (place / "moa_alpha_beta.json").write_text(json.dumps(spans))
    (checkpoint / "hf_quant_config.json").write_text('{"quantization": {"kv_cache_quant_algo": "FP8"}}')
    return place


def squad() -> dict[str, Any]:
    """Returns questions in SQuAD's form."""

    def paragraph(article: int, number: int) -> dict[str, Any]:
        context = f"In town {article} house {number} is painted in colour {article * 7 + number}. " * 3
        answer = f"colour {article * 7 + number}"
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        question = f"How is house {number} of town {article} painted?"
        return {"context": context, "qas": [{"id": f"{article}-{number}", "question": question, "answers": answers}]}

    return {"data": [{"title": f"Town {a}", "paragraphs": [paragraph(a, n) for n in range(6)]} for a in range(40)]}


def go(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Goes into a copy of the place, beside the repository's own folders."""
    here = tmp_path / "here"
    shutil.copytree(place, here)
    for name in ("docs", "recipes", "tests", "benchmarks", "README.md"):
        (here / name).symlink_to(ROOT / name)
    monkeypatch.chdir(here)
    return here


def perform(command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
    """Runs a command in a copy of the place, beside the repository's own folders."""
    if "--card" in shlex.split(command):
        needs_browser()
    here = go(place, tmp_path, monkeypatch)
    monkeypatch.setattr(checks, "_check_autoload", lambda: {"registered": True, "switch": None, "reason": None})
    words = shlex.split(f"{command} {more}")
    while re.fullmatch(r"\w+=\S+", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.syspath_prepend(Path(words[1]).resolve().parent)  # as Python does for a script
        runpy.run_path(words[1], run_name="__main__")
        return
    if "-o" in words:  # what is written is new
        out = here / words[words.index("-o") + 1]
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        os.makedirs(out.parent, exist_ok=True)
    done = invoke(*words[1:], input="What is it?\n")
    assert done.exit_code == 0 or ("--fail-under" in words and done.exit_code == 1), done.output


@pytest.fixture(scope="module")
def worked(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with what earlier commands of the pages leave: a profile of everything, and a whole run."""
    folder = tmp_path_factory.mktemp("worked") / "place"
    shutil.copytree(place, folder)
    shutil.rmtree(folder / "runs" / "mine")
    (folder / "shared").mkdir()
    search = f"search {folder}/profile --budget 50% {SMALLER['search']}"
    for line in (
        f"profile {folder}/path/to/model -o {folder}/profile --lengths 512,1k --gates {SMALLER['profile']} --anchors 2 "
        "--source needle",
        f"compress {folder}/path/to/model --budget 25% -o {folder}/runs/mine --overwrite {SMALLER['compress']}",
        f"{search} -o {folder}/found.json --storage {folder}/shared/study.journal",
        f"{search} --share 1 -o {folder}/shared.json",
        f"export {folder}/path/to/model {folder}/shared.json -o {folder}/sharing",
    ):
        answer(*line.split())
    for name in ("repaired", "healed"):
        shutil.copytree(folder / "model", folder / name)
    shutil.copytree(folder / "runs" / "mine" / "model", folder / "runs" / "quarter" / "model", dirs_exist_ok=True)
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("command", SLOW)
def test_slow(command: str, worked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perform(command, worked, tmp_path, monkeypatch, smaller(command))


@pytest.mark.parametrize("command", sorted(QUICK))
def test_quick(command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perform(command, place, tmp_path, monkeypatch)


def test_what_is_said_of_python_blocks_is_of_some() -> None:
    blocks = [block for page in PYTHON.values() for block in page]
    assert len(blocks) >= 13
    for mark in (*PYTHON_CANNOT, *PYTHON_SLOW, *PYTHON_SMALLER):
        assert any(mark in block for block in blocks), f"{mark} is in no block any more"


def run_blocks(page: str, *, slow: bool) -> None:
    """Runs the Python blocks of a page in one process, each with the names of those before it, as a reader pastes them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in PYTHON[page]:
        if any(mark in block for mark in PYTHON_CANNOT) or (not slow and any(mark in block for mark in PYTHON_SLOW)):
            continue
        for large, small in PYTHON_SMALLER.items():
            block = block.replace(large, small)
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks(page: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(place, tmp_path, monkeypatch)
    run_blocks(page, slow=False)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "page", [page for page, blocks in PYTHON.items() if any(mark in "".join(blocks) for mark in PYTHON_SLOW)]
)
def test_slow_python_blocks(page: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = go(place, tmp_path, monkeypatch)
    shutil.rmtree(here / "model")
    (here / "plan.json").unlink()
    run_blocks(page, slow=True)

"""Evaluation never sees calibration's text: prompts say other sentences, and what is read is compared with what was seen."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest

from moacompress.core.errors import DataError, PlanError
from moacompress.core.shingles import WORD, Shingles, normalised
from moacompress.evaluation.runner import evaluate
from moacompress.evaluation.tasks.registry import TASKS, Resources, make_cases
from moacompress.prompts import generators
from moacompress.prompts.generators import Values, make_prompt
from moacompress.prompts.pools import Prose
from moacompress.report.evaluation_tables import OVERLAP_UNKNOWN, csv_text
from moacompress.report.page.figures import quality_pictures
from moacompress.report.page.report_page import quality_text
from moacompress.rules.plan import Plan
from moacompress.runtime.checkpoint import load_checkpoint
from tests.evaluation.conftest import tables_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 700
TOKENS = {"variable-chain": 3000, "common-words": 4000}
"""A character is a token here."""


def grams(texts: Iterable[str], size: int) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = WORD.findall(normalised(text))
        found |= {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}
    return found


def write_prose(folder: Path, documents: int = 6, words: int = 3000) -> Path:
    folder.mkdir()
    drawn = random.Random(0)
    for number in range(documents):
        said = [f"w{drawn.randrange(3000)}{'.' if at % 9 == 8 else ''}" for at in range(words)]
        (folder / f"{number}.txt").write_text(" ".join(said))
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prose(tmp_path_factory.mktemp("texts") / "prose")


@pytest.fixture(scope="module")
def calibrated(tiny_tokenizer: PreTrainedTokenizerBase, prose: Path) -> list[str]:
    """Returns 24 prompts of every generator that calibration and validation draw, with every kind of value."""
    loaded, texts = Prose.load(prose), []
    for split in ("calibration", "validation"):
        for task in generators.TASKS:
            for seed in range(24):
                values = get_args(Values)[seed % 3]
                rng = np.random.default_rng((seed, split == "validation"))
                prompt = make_prompt(task, rng, split, tiny_tokenizer, 1200, loaded, values)
                texts.append(f"{prompt.user}\n{prompt.prefix} {prompt.answer}")
    return texts


def test_evaluation_s_prompts_share_no_words_in_a_row_with_calibration_s(
    calibrated: list[str], prose: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Not one of the runs of 13 words, and at most 1 in 1,000 of those of 8, in any kind of prompt that is written."""
    seen, loaded = {size: grams(calibrated, size) for size in (8, 13)}, Prose.load(prose)
    for name, task in TASKS.items():
        if task.ruler or task.needs == "squad":  # RULER's words, and the user's documents
            continue
        cases = make_cases(name, TOKENS.get(name, 2000), 4, 0, tiny_tokenizer, Resources(prose=loaded))
        said = [str(tiny_tokenizer.decode(case.prompt_ids + case.answer_ids)) for case in cases]
        ours = {size: grams(said, size) for size in (8, 13)}
        assert len(ours[8]) > 80, name
        assert not ours[13] & seen[13], name
        assert len(ours[8] & seen[8]) <= len(ours[8]) / 1000, name
    for name in generators.TASKS:  # records are no task of evaluation, but its generator can write them
        if name == "recall":
            continue
        prompts = [
            make_prompt(name, np.random.default_rng(seed), "evaluation", tiny_tokenizer, 1500, loaded)
            for seed in range(4)
        ]
        assert not grams([f"{prompt.user}\n{prompt.prefix}" for prompt in prompts], 13) & seen[13], name


@pytest.fixture
def checkpoint(compressed: Path, tmp_path: Path) -> Callable[[Shingles | None], Path]:
    """Returns a function that copies a checkpoint whose plan was calibrated on what it is given."""

    def of(seen: Shingles | None) -> Path:
        place = tmp_path / "OUT"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(compressed, place)
        file = place / "model" / "plan.json"
        replace(Plan.load(file), seen=seen).save(file)
        return place

    return of


def run(target: Path, text: Path, tasks: tuple[str, ...] = ("text",), **options: Any) -> dict[str, Any]:
    return evaluate(target, text=text, tasks=tasks, lengths=(LENGTH,), prompts=2, against=(), **options)


def test_text_that_calibration_saw_is_refused_and_marked(
    checkpoint: Callable[[Shingles | None], Path], prose: Path, tmp_path: Path
) -> None:
    pool = Prose.load(prose).pools["evaluation"]
    target = checkpoint(Shingles.of([" ".join(pool[0])]))
    number = Prose.load(prose).files["evaluation"][0].name
    message = rf"[\d.]+% of the runs of 13 words in the evaluation text of .*{number}: 100\.0%.*--allow-overlap"
    for tasks in (("text",), ("needle-prose",)):
        with pytest.raises(DataError, match=message):
            run(target, prose, tasks)
    out = tmp_path / "eval.json"
    report = run(target, prose, ("text", "needle-noise"), allow_overlap=True, out=out)
    assert json.loads(out.read_text()) == report
    (marked,) = report["seen_in_calibration"]
    assert (marked["task"], marked["length"]) == ("text", LENGTH)
    shares = {row["task"]: row["overlap"] for row in report["results"]}
    assert shares == {"text": marked["overlap"], "needle-noise": 0.0}
    assert 0.01 < marked["overlap"] <= 1.0
    text = tables_of(report)
    assert "text@700†" in text
    overlap = f"text@700 {marked['overlap']:.1%}†; 0.0% in all others."
    assert f"Overlap with calibration (runs of 13 words): {overlap}" in text
    assert "its numbers flatter the plan" in text
    assert str(marked["overlap"]) in csv_text(report)
    assert "its numbers flatter the plan" in quality_text(report)
    assert any("text †" in str(picture.rows) for picture in quality_pictures(report))  # type: ignore[arg-type]


def test_other_text_is_measured_and_its_overlap_stated(
    checkpoint: Callable[[Shingles | None], Path], prose: Path
) -> None:
    """What was reproduced: a file of the calibrated folder, whose evaluation pool is the folder's."""
    texts = [" ".join(words) for split in ("calibration", "validation") for words in Prose.load(prose).pools[split]]
    target = checkpoint(Shingles.of(texts))
    for place in (prose, prose / "0.txt"):
        report = run(target, place)
        assert {row["overlap"] for row in report["results"]} == {0.0}
        assert report["seen_in_calibration"] == []
        assert "Overlap with calibration (runs of 13 words): 0.0%." in tables_of(report)


def test_what_is_not_known_is_not_called_zero(checkpoint: Callable[[Shingles | None], Path], prose: Path) -> None:
    report = run(checkpoint(None), prose)
    assert {row["overlap"] for row in report["results"]} == {None}
    assert OVERLAP_UNKNOWN in tables_of(report)
    assert OVERLAP_UNKNOWN in quality_text(report)


def test_a_plan_carries_what_it_was_calibrated_on(
    checkpoint: Callable[[Shingles | None], Path], tmp_path: Path
) -> None:
    seen = Shingles.of(["one two three four five six seven eight nine ten eleven twelve thirteen fourteen"])
    folder = checkpoint(seen) / "model"
    plan = load_checkpoint(folder, "auto", "cpu").plan
    assert plan.seen is not None
    assert plan.seen.hashes.tolist() == seen.hashes.tolist()
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.shingles").read_bytes() == (folder / "plan.shingles").read_bytes()
    replace(plan, seen=None).save(tmp_path / "plan.json")  # another plan's is not left beside this one
    assert Plan.load(tmp_path / "plan.json").seen is None
    (folder / "plan.shingles").write_bytes(b"\x80\x04")
    with pytest.raises(PlanError, match="cannot read the shingles of calibration"):
        Plan.load(folder / "plan.json")

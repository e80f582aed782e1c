"""Samples that gates are trained on share nothing with those that rules which select are priced on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moacompress.calibration.data.data_rows import first_of_each, split_rows
from moacompress.calibration.data.samples import Sample, load_samples
from moacompress.calibration.gates.gate_samples import gate_recipe
from moacompress.calibration.profile import preparation, profiler
from moacompress.core.artefact_names import CALIBRATION_FILE
from moacompress.core.errors import DataError
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from tests.calibration.conftest import GATES

if TYPE_CHECKING:
    from tests.calibration.conftest import Sources


@pytest.fixture
def source(load: Sources) -> SourceModel:
    return load(num_hidden_layers=1)


class Trained(Exception):
    """Stops a profile as it would train gates."""


@pytest.fixture
def both(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Recipe], tuple[list[Sample], list[Sample]]]:
    """Returns a function that returns the samples that are profiled, and those that gates would be trained on."""

    def of(recipe: Recipe) -> tuple[list[Sample], list[Sample]]:
        found: list[Sample] = []

        def train(model: Any, samples: list[Sample], *rest: Any) -> None:
            found.extend(samples)
            raise Trained

        monkeypatch.setattr(preparation, "train_gates", train)
        with pytest.raises(Trained):
            profiler.profile(source, tmp_path / "profile", recipe)
        return load_samples(tmp_path / "profile" / CALIBRATION_FILE), found

    return of


def recipe(sources: list[dict[str, Any]], **changes: Any) -> Recipe:
    calibration = {"lengths": [300], "samples": 6, "validation_samples": 2, "longer_samples": 0, "answer_tokens": 4}
    return Recipe.from_dict(
        {"calibration": {"sources": sources, **calibration, **changes}, "profile": GATES["profile"]}
    )


def of_rows(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Writes a file of rows, and returns what `recipe` takes for it."""
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"sources": [{"path": str(folder / "rows.json")}], **changes}


def document(name: int, words: int) -> str:
    """Returns a text no word of which is in another, or twice."""
    return " ".join(f"D{name:02d}w{number:04d}." for number in range(words))


def prompts(folder: Path) -> dict[str, Any]:
    rows = [{"prompt": f"D{row:02d}w0000. " + "x" * 200} for row in range(30)]
    # the same prompt with two answers is one row
    return of_rows(folder, [*rows, *({**row, "answer": "other"} for row in rows)])


def conversations(folder: Path) -> dict[str, Any]:
    turns = [[{"role": "user", "content": f"D{row:02d}w0000. " + "x" * 170}] for row in range(30)]
    return of_rows(folder, [{"messages": messages} for messages in turns])


def texts(folder: Path) -> dict[str, Any]:
    return of_rows(folder, [{"text": document(row, 60)} for row in range(24)])


def one_text(folder: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text(document(0, 9000))
    return {"sources": [{"path": str(folder / "text.txt")}]}


def questions(folder: Path) -> dict[str, Any]:
    rows = [
        {"title": f"T{row // 4}", "context": document(row, 4), "question": f"D{row:02d}w0009. ?"} for row in range(240)
    ]
    return of_rows(folder, rows, lengths=[360])


def haystack(folder: Path) -> dict[str, Any]:
    for name in range(3):
        (folder / f"{name}.txt").write_text(document(name, 4000))
    return {"sources": [{"generator": "needle", "haystack": "prose"}], "lengths": [800], "text": str(folder)}


def plain_text(folder: Path) -> dict[str, Any]:
    for name in range(28):
        (folder / f"{name:02d}.txt").write_text(document(name, 90))
    return {"sources": [{"generator": "needle"}], "lengths": [600], "text": str(folder), "text_samples": 8}


@pytest.mark.parametrize(
    "data", [prompts, conversations, texts, one_text, questions, haystack, plain_text], ids=lambda data: data.__name__
)
def test_gates_are_trained_on_nothing_that_is_profiled(
    data: Callable[[Path], dict[str, Any]], source: SourceModel, both: Callable[[Recipe], Any], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()

    def words(samples: list[Sample]) -> set[str]:
        said = [str(source.tokenizer.decode(sample.input_ids)) for sample in samples]
        return {word for text in said for word in re.findall(r"D\d\dw\d{4}\.", text)}

    profiled, trained = both(recipe(**data(tmp_path / "data")))
    assert len(trained) == 3
    assert words(profiled)
    assert words(trained)
    assert not words(profiled) & words(trained)


def prompts_of_calibration(count: int) -> list[dict[str, Any]]:
    """Returns prompts of which so many, and some of validation, are dealt to calibration."""
    rows: list[dict[str, Any]] = [{"prompt": f"{row:02d}" + "x" * 200} for row in range(60)]
    found = first_of_each(rows, "prompt", "rows")
    mine = split_rows(found, "calibration", "rows")[:count]
    return [rows[index] for index in (*mine, *split_rows(found, "validation", "rows"))]


def test_few_rows_give_gates_what_is_left_of_them(
    both: Callable[[Recipe], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiled, trained = both(recipe(**of_rows(tmp_path, prompts_of_calibration(8))))
    assert (len(profiled), len(trained)) == (6, 2)
    assert "2 of the 3 samples that gates are trained on can be had" in caplog.text
    assert not {tuple(s.input_ids[:202]) for s in profiled} & {tuple(s.input_ids[:202]) for s in trained}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            prompts_of_calibration(6),
            r"0 of the 3 samples that gates are trained on .*not those of the 6 profiled .*; give more rows",
        ),
        (
            [{"title": f"T{row // 12}", "context": document(row, 4), "question": "?"} for row in range(36)],
            "the calibration part of .* has too few distinct documents or articles with questions: 1; profile, gates need",
        ),
        (
            [{"text": document(row, 90)} for row in range(3)],
            "the calibration part of file:rows.json has too few distinct sections of 500 words: 1; profile, gates need",
        ),
    ],
    ids=["prompts", "questions", "texts"],
)
def test_too_little_for_gates_is_said_before_the_model_answers(
    rows: list[dict[str, Any]], says: str, source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moacompress.calibration.data.answers.generate_greedy", lambda *_: pytest.fail("it answers"))
    with pytest.raises(DataError, match=says):
        profiler.profile(source, tmp_path / "profile", recipe(**of_rows(tmp_path, rows)))


@pytest.mark.parametrize(("samples", "texts", "count"), [(1, 100_000, 2), (96, 0, 24), (48, 48, 24), (4, 900, 24)])
def test_gates_are_trained_on_answers_too(samples: int, texts: int, count: int) -> None:
    asked = recipe([{"generator": "needle"}], samples=samples, text_samples=texts, text="prose")
    given = gate_recipe(asked.override(profile__gate_samples=count)).calibration
    assert given.samples >= 1
    assert given.samples + given.text_samples == count
    assert abs(given.text_samples - count * texts / (samples + texts)) <= 1

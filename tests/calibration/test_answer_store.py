"""Answers on disk: found again, told apart, and what is no answer left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from moacompress.calibration.data.answers import AnswerStore

PROMPTS = [[1, 2, 3], [4, 5, 6]]


def store(path: Path, weights: str = "0123", dtype: str = "float32") -> AnswerStore:
    return AnswerStore(path, weights, dtype)


def test_answers_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    first = store(path)
    assert first.get(PROMPTS[0], 8) is None
    first.add(PROMPTS, 8, [[7, 8], []])
    for opened in (first, store(path)):
        assert [opened.get(prompt, 8) for prompt in PROMPTS] == [[7, 8], []]
        assert opened.get(PROMPTS[0], 9) is None
        assert opened.get([1, 2], 8) is None
    assert store(path, weights="4567").get(PROMPTS[0], 8) is None
    assert store(path, dtype="bfloat16").get(PROMPTS[0], 8) is None


@pytest.mark.parametrize(
    "damage", [b'{"answers": {"a', b'{"answers": 3}\n', b'{"answers": {"k": "text"}}\n', b'{"answers": {"k": [-1]}}']
)
def test_what_is_damaged_is_left_out(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    store(path).add(PROMPTS[:1], 8, [[7]])
    with path.open("ab") as file:
        file.write(damage)
    opened = store(path)
    assert opened.get(PROMPTS[0], 8) == [7]
    assert "answers.jsonl: cannot read line 2" in caplog.text
    opened.add(PROMPTS[1:], 8, [[9]])
    opened.add([[1]], 8, [[3]])
    again = store(path)
    assert [again.get(prompt, 8) for prompt in (*PROMPTS, [1])] == [[7], [9], [3]]

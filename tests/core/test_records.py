"""The ledger of measurements: what survives a kill, and what is never mistaken."""

from __future__ import annotations

from pathlib import Path

import pytest

from moacompress.core.errors import ArtefactError
from moacompress.core.records import Records


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "eval.scores.jsonl"
    ledger = Records(path)
    ledger.add("a", {"nll": 0.1 + 0.2, "exact_match": 1.0}, model="plan", task="t")
    ledger.add("b", {"nll": 1e-300})
    again = Records(path)
    assert again.get("a") == {"nll": 0.1 + 0.2, "exact_match": 1.0}
    assert again.get("b") == {"nll": 1e-300}
    assert again.get("c") is None


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    ledger = Records(path)
    for name in "ab":
        ledger.add(name, {"nll": 1.0})
    path.write_text(path.read_text()[:-9])
    resumed = Records(path)
    assert (resumed.get("a"), resumed.get("b")) == ({"nll": 1.0}, None)
    resumed.add("b", {"nll": 2.0})
    assert Records(path).get("b") == {"nll": 2.0}


@pytest.mark.parametrize(
    "line",
    [
        "{", "[1]", "7", '{"key":"a"}', '{"key":"a","numbers":3}', '{"key":"a","numbers":{"x":"y"}}',
        '{"numbers":{"x":1}}', '{"key":"a","numbers":{"x":NaN}}', "[" * 100_000, '{"key":"a","hit":true,"nll":1}',
    ],
)  # fmt: skip
def test_lines_of_another_kind_are_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(f'{line}\n{{"key":"b","numbers":{{"x":1}}}}\n')
    ledger = Records(path)
    assert ledger.get("a") is None
    assert ledger.get("b") == {"x": 1.0}


def test_without_a_file() -> None:
    ledger = Records(None)
    ledger.add("a", {"x": 1.0})
    assert ledger.get("a") == {"x": 1.0}


def test_a_path_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="cannot read"):
        Records(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot write"):
        Records(tmp_path / "file" / "scores.jsonl").add("a", {"x": 1.0})

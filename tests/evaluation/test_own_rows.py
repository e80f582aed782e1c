"""Tasks of the user's own rows: every kind of row, what fits a length, refusals, and an evaluation by the command."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moacompress.calibration.data.data_rows import first_of_each, split_rows
from moacompress.calibration.data.held_out import held_out_rows
from moacompress.calibration.data.joined import Library
from moacompress.cli import app
from moacompress.core.errors import DataError, PlanError, UsageError
from moacompress.evaluation import runner
from moacompress.evaluation.runner import evaluate
from moacompress.evaluation.scoring.prompts import match_share
from moacompress.evaluation.tasks.own_rows import answered_sources, own_tasks
from moacompress.evaluation.tasks.registry import Resources, find_task, make_cases
from moacompress.prompts.pools import SPLITS
from moacompress.recipe_sections import SourceRecipe
from moacompress.rules.plan import Plan

PROMPT = {"prompt": "The capital of France is", "answer": ["Paris", "the city of Paris"]}
QUESTION = {"context": "Ada was born in 1815.", "question": "When was Ada born?", "answer": "1815"}
ROLES = ("system", "user", "assistant", "user", "assistant")
SAID = ("Be brief.", "Hello", "Hello.", "Name a colour.", "Blue")
CHAT = {"messages": [{"role": role, "content": said} for role, said in zip(ROLES, SAID, strict=True)]}


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_kind_of_row(tmp_path: Path, tiny_tokenizer: Any) -> None:
    for name, row, answer, says in (
        ("prompts", PROMPT, "Paris", "The capital of France is"),
        ("questions", QUESTION, "1815", "When was Ada born?"),
        ("chats", CHAT, "Blue", "Be brief."),
    ):
        own = own_tasks([write(tmp_path / f"{name}.jsonl", [row])])
        resources = Resources(own=own)
        assert find_task(name, resources) is own[name]
        (case,) = make_cases(name, 700, 5, 0, tiny_tokenizer, resources)
        whole = tiny_tokenizer.decode(case.prompt_ids + case.answer_ids)
        assert says in whole
        assert whole.rstrip().endswith(answer)
        assert tiny_tokenizer.decode(case.answer_ids).strip() == answer
        assert any(case.is_value)
        assert case.match == "any-words"
        assert bool(case.document) == (name == "questions")  # other questions on the text are not independent
    assert own_tasks([str(tmp_path / "prompts.jsonl")])["prompts"].given[0].references == tuple(PROMPT["answer"])  # type: ignore[index]
    with pytest.raises(UsageError, match="unknown task 'prompts'"):
        find_task("prompts")


def test_rows_in_order_that_fit(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [{"prompt": f"{'long ' * (400 if n % 2 else 1)}number {n} is", "answer": str(n)} for n in range(8)]
    resources = Resources(own=own_tasks([write(tmp_path / "mine.jsonl", rows)]))
    cases = make_cases("mine", 200, 8, 0, tiny_tokenizer, resources)
    assert [case.references for case in cases] == [("0",), ("2",), ("4",), ("6",)]
    assert all(case.tokens + 64 <= 200 + len(case.answer_ids) and case.new_tokens == 64 for case in cases)
    assert make_cases("mine", 200, 2, 5, tiny_tokenizer, resources) == cases[:2]  # whatever the seed
    assert len(make_cases("mine", 10_000, 8, 0, tiny_tokenizer, resources)) == 8


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"prompt": "Who?", "answer": " Ann\n"}, "It is Ann.", "Annabel."),
        ({"prompt": "Where?", "answer": "cafe\u0301"}, "In a caf\u00e9.", "In a cafe."),
        ({"prompt": "Is it?", "answer": "no"}, "No, it is not.", "Yes, as is well known."),
    ],
)
def test_answers_are_found_as_whole_words(
    row: Any, right: str, wrong: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """White space around them is none of them, and accents count however they are put together."""
    resources = Resources(own=own_tasks([write(tmp_path / "mine.jsonl", [row])]))
    (case,) = make_cases("mine", 200, 1, 0, tiny_tokenizer, resources)
    assert case.references[0] == case.references[0].strip()
    assert (match_share(case, right), match_share(case, wrong)) == (1.0, 0.0)


def test_all_answers_of_a_squad_file_are_right(tmp_path: Path, tiny_tokenizer: Any) -> None:
    asked = {"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann Bo"}, {"text": "Ann"}, {"text": "her"}]}
    data = {"data": [{"paragraphs": [{"context": "Ann Bo did it.", "qas": [asked]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(data))
    own = own_tasks([str(tmp_path / "squad.json")])
    (case,) = make_cases("squad", 700, 1, 0, tiny_tokenizer, Resources(own=own))
    assert case.references == ("Ann", "Ann Bo", "her")
    assert str(tiny_tokenizer.decode(case.answer_ids)).strip() == "Ann"


def test_a_hub_set_is_named_by_the_last_part_of_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moacompress.evaluation.tasks.own_rows.read_rows", lambda source: [PROMPT])
    assert [*own_tasks(["org/mmlu-0.5", "org/my set", str(tmp_path / "v0.5.jsonl")])] == ["mmlu-0.5", "my-set", "v0.5"]


def test_other_rows_are_another_wording(tmp_path: Path) -> None:
    first = own_tasks([write(tmp_path / "mine.jsonl", [PROMPT])])["mine"].wording
    assert own_tasks([write(tmp_path / "mine.jsonl", [PROMPT])])["mine"].wording == first
    for row in ({**PROMPT, "answer": "Lyon"}, {**PROMPT, "prompt": "The capital of Italy is"}):
        assert own_tasks([write(tmp_path / "mine.jsonl", [row])])["mine"].wording != first


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "What?"},
            "row 0 of file:mine.jsonl has no answer to measure against but None; give every row `answer`",
        ),
        ({"prompt": "What?", "answer": ["so", 3]}, "has no answer"),
        ({"text": "prose"}, "is plain text, which has no answers; give it as --text"),
        ({"messages": CHAT["messages"][:-1]}, "the assistant's last, .* it has the roles user, assistant, user"),
        ({"prompt": "What?", "answer": "so\ud83d"}, "mine.jsonl: ArrowInvalid: JSON parse error: The surrogate"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "needs turns"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        own_tasks([write(tmp_path / "mine.jsonl", [row])])


def test_names_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("recall", "all", "text"):
        with pytest.raises(UsageError, match=f"would be the task {name}, which there is already; rename it"):
            own_tasks([write(tmp_path / f"{name}.jsonl", [PROMPT])])
    (tmp_path / "b").mkdir()
    twice = [write(tmp_path / "mine.jsonl", [PROMPT]), write(tmp_path / "b" / "mine.jsonl", [QUESTION])]
    with pytest.raises(UsageError, match="rename it"):
        own_tasks(twice)
    with pytest.raises(UsageError, match="source 'needle' is no file"):
        own_tasks(["needle"])
    with pytest.raises(DataError, match=r"cannot read none\.jsonl"):
        own_tasks(["none.jsonl"])


def test_an_evaluation_of_own_rows(compressed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = [{"prompt": f"Word {n} of the list is", "answer": f"word{n}"} for n in range(5)]
    mine = write(tmp_path / "mine.jsonl", [*short, {"prompt": "long " * 900, "answer": "so"}])
    with caplog.at_level(logging.WARNING):
        report = evaluate(compressed, tasks=(), sources=[mine], lengths=(300, 400), prompts=20, against=("dense",))
    assert "1 of 6 rows of mine do not fit into 400 tokens" in caplog.text
    rows = [row for row in report["results"] if row["metric"] == "nll"]
    found = {(row["model"], row["task"], row["length"], row["prompts"]) for row in rows}
    assert found == {(model, "mine", 400, 5) for model in ("plan", "dense")}
    assert report["wording"]["mine"]
    mine = write(tmp_path / "mine.jsonl", [{"prompt": "long " * 900, "answer": "so"}, *short])
    caplog.clear()
    evaluate(compressed, tasks=(), sources=[mine], lengths=(400,), prompts=2, against=())
    assert "1 of the first 3 rows of mine do not fit into 400 tokens" in caplog.text
    with pytest.raises(DataError, match="no row of mine fits into 8 tokens"):
        evaluate(compressed, tasks=(), sources=[mine], lengths=(8,), prompts=20, against=())


def test_rows_that_are_held_out_are_those_that_no_calibration_has(tmp_path: Path) -> None:
    """By row, or by the document that is asked about; a row that is added moves no other."""
    prompts = [{"prompt": f"number {n} is", "answer": str(n)} for n in range(40)]
    mine = write(tmp_path / "mine.jsonl", prompts)
    pools = [split_rows(first_of_each(prompts, "prompt", "mine"), split, "mine") for split in SPLITS]
    assert sorted(index for pool in pools for index in pool) == list(range(40))
    held = held_out_rows(prompts, "prompt", "mine")
    assert held == pools[SPLITS.index("evaluation")]
    assert 4 <= len(held) <= 16
    more = held_out_rows([{"prompt": "a new one", "answer": "x"}, *prompts], "prompt", "mine")
    assert [index - 1 for index in more if index] == held
    for known in ((mine,), ("mine.jsonl",)):
        given = own_tasks([mine], known)["mine"].given
        assert given is not None
        assert [draft.references for draft in given] == [(str(index),) for index in held]
    texts = [f"Text {n} is about {n}." for n in range(20)]
    asked = [{"context": text, "question": f"What {q}?", "answer": "x"} for text in texts for q in "ab"]
    kept = {asked[index]["context"] for index in held_out_rows(asked, "question", "asked")}
    for split in ("calibration", "validation"):
        assert not kept & {*Library.of(asked, "asked", split).documents}
    assert kept == {*Library.of(asked, "asked", "evaluation").documents}


def test_a_source_without_answers_is_not_evaluated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"number {n} is"} for n in range(9)]
    mine = write(tmp_path / "mine.jsonl", rows)
    assert answered_sources([SourceRecipe(path=mine), SourceRecipe(generator="needle")]) == []
    assert "rows of file:mine.jsonl that are held out are not evaluated: row 0 of" in caplog.text
    answered = write(tmp_path / "answered.jsonl", [{**row, "answer": "x"} for row in rows])
    assert answered_sources([SourceRecipe(path=answered)]) == [answered]


def test_what_a_plan_was_calibrated_on(compressed: Path) -> None:
    plan = Plan.load(compressed / "model" / "plan.json")
    sources = [{"path": "some/mine.jsonl", "dataset": None}, {"path": None, "dataset": "who/set"}]
    seen = plan.with_notes(provenance={**plan.provenance, "recipe": {"calibration": {"sources": sources}}})
    assert runner.calibrated_on(seen) == {"some/mine.jsonl", "mine.jsonl", "who/set", "set"}
    for recipe in ("x", {"calibration": "x"}, {"calibration": {"sources": ["x"]}}):
        damaged = plan.with_notes(provenance={**plan.provenance, "recipe": recipe})
        with pytest.raises(PlanError, match="what the plan's notes say of its recipe is damaged"):
            runner.calibrated_on(damaged)


def test_the_command(compressed: Path, tmp_path: Path) -> None:
    other = {**QUESTION, "question": "Who was born in 1815?", "answer": "Ada"}
    mine = write(tmp_path / "mine.jsonl", [QUESTION, other])
    ask = ["eval", str(compressed), "--source", mine, "--lengths", "400", "--against", "none", "--json"]
    done = CliRunner().invoke(app, [*ask, "--fail-under", "mine:exact_match=1"])
    found = json.loads(done.stdout)
    assert {row["task"] for row in found["results"]} == {"mine"}
    assert done.exit_code == int(bool(found["failures"]))
    planned = json.loads(CliRunner().invoke(app, [*ask, "--dry-run"]).stdout)
    assert planned["answers"] == 2

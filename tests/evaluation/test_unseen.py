"""Unseen tasks: what their draws must keep to, and what they share with calibration: nothing."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import moacompress.evaluation.tasks.unseen as unseen
from moacompress.core.errors import DataError
from moacompress.evaluation.scoring.prompts import match_share
from moacompress.evaluation.tasks.cases import Case
from moacompress.evaluation.tasks.registry import find_task, make_cases
from moacompress.evaluation.tasks.unseen import code_question, tool_call
from moacompress.evaluation.tasks.unseen.names import NAMES, SPEAKERS, draw_names
from moacompress.prompts.library_source import read_modules
from moacompress.prompts.pools import draw_codes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSEEN = ("code-question", "legal-codes", "table-lookup", "dialogue-fact", "code-completion", "tool-call")


def drawn(task: str, length: int, count: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Returns the texts of prompts, each with its reference."""
    cases = make_cases(task, length, count, 0, tokenizer)
    return [(str(tokenizer.decode(case.prompt_ids)), case.references[0]) for case in cases]


def test_names_differ() -> None:
    assert len(set(draw_names(np.random.default_rng(0), NAMES))) == NAMES > 7000


def test_drawn_legal_codes(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    depths = []
    for text, code in drawn("legal-codes", 3000, 20, tiny_tokenizer):
        assert re.fullmatch(r"[A-Z]{2}-\d{4}", code)
        agreement, _, question = text.partition("\n\nWhat is the ")
        clauses = re.split(r"\d+\.\d ", agreement)[1:]
        assert len(set(clauses)) > 10
        (stated,) = [clause for clause in clauses if code in clause]
        assert not re.search(r"[{}]", text)
        noun, document, firms = re.match(r"([a-z ]+?) of the ([a-z ]+) between ([\w ]+)\?", question).groups()  # type: ignore[union-attr]
        assert all(part in stated for part in (noun, document, firms))
        assert f"The {noun} of the {document} between {firms} is" in question
        depths.append(clauses.index(stated) / len(clauses))
    assert min(depths) < 0.25
    assert max(depths) > 0.75


def test_drawn_tables(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    layouts, columns = set(), set()
    for text, value in drawn("table-lookup", 2000, 30, tiny_tokenizer):
        table = [re.split(r" ?[|,] ?", line.strip("| ")) for line in text.split("\n\n")[1].split("\n")]
        layouts.add(len(table[1][0]) == 3)
        header, rows = table[0], [row for row in table[1:] if row[0] != "---"]
        assert len(header) == 4
        assert len({row[0] for row in rows}) == len(rows) > 20
        column, name = re.search(r"what is the ([a-z ]+) of (\w+)\?", text).groups()  # type: ignore[union-attr]
        (row,) = [row for row in rows if row[0] == name]
        assert row[header.index(column)] == value
        columns.add(header.index(column))
    assert (layouts, columns) == ({True, False}, {2, 3})
    with pytest.raises(DataError, match=r"task table-lookup has 7,\d+ names, too few for a prompt of 400,000 tokens"):
        make_cases("table-lookup", 400_000, 1, 0, tiny_tokenizer)


def test_tables_where_a_token_has_several_digits() -> None:
    """A row of a CSV file takes 13 tokens or fewer there."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}|[a-z]{1,6}|[A-Z][a-z]{1,4}|\n|[^\w\n]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    for length in (1024, 4096):
        for case in make_cases("table-lookup", length, 6, 0, tokenizer):
            assert length - 30 < case.tokens <= length


def test_drawn_dialogues(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    firsts = 0
    for text, value in drawn("dialogue-fact", 2000, 30, tiny_tokenizer):
        company = re.split(r", | and ", re.search(r"conversation between ([\w, ]+)\.", text)[1])  # type: ignore[index]
        lines = [line.partition(": ")[::2] for line in text.split("\n\n")[1].split("\n")]
        assert len(set(company)) == 4
        assert {speaker for speaker, _ in lines} <= set(company) <= set(SPEAKERS)
        name, noun = re.search(r"What is (\w+)'s ([a-z ]+)\?", text).groups()  # type: ignore[union-attr]
        facts = [(speaker, said) for speaker, said in lines if re.search(r"\d{4}", said)]
        assert len(facts) == 2
        (asked,) = [fact for fact in facts if value in fact[1]]
        assert asked[0] == name
        assert f"my {noun} is {value}." in asked[1]
        firsts += asked == facts[0]
    assert 5 < firsts < 25


def test_drawn_modules(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """They are Python, and say the default once, in the definition of the function that is begun again."""
    for text, value in drawn("code-completion", 1500, 10, tiny_tokenizer):
        module = ast.parse(f"{text}0):\n        ...")
        *functions, remote = [node for node in module.body if not isinstance(node, ast.Expr)]
        (again,) = [node for node in ast.walk(remote) if isinstance(node, ast.FunctionDef)]
        (first,) = [node for node in functions if isinstance(node, ast.FunctionDef) and node.name == again.name]
        assert ast.literal_eval(first.args.defaults[0]) == int(value)
        assert [arg.arg for arg in first.args.args] == [arg.arg for arg in again.args.args]
        assert len(functions) > 10


@pytest.mark.parametrize("length", [900, 4000])
def test_drawn_code_questions(length: int, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Each answer is found again in the code of the prompt alone, by other means, and there is one."""
    depths, asked = [], set()
    for case in make_cases("code-question", length, 40, 0, tiny_tokenizer):
        text, (answer,) = str(tiny_tokenizer.decode(case.prompt_ids)), case.references
        code, question = re.fullmatch(r".*?```python\n(.*)\n```\n\n(.*?) Answer with .*", text, re.DOTALL).groups()  # type: ignore[union-attr]
        names = re.findall(r"`([^`]*)`", question)
        asked.add(question.partition("`")[0])
        if question.startswith("What is the default"):
            parameter, function = names
            (head,) = re.findall(rf"def {function}\((.*?)\)(?: ->.*)?:\n", code, re.DOTALL)
            (value,) = re.findall(rf"\b{parameter}\b(?:: \w+)?\s*=\s*([^,)\n]+)", head)
            assert value.strip("'\"") == answer
        elif question.startswith("What value"):
            (value,) = re.findall(rf"^{names[0]}(?:: \w+)? *= *(.*?)(?:\s+#.*)?$", code, re.MULTILINE)
            assert value.strip("'\"") == answer
        else:
            said = rf"\b{names[0]}\(" if "calls" in question else re.escape(names[0])
            called = re.sub(r"def \w+\(", lambda m: "#" * len(m[0]), code)
            (place,) = (found.start() for found in re.finditer(said, called))
            assert re.findall(r"def (\w+)\(", code[:place])[-1] == answer
            depths.append(place / len(code))
    assert len(asked) >= 4
    assert min(depths) < 0.3 < 0.6 < max(depths)


def test_code_questions_of_another_python_are_other_questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = find_task("code-question").wording
    monkeypatch.setattr(code_question, "read_modules", lambda names: (("csv", "def f(a=7):\n    pass\n"),))
    assert find_task("code-question").wording != before
    monkeypatch.undo()
    read_modules.cache_clear()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    said = r"source of Python's standard library .*, which .* lacks .*; ask for other tasks"
    with pytest.raises(DataError, match=said):
        _ = find_task("code-question").wording


def test_drawn_calls(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    depths = []
    for case in make_cases("tool-call", 1500, 20, 0, tiny_tokenizer):
        text = str(tiny_tokenizer.decode(case.prompt_ids))
        said = json.loads(case.references[0])
        number = said["arguments"]["ticket_number"]
        ((name, stated),) = re.findall(r"^(\w+): \1's ticket number is (\d+)\.$", text, re.MULTILINE)
        assert (number, text.count(number)) == (stated, 1)
        assert f"ticket of {name}." in text
        assert all(f"{tool.name}(ticket_number): {tool.does}" in text for tool in tool_call.TOOLS)
        assert json.loads(case.opening + str(tiny_tokenizer.decode(case.answer_ids))) == said
        depths.append(text.index(number) / len(text))
    assert min(depths) < 0.3
    assert max(depths) > 0.6


def test_a_call_is_right_that_parses_and_is_the_one_asked_for() -> None:
    case = Case("t", 9, [1], [1], [True], ('{"name": "f", "arguments": {"x": "7"}}',), "json", 9)
    case = replace(case, opening='{"name": "f", "arguments": {"x": "')
    for answer in ('7"}}', '7"}}\nDone.', '7" } }'):
        assert match_share(case, answer) == 1.0
    for answer in ('7"}', "7", '8"}}', "7, 7", ""):
        assert match_share(case, answer) == 0.0


def test_no_code_of_calibration_has_their_form() -> None:
    for split in ("calibration", "validation"):
        codes = draw_codes(np.random.default_rng(0), split, 2000)
        assert not any(re.search(r"[A-Z]{2}-\d{4}", code) for code in codes)


def test_nothing_but_the_registry_of_tasks_reads_them() -> None:
    package = Path(unseen.__file__).parents[3]
    folders = (package, *(package.parent / name for name in ("calibration", "search")))
    reading = re.compile(rf"^ *(from|import) {re.escape(unseen.__name__)}\b", re.MULTILINE)
    files = [file for folder in folders for file in folder.rglob("*.py") if reading.search(file.read_text("utf-8"))]
    own = {f"{task.replace('-', '_')}.py" for task in UNSEEN}
    assert {file.name for file in files} == own | {"registry.py"}

"""RULER's tasks say what the installed lm-evaluation-harness says, and this project says nothing of it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from moacompress.core.errors import UsageError
from moacompress.core.files import fingerprint
from moacompress.evaluation.tasks import registry as tasks
from moacompress.evaluation.tasks import ruler
from moacompress.evaluation.tasks.registry import TASKS, expand_tasks, make_cases
from moacompress.prompts.sentences import NEEDLES, NeedleSentences, QuestionSentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).parents[2]
RUN = 6
"""So many words in a row, the same in two projects, were not written twice."""
PANGRAM = "the quick brown fox jumps over the lazy dog"
SHIPPED = {
    "prepare_niah.py": (
        'NEEDLE = "The {type_needle_v} of {key}: {value}"\n'
        "def get():\n    haystack = load()\n    haystack = 'Hay.'\n"
        "def make():\n    return {'gen_prefix': f'The {type_needle_v[:-1]} of {query} is' if one else "
        "f'The {type_needle_v} of {query} are'}\n"
    ),
    "niah_utils.py": 'TEMPLATE = "Some {type_needle_v} are here.\\n{context}\\nWhat are all the {type_needle_v} of {query}?"\n',
}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields the folder of another harness, with sentences of its own."""
    folder = tmp_path / ruler.FOLDER
    folder.mkdir(parents=True)
    for name, text in SHIPPED.items():
        (folder / name).write_text(text)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    ruler.needles.cache_clear()
    yield folder
    ruler.needles.cache_clear()


def test_what_is_installed_can_be_read() -> None:
    """The digest is that of the sentences as published; it says none of them."""
    readers = (ruler.needles, ruler.tracking, ruler.common_words, ruler.frequent_words, ruler.documents)
    assert fingerprint([repr(read()) for read in readers]) == "d28c3fa43de89ab7"


def test_sentences_are_those_of_the_package(shipped: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert ruler.needles() == NeedleSentences(
        "The {kinds} of {key}: {value}",
        QuestionSentences("A {kind} is here.", "What is the {kind} of {key}?", "The {kind} of {key} is"),
        QuestionSentences("Some {kinds} are here.", "What are all the {kinds} of {key}?", "The {kinds} of {key} are"),
        ("Hay.",),
    )
    assert TASKS["niah-single-1"].wording != TASKS["needle-noise"].wording
    (case,) = make_cases("niah-single-1", 900, 1, 0, tiny_tokenizer)
    text = str(tiny_tokenizer.decode(case.prompt_ids))
    assert "A number is here.\nHay.\n" in text
    assert f": {case.references[0]}\n" in text


def test_another_version_fails_by_name(shipped: Path) -> None:
    (shipped / "niah_utils.py").write_text("PROMPT = 'x'\n")
    version = importlib.metadata.version("lm_eval")
    said = rf"lm-evaluation-harness, {version}, has no TEMPLATE in lm_eval/tasks/ruler/niah"
    with pytest.raises(UsageError, match=said):
        _ = TASKS["niah-single-1"].wording
    (shipped / "niah_utils.py").unlink()
    with pytest.raises(UsageError, match="has no source that can be read in lm_eval/tasks/ruler/niah_utils.py"):
        _ = TASKS["niah-single-1"].wording


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("niah-single-2", "ruler"):
        with pytest.raises(UsageError, match=r"^task niah-single-\d takes .* not installed; .*'moacompress\[eval\]'`$"):
            expand_tasks([name])
    ours = expand_tasks(["all"])
    assert "needle-noise" in ours
    assert not any(TASKS[name].ruler for name in ours)


def test_wording_is_that_of_the_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    wordings = {name: task.wording for name, task in TASKS.items()}
    assert all(re.fullmatch(r"[\da-f]{16}", wording) for wording in wordings.values())
    said = NeedleSentences("Now {key} has {value}.", NEEDLES.one, NEEDLES.several, ("A.",))
    monkeypatch.setattr(tasks, "EVALUATION_NEEDLES", said)
    changed = {name for name, task in TASKS.items() if task.wording != wordings[name]}
    assert {"needle-noise", "needle-prose-uuids", "multi-value-prose", "second-question"} <= changed
    assert not changed & {"niah-single-1", "recall", "legal-codes", "document-question", "variable-chain"}


def words_of(text: str) -> list[str]:
    """Returns the words, with one word for whatever is to be filled in."""
    return re.findall(r"[a-z']+|\{\}", re.sub(r"\{[^{}]*\}", "{}", text.lower()))


def texts_in(path: Path) -> Iterator[str]:
    """Yields all texts of a Python file but its docstrings, or all of another file."""
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        yield text
        return
    tree = ast.parse(text)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def runs_of(path: Path) -> set[tuple[str, ...]]:
    """Returns all that a file says as runs of words; those of few words, or with little but what is filled in, left out."""
    found: set[tuple[str, ...]] = set()
    for words in map(words_of, texts_in(path)):
        found |= {tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}
    return {run for run in found if len(set(run)) > RUN // 2 and run.count("{}") < RUN // 2}


@pytest.mark.heavy
def test_no_sentence_of_ours_is_rulers() -> None:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    theirs: set[tuple[str, ...]] = set()
    for path in (Path(spec.submodule_search_locations[0]) / ruler.FOLDER).glob("*.py"):
        theirs |= runs_of(path)
    assert len(theirs) > 300
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = [ROOT / name for name in listed.split("\0") if name.endswith((".py", ".yaml", ".md"))]
    assert len(ours) > 300
    common = {
        path.relative_to(ROOT).as_posix(): [run for run in runs_of(path) & theirs if " ".join(run) not in PANGRAM]
        for path in ours
        if path.is_file()
    }
    assert {name: sorted(map(" ".join, runs)) for name, runs in common.items() if runs} == {}

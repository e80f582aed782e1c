"""Families of prompts: what random draws must keep to."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moacompress.core.errors import DataError
from moacompress.evaluation.tasks import counting, needles, tracking
from moacompress.evaluation.tasks.drafts import Answer, PromptDraft, draft_ids
from moacompress.evaluation.tasks.registry import TASKS, make_cases
from moacompress.evaluation.tasks.task import PromptRequest, Resources
from moacompress.prompts.pools import SPLITS, Prose, draw_uuids
from moacompress.prompts.sentences import EVALUATION_NEEDLES, EVALUATION_NOISE
from tests.templates import without_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OURS = " ".join(EVALUATION_NOISE)
HIDDEN = "Note that "


@pytest.fixture
def write(tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns a function that drafts a prompt of a task: `write("variable-chain", 3000, seed=1)`."""

    def draft(name: str, length: int, seed: int = 0, index: int = 0, resources: Resources | None = None) -> PromptDraft:
        task = TASKS[name]
        rng, given = np.random.default_rng((seed, index)), resources or Resources()
        return task.write(PromptRequest(name, length, index, seed, rng, tiny_tokenizer, task.new_tokens, given))

    return draft


@pytest.fixture
def prose(tmp_path: Path) -> Resources:
    for name in "abcdef":
        words = (f"{name}{i}." if i % 7 == 6 else f"{name}{i}" for i in range(900))
        (tmp_path / f"{name}.txt").write_text(" ".join(words))
    return Resources(Prose.load(tmp_path))


def lines_of(draft: PromptDraft) -> list[str]:
    return draft.messages[0].split("\n")[1:-1]


def test_needles_hide_among_their_like(write: Any) -> None:
    for name, key, value in (
        ("needle-distractors", r"[a-z]+-[a-z]+", r"\d{7}"),
        ("needle-distractors-uuids", r"[\da-f-]{36}", r"[\da-f-]{36}"),
    ):
        draft = write(name, 3000)
        kind = "uuid" if name.endswith("uuids") else "number"
        lines = lines_of(draft)
        assert len(set(lines)) == len(lines) > 15
        for line in lines:
            assert re.fullmatch(rf"Note that {key} was given the {kind} {value}\.", line)
        asked = draft.prefix.split()[0]
        found = [line for line in lines if f" {asked} " in line]
        assert found == [EVALUATION_NEEDLES.hide(kind, asked, draft.references[0])]


@pytest.mark.parametrize(
    ("name", "hidden", "answers"),
    [
        ("needle-prose", 1, 1),
        ("needle-prose-uuids", 1, 1),
        ("multi-needle-prose", 4, 1),
        ("multi-value-prose", 4, 4),
        ("multi-query-prose", 4, 4),
    ],
)
def test_prose_tasks(write: Any, prose: Resources, name: str, hidden: int, answers: int) -> None:
    for seed in range(5):
        draft = write(name, 3000, seed, resources=prose)
        text = draft.messages[0]
        assert text.count(HIDDEN) == hidden
        assert len(set(draft.references)) == answers
        assert all(text.count(f" {value}.") == 1 for value in draft.references)
        assert ("The numbers given to " in draft.prefix) == (answers > 1)
        body = text.split("\n")[1]
        *before, last = [part.rstrip() for part in body.split(HIDDEN)]
        if last.endswith("."):
            before.pop()  # it follows the beginning of a sentence that the length cut off
        assert all(not part or part.endswith(".") for part in before)
        if name == "multi-value-prose":
            places = [text.index(value) for value in draft.references]
            assert places == sorted(places)
        if name == "multi-query-prose":
            keys = draft.prefix.split(" given to ")[1].removesuffix(":").replace("and ", "").split(", ")
            for key, value in zip(keys, draft.references, strict=True):
                assert f"{key} was given the number {value}." in text


def test_needles_are_at_every_depth(write: Any) -> None:
    assert needles.DEPTHS.tolist()[:6] == [0, 3, 5, 8, 10, 13]  # the published ones
    assert (len(needles.DEPTHS), needles.DEPTHS[-1]) == (40, 100)
    shares = []
    for seed in range(60):
        draft = write("niah-single-1", 1500, seed)
        lines = lines_of(draft)
        shares.append(next(i for i, line in enumerate(lines) if draft.references[0] in line) / len(lines))
    assert np.histogram(shares, bins=4, range=(0, 1))[0].min() > 7


def test_drawn_chains(write: Any) -> None:
    draft = write("variable-chain", 4000)
    example, asked = draft.messages[0].split("\n\n\n\n")
    assert example.count(OURS) == tracking.EXAMPLE_LINES
    names = list(draft.references)
    assert [len(name) for name in names] == [5] * 5
    assert len(set(names)) == 5
    assert draft.answer.text == " " + " ".join(names)
    value = draft.prefix.split("end up with ")[1].split()[0]
    chain = [part.split(".")[0] for part in asked.split("Let ")[1:]]
    assert chain == [f"{names[0]} be {value}", *(f"{name} be {other}" for other, name in pairwise(names))]
    assert 10_000 <= int(value) < 99_999
    assert example.split(" are ")[-1].split() != names


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(3000, 6, 1, (3, 1, 20)), (9000, 30, 3, (10, 3, 40))]
)
def test_drawn_lists(write: Any, length: int, often: int, seldom: int, example: tuple[int, int, int]) -> None:
    draft = write("common-words", length)
    for message, common, repeats in (
        (draft.messages[0], draft.messages[1].split("are:")[1].split(" ")[1::2], example[:2]),
        (draft.messages[2], list(draft.references), (often, seldom)),
    ):
        listed = message.split("\n")[1].split(" ")
        assert listed[::2] == [f"{i + 1}." for i in range(len(listed) // 2)]
        counts = Counter(listed[1::2])
        assert len(common) == 10
        assert {counts.pop(word) for word in common} == {repeats[0]}
        assert set(counts.values()) == {repeats[1]}
    assert len(Counter(draft.messages[0].split("\n")[1].split(" ")[1::2])) == example[2]
    assert common == sorted(common, key=listed[1::2].index)  # the model can but list them as they come up


def test_drawn_codes(write: Any) -> None:
    codes = ["...", "aaaaaa", "bbbbbb", "cccccc", "dddddd"]
    assert Counter(counting.spread(codes, 100)) == {"...": 60, "aaaaaa": 15, "bbbbbb": 6, "cccccc": 3, "dddddd": 2}
    for length in (1000, 2000):
        draft = write("frequent-words", length)
        text = draft.messages[0].split("\n")[1].split()
        counts = Counter(text)
        ranked = [code for code, _ in counts.most_common(4)]
        assert ranked == ["...", *draft.references]
        assert len({counts[code] for code in ranked}) == 4
        assert {len(code) for code in counts} == {3, 6}
        assert len(counts) <= length // 50
    with pytest.raises(DataError, match="task frequent-words takes at least 200 tokens; 199 were asked for"):
        write("frequent-words", 199)


def squad(path: Path, articles: int = 12, paragraphs: int = 3, size: int = 100) -> Path:
    def paragraph(a: int, p: int) -> dict[str, Any]:
        text = f"Document {a}.{p} {'x' * size}"
        question = {"question": f"Which {a}.{p}?", "answers": [{"text": f"{a}.{p}"}, {"text": f"{a}.{p}"}]}
        impossible = {"question": "None?", "answers": [], "is_impossible": True}
        return {"context": text, "qas": [question, impossible]}

    data = [{"title": str(a), "paragraphs": [paragraph(a, p) for p in range(paragraphs)]} for a in range(articles)]
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path


def test_documents_of_the_article_come_first(write: Any, tmp_path: Path) -> None:
    resources = Resources(squad=squad(tmp_path / "squad.json"))
    ours = {q.answers[0].split(".")[0] for q in resources.questions.questions}
    assert [len(q.answers) for q in resources.questions.questions] == [1] * 3 * len(ours)
    assert 0 < len(ours) < 12  # the others are left to calibration and validation
    few, all_ = (write("document-question", length, resources=resources) for length in (620, 8000))
    article = few.references[0].split(".")[0]
    shown = [line.split()[1] for line in few.messages[0].split("\n") if line.endswith("x")]
    assert few.references[0] in shown
    assert len(shown) == 3
    assert {document.split(".")[0] for document in shown} == {article}
    shown = [line.split()[1] for line in all_.messages[0].split("\n") if line.endswith("x")]
    assert len(set(shown)) == len(shown) == 3 * len(ours)
    drafts = [write("document-question", 620, index=index, resources=resources) for index in range(3 * len(ours))]
    assert len({draft.references[0] for draft in drafts}) == 3 * len(ours)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read SQuAD file .*No such file"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "is not a SQuAD file: KeyError 'context'"),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b?", "answers": [{"text": "a"}]}]}]}]}',
            "has too few distinct documents or articles with questions: 1",
        ),
    ],
)
def test_bad_squad(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "s.json").write_text(text)
    with pytest.raises(DataError, match=message):
        _ = Resources(squad=tmp_path / "s.json").questions


def test_uuids_of_splits_are_disjoint_by_construction() -> None:
    for index, split in enumerate(SPLITS):
        drawn = [uuid.UUID(text) for text in draw_uuids(np.random.default_rng(0), split, 200)]
        assert {value.version for value in drawn} == {4}
        assert {value.int % 3 for value in drawn} == {index}
        assert len(set(drawn)) == 200


def test_drawn_lines(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    case = make_cases("line-lookup", 3000, 1, 0, tiny_tokenizer)[0]
    text = str(tiny_tokenizer.decode(case.prompt_ids))
    lines = [line for line in text.split("\n") if " has the number " in line]
    assert len(lines) > 30
    assert len({line.split()[0] for line in lines}) == len(lines)
    asked = text.split("the line of ")[1].split("?")[0]
    assert f"{asked} has the number {case.references[0]}" in lines
    assert (case.match, case.new_tokens) == ("last-integer", 40)
    with pytest.raises(DataError, match=r"task line-lookup has 4,\d+ keys, too few for a prompt of 400,000 tokens"):
        make_cases("line-lookup", 400_000, 1, 0, tiny_tokenizer)


def test_drawn_recall(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    case = make_cases("recall", 1500, 1, 0, tiny_tokenizer)[0]
    *pairs, asked = str(tiny_tokenizer.decode(case.prompt_ids)).split("\n")
    assert len(pairs) > 40
    assert f"{asked} {case.references[0]}" in pairs
    assert sum(pair.endswith(f" {case.references[0]}") for pair in pairs) == 1


def test_drawn_second_question(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    firsts = 0
    for case in make_cases("second-question", 1200, 40, 0, tiny_tokenizer):
        turns = case.prompt_ids[: case.turn_at], case.prompt_ids[case.turn_at :]
        text, asked_after = (str(tiny_tokenizer.decode(ids)) for ids in turns)
        assert text.endswith(".<|im_end|>\n")  # the first answer
        assert asked_after.startswith("<|im_start|>user\nWhich number was ")
        assert text.count("\nNote that ") == 2
        hidden = [line for line in text.split("\n") if line.startswith("Note that ")]
        asked = [f" {case.references[0]}." in needle for needle in hidden]
        assert sum(asked) == 1
        firsts += asked[0]
    assert 10 < firsts < 30


def test_base_models_get_the_text_alone(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    base = without_template(tiny_tokenizer)
    draft = PromptDraft(("Ask.",), "\n", Answer.of("1"), ("1",))
    text = str(base.decode(draft_ids(base, draft)))
    assert text == draft.messages[0] + "\n"
    request = PromptRequest("second-question", 1500, 0, 0, np.random.default_rng(0), base)
    assert request.tokens(needles.make_second_question(request)) <= 1500

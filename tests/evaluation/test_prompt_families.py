"""Families of prompts against expected strings written out by hand, and what random draws must keep to."""

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
from moacompress.evaluation.tasks import counting, document_question, needles, tracking
from moacompress.evaluation.tasks.drafts import PromptDraft
from moacompress.evaluation.tasks.registry import TASKS
from moacompress.evaluation.tasks.squad_questions import Question, Questions
from moacompress.evaluation.tasks.task import PromptRequest, Resources
from moacompress.evaluation.tasks.vocabulary import WORDS
from moacompress.prompts.pools import ADJECTIVES, NOUNS, SPLITS, Prose, draw_uuids
from moacompress.prompts.sentences import DOCUMENTS, EVALUATION_NEEDLES, EVALUATION_NOISE, NEEDLES, NOISE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINE = " ".join(NOISE)
OURS = " ".join(EVALUATION_NOISE)
HIDDEN = "Note that "


@pytest.fixture
def write(tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns a function that drafts a prompt of a task: `write("variable-chain", 3000, seed=1)`."""

    def draft(name: str, length: int, seed: int = 0, index: int = 0, resources: Resources | None = None) -> PromptDraft:
        task = TASKS[name]
        rng = np.random.default_rng((seed, index))
        request = PromptRequest(
            name, length, index, seed, rng, tiny_tokenizer, task.new_tokens, resources or Resources()
        )
        return task.write(request)

    return draft


@pytest.fixture
def prose(tmp_path: Path) -> Resources:
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(
            " ".join(f"{name}{i}." if i % 7 == 6 else f"{name}{i}" for i in range(900))
        )
    return Resources(Prose.load(tmp_path))


def test_one_needle_in_lines() -> None:
    text = NEEDLES.hide("number", "bold-raven", "1234567")
    context = needles.in_lines([LINE] * 4, [text], [0.5])
    draft = needles.question("number", context, ["bold-raven"], ["1234567"], NEEDLES)
    assert draft.messages == (
        "Here and there the text below says which number a name has. Keep that in mind: a question about "
        "it follows the text.\n"
        "The bus stops at the corner. A dog barks next door. Someone turns a page. The coffee smells good. After that "
        "nothing happens for a while.\n"
        f"{LINE}\n"
        "Remember that the number of bold-raven is 1234567.\n"
        f"{LINE}\n{LINE}\n"
        "What is the number of bold-raven?",
    )
    assert draft.prefix == " The number of bold-raven is"
    assert draft.answer.text == " 1234567"
    assert draft.references == ("1234567",)


def test_several_needles_in_sentences() -> None:
    words = ["It", "was", "late.", "Was", "it?", "Yes!", "He", "said", '"no."', "And", "left."]
    texts = [NEEDLES.hide("uuid", key, value) for key, value in (("a-b", "u-1"), ("c-d", "u-2"))]
    context = needles.in_sentences(words, texts, [20, 100])
    draft = needles.question("uuid", context, ["c-d", "a-b"], ["u-2", "u-1"], NEEDLES)
    assert draft.messages == (
        "Here and there the text below says which uuid a name has. Keep that in mind: a question about it "
        "follows the text.\n"
        'It was late. Remember that the uuid of a-b is u-1. Was it? Yes! He said "no." And left. Remember that '
        "the uuid of c-d is u-2.\n"
        "What are the uuids of c-d, and a-b?",
    )
    assert draft.prefix == " The uuids of c-d, and a-b are"
    assert draft.answer.text == " u-2, u-1"
    draft = needles.question("number", "", ["k1", "k2", "k3", "k4"], ["1", "2", "3", "4"], NEEDLES)
    assert draft.messages[0].endswith("What are the numbers of k1, k2, k3, and k4?")


def lines_of(draft: PromptDraft) -> list[str]:
    return draft.messages[0].split("\n")[1:-1]


def test_one_among_noise(write: Any) -> None:
    draft = write("niah-single-1", 2000)
    lines = Counter(lines_of(draft))
    ((noise, count), (needle, _)) = lines.most_common()
    assert draft.references[0] in needle
    assert count > 10
    assert noise != LINE  # the published one
    assert lines[needle] == 1


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
        assert [line for line in lines if f" {asked} " in line] == [
            EVALUATION_NEEDLES.hide(kind, asked, draft.references[0])
        ]


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
            assert [
                f"{key} was given the number {value}." in text
                for key, value in zip(keys, draft.references, strict=True)
            ] == [True] * 4


def test_needles_are_at_every_depth(write: Any) -> None:
    assert needles.DEPTHS.tolist()[:6] == [0, 3, 5, 8, 10, 13]  # the published ones
    assert (len(needles.DEPTHS), needles.DEPTHS[-1]) == (40, 100)
    shares = []
    for seed in range(120):
        draft = write("niah-single-1", 1500, seed)
        lines = lines_of(draft)
        shares.append(next(i for i, line in enumerate(lines) if draft.references[0] in line) / len(lines))
    assert np.histogram(shares, bins=4, range=(0, 1))[0].min() > 15


def test_long_prompts_of_needles_use_keys_again(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    request = PromptRequest("t", 40_000, 0, 0, np.random.default_rng(0), tiny_tokenizer)
    lines = needles._distractors(request, needles.Needles("needles"), ["bold-raven"], NEEDLES)
    assert len(lines) == 10_000
    assert not any("bold-raven" in line for line in lines)


def test_variable_tracking() -> None:
    user, prefix = tracking.render(["AAAAA", "BBBBB", "CCCCC"], 12345, [0, 0, 2], 3, tracking.TRACKING)
    assert user == (
        "The text below gives values to variables, to most of them by way of another one.\n\n"
        f"Let AAAAA be 12345.  Let BBBBB be AAAAA.  {OURS}\n {OURS}\n Let CCCCC be BBBBB.  {OURS}\n\n"
        "Which variables end up with 12345?"
    )
    assert prefix == "\nThe 3 variables that end up with 12345 are"
    assert tracking.render_example(["AAA", "BBB"], 77777, [0, 0], 1, tracking.TRACKING) == (
        "The text below gives values to variables, to most of them by way of another one.\n\n"
        f"Let AAA be 77777.  Let BBB be AAA.  {OURS}\n\n"
        "Which variables end up with 77777?\nThe 2 variables that end up with 77777 are AAA BBB\n\n\n\n"
    )


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


def test_common_words() -> None:
    draft = counting.render_common((["x", "y", "x"], ["x"]), (["b", "c", "a", "b", "a"], ["a", "b"]), counting.COMMON)
    said = "Ten words of this numbered list come up far more often than all others.\n{}\nWhich ten words are they?"
    solved = "The ten words are:1. x"
    assert draft.messages == (said.format("1. x 2. y 3. x"), solved, said.format("1. b 2. c 3. a 4. b 5. a"))
    assert draft.prefix == "\nThe ten words are:"
    assert draft.answer.text == "1. b 2. a"
    assert [draft.answer.text[a:b] for a, b in draft.answer.spans] == ["b", "a"]
    assert draft.references == ("b", "a")


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


def test_the_list_of_words() -> None:
    assert len(set(WORDS)) == len(WORDS) > 700
    assert not set(WORDS) & {*NOUNS, *ADJECTIVES}  # no key of any split
    assert all(word.isalpha() and word.islower() and len(word) > 3 for word in WORDS)
    many = counting.draw_words(np.random.default_rng(0), len(WORDS) + 50)
    assert set(many[: len(WORDS)]) == set(WORDS)
    assert all("-" in word for word in many[len(WORDS) :])
    assert len(set(many)) == len(many)


def test_frequent_words() -> None:
    codes = ["...", "aaaaaa", "bbbbbb", "cccccc", "dddddd"]
    assert Counter(counting.spread(codes, 100)) == {"...": 60, "aaaaaa": 15, "bbbbbb": 6, "cccccc": 3, "dddddd": 2}
    draft = counting.render_frequent(["...", "aaaaaa", "...", "bbbbbb", "cccccc"], codes[1:4], counting.FREQUENT)
    assert draft.messages == (
        "This text is made of invented words and of dots.\n... aaaaaa ... bbbbbb cccccc\nLeaving out the dots, which three "
        "words come up most often? Name them and say nothing else.",
    )
    assert draft.prefix == "\nThe three words are:"
    assert draft.answer.text == " aaaaaa, bbbbbb, cccccc"


def test_drawn_codes(write: Any) -> None:
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


KNOWN = Questions(
    (Question("Who?", ("Ann", "Ann B."), 1, (0,)), Question("When?", ("1900",), 2, ())),
    ("Doc zero.", "Doc one.", "Doc two."),
)


def test_question_answering() -> None:
    draft = document_question.render(KNOWN.questions[0], [2, 1], KNOWN, DOCUMENTS)
    assert draft.messages == (
        "Several texts follow, and after them a question that one of the texts answers.\n\n"
        "[Text 1]\nDoc two.\n\n"
        "[Text 2]\nDoc one.\n\n"
        "Question: Who?\nReply with the answer alone, as short as it can be.",
    )
    assert draft.prefix == " Answer:"
    assert draft.answer.text == " Ann"
    assert draft.references == ("Ann", "Ann B.")


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
    asked = [
        write("document-question", 620, index=index, resources=resources).references[0]
        for index in range(3 * len(ours))
    ]
    assert len(set(asked)) == 3 * len(ours)


def test_a_question_with_too_long_a_document_makes_way(write: Any, tmp_path: Path) -> None:
    path = squad(tmp_path / "squad.json", paragraphs=1)
    data = json.loads(path.read_text())
    for article in data["data"][3:]:
        long = {**article["paragraphs"][0], "context": article["paragraphs"][0]["context"] + "y" * 2000}
        article["paragraphs"] = [long]
    path.write_text(json.dumps(data))
    resources = Resources(squad=path)
    short = {
        q.answers[0] for q in resources.questions.questions if len(resources.questions.documents[q.document]) < 900
    }
    assert 0 < len(short) < len(resources.questions.questions)
    for index in range(8):
        assert write("document-question", 900, index=index, resources=resources).references[0] in short


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read SQuAD file .*No such file"),
        ("{", "is not valid JSON"),
        ("[]", "is not a SQuAD file"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "is not a SQuAD file: KeyError 'context'"),
        ('{"data": []}', "has no answerable question"),
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

"""RULER's prompts against expected strings written out by hand, and what random draws must keep to."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moacompress.core.errors import DataError
from moacompress.evaluation.drafts import PromptDraft
from moacompress.evaluation.prompt_request import PromptRequest, Resources
from moacompress.evaluation.ruler import counting, needles, questions, tracking
from moacompress.evaluation.squad_questions import Question, Questions
from moacompress.evaluation.tasks import TASKS
from moacompress.evaluation.vocabulary import WORDS
from moacompress.prompts.pools import ADJECTIVES, NOUNS, SPLITS, Prose, draw_uuids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture
def write(tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns a function that drafts a prompt of a task: `write("vt", 3000, seed=1)`."""

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
    text = needles.needle("number", "bold-raven", "1234567")
    draft = needles.question("number", needles.in_lines([NOISE] * 4, [text], [0.5]), ["bold-raven"], ["1234567"])
    assert draft.messages == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        "One of the special magic numbers for bold-raven is: 1234567.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        "What is the special magic number for bold-raven mentioned in the provided text?",
    )
    assert draft.prefix == " The special magic number for bold-raven mentioned in the provided text is"
    assert draft.answer.text == " 1234567"
    assert draft.references == ("1234567",)


def test_several_needles_in_sentences() -> None:
    words = ["It", "was", "late.", "Was", "it?", "Yes!", "He", "said", '"no."', "And", "left."]
    texts = [needles.needle("uuid", key, value) for key, value in (("a-b", "u-1"), ("c-d", "u-2"))]
    context = needles.in_sentences(words, texts, [20, 100])
    draft = needles.question("uuid", context, ["c-d", "a-b"], ["u-2", "u-1"])
    assert draft.messages == (
        "Some special magic uuids are hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the uuids afterwards.\n"
        'It was late. One of the special magic uuids for a-b is: u-1. Was it? Yes! He said "no." And left. One of the '
        "special magic uuids for c-d is: u-2.\n"
        "What are all the special magic uuids for c-d, and a-b mentioned in the provided text?",
    )
    assert draft.prefix == " The special magic uuids for c-d, and a-b mentioned in the provided text are"
    assert draft.answer.text == " u-2, u-1"


def test_four_keys_are_listed() -> None:
    draft = needles.question("number", "", ["k1", "k2", "k3", "k4"], ["1", "2", "3", "4"])
    assert draft.messages[0].endswith(
        "the special magic numbers for k1, k2, k3, and k4 mentioned in the provided text?"
    )


def lines_of(draft: PromptDraft) -> list[str]:
    return draft.messages[0].split("\n")[1:-1]


def test_single_1(write: Any) -> None:
    draft = write("niah-single-1", 2000)
    lines = Counter(lines_of(draft))
    (needle,) = (line for line in lines if line != NOISE)
    assert needle.endswith(f" is: {draft.references[0]}.")
    assert lines[NOISE] > 10
    assert lines[needle] == 1


def test_multikey_2_and_3_hide_among_their_like(write: Any) -> None:
    for name, key, value in (
        ("niah-multikey-2", r"[a-z]+-[a-z]+", r"\d{7}"),
        ("niah-multikey-3", r"[\da-f-]{36}", r"[\da-f-]{36}"),
    ):
        draft = write(name, 3000)
        kind = "number" if name.endswith("2") else "uuid"
        lines = lines_of(draft)
        assert len(set(lines)) == len(lines) > 15
        for line in lines:
            assert re.fullmatch(rf"One of the special magic {kind}s for {key} is: {value}\.", line)
        asked = draft.prefix.split(" for ")[1].split()[0]
        assert [line for line in lines if f" {asked} " in line] == [needles.needle(kind, asked, draft.references[0])]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "hidden", "answers"),
    [
        ("niah-single-2", 1, 1),
        ("niah-single-3", 1, 1),
        ("niah-multikey-1", 4, 1),
        ("niah-multivalue", 4, 4),
        ("niah-multiquery", 4, 4),
    ],
)
def test_prose_tasks(write: Any, prose: Resources, name: str, hidden: int, answers: int) -> None:
    for seed in range(5):
        draft = write(name, 3000, seed, resources=prose)
        text = draft.messages[0]
        assert text.count("One of the special magic ") == hidden
        assert len(set(draft.references)) == answers
        assert all(text.count(f"is: {value}.") == 1 for value in draft.references)
        assert (" are" if answers > 1 else " is") == draft.prefix[-len(" are" if answers > 1 else " is") :]
        body = text.split("\n")[1]
        *before, last = [part.rstrip() for part in body.split("One of the special magic ")]
        if last.endswith("."):
            before.pop()  # it follows the beginning of a sentence that the length cut off
        assert all(not part or part.endswith(".") for part in before)
        if name == "niah-multivalue":
            places = [text.index(value) for value in draft.references]
            assert places == sorted(places)
        if name == "niah-multiquery":
            keys = draft.prefix.split(" for ")[1].split(" mentioned")[0].replace("and ", "").split(", ")
            assert [f"for {key} is: {value}." in text for key, value in zip(keys, draft.references, strict=True)] == [
                True
            ] * 4


def test_depths_are_the_published_ones() -> None:
    assert needles.DEPTHS.tolist()[:6] == [0, 3, 5, 8, 10, 13]
    assert (len(needles.DEPTHS), needles.DEPTHS[-1]) == (40, 100)


def test_needles_are_at_every_depth(write: Any) -> None:
    shares = []
    for seed in range(120):
        lines = lines_of(write("niah-single-1", 1500, seed))
        shares.append(next(i for i, line in enumerate(lines) if line != NOISE) / len(lines))
    assert np.histogram(shares, bins=4, range=(0, 1))[0].min() > 15


def test_long_prompts_of_needles_use_keys_again(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    request = PromptRequest("t", 40_000, 0, 0, np.random.default_rng(0), tiny_tokenizer)
    lines = needles._distractors(request, needles.Needles("needles"), ["bold-raven"])
    assert len(lines) == 10_000
    assert not any("bold-raven" in line for line in lines)


def test_variable_tracking() -> None:
    user, prefix = tracking.render(["AAAAA", "BBBBB", "CCCCC"], 12345, [0, 0, 2], 3)
    assert user == (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "VAR AAAAA = 12345 VAR BBBBB = VAR AAAAA  "
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n "
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n "
        "VAR CCCCC = VAR BBBBB  "
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n\n"
        "Question: Find all variables that are assigned the value 12345 in the text above."
    )
    assert prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, 3 variables are assgined the value "
        "12345, they are: "
    )
    assert tracking.render_example(["AAA", "BBB"], 77777, [0, 0], 1) == (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "VAR AAA = 77777 VAR BBB = VAR AAA  "
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n\n"
        "Question: Find all variables that are assigned the value 77777 in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 2 variables are assgined the value 77777, they are:  AAA BBB"
        "\n\n\n\n"
    )


def test_drawn_chains(write: Any) -> None:
    draft = write("vt", 4000)
    example, asked = draft.messages[0].split("\n\n\n\n")
    assert example.count("back again.") == tracking.EXAMPLE_LINES
    names = list(draft.references)
    assert [len(name) for name in names] == [5] * 5
    assert len(set(names)) == 5
    assert draft.answer.text == " ".join(names)
    chain = [part.split("  ")[0].split(" The ")[0] for part in asked.split("VAR ")[1:]]
    value = draft.prefix.split("the value ")[1].split(",")[0]
    assert asked.index(f"VAR {names[0]} = {value}") < asked.index(f"VAR {names[1]} = VAR {names[0]} ")
    assert chain[0] == f"{names[0]} = {value}"
    assert 10_000 <= int(value) < 99_999
    assert example.split(": ")[-1].split() != names


def test_common_words() -> None:
    draft = counting.render_common((["x", "y", "x"], ["x"]), (["b", "c", "a", "b", "a"], ["a", "b"]))
    first = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n1. x 2. y 3. x\nQuestion: What are the 10 most common words in the above list?"
    )
    second = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n1. b 2. c 3. a 4. b 5. a\nQuestion: What are the 10 most common words in the above list?"
    )
    solved = "Answer: The top 10 words that appear most often in the list are:1. x"
    assert draft.messages == (first, solved, second)
    assert draft.prefix == " Answer: The top 10 words that appear most often in the list are:"
    assert draft.answer.text == "1. b 2. a"
    assert [draft.answer.text[a:b] for a, b in draft.answer.spans] == ["b", "a"]
    assert draft.references == ("b", "a")


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(3000, 6, 1, (3, 1, 20)), (9000, 30, 3, (10, 3, 40))]
)
def test_drawn_lists(write: Any, length: int, often: int, seldom: int, example: tuple[int, int, int]) -> None:
    draft = write("cwe", length)
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
    assert len(set(WORDS)) == len(WORDS) > 1300
    assert not set(WORDS) & {*NOUNS, *ADJECTIVES}  # no key of any split
    assert all(word.isalpha() and word.islower() and len(word) > 3 for word in WORDS)
    many = counting.draw_words(np.random.default_rng(0), len(WORDS) + 50)
    assert set(many[: len(WORDS)]) == set(WORDS)
    assert all("-" in word for word in many[len(WORDS) :])
    assert len(set(many)) == len(many)


def test_frequent_words() -> None:
    codes = ["...", "aaaaaa", "bbbbbb", "cccccc", "dddddd"]
    assert Counter(counting.spread(codes, 100)) == {"...": 60, "aaaaaa": 15, "bbbbbb": 6, "cccccc": 3, "dddddd": 2}
    draft = counting.render_frequent(["...", "aaaaaa", "...", "bbbbbb", "cccccc"], codes[1:4])
    assert draft.messages == (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ... aaaaaa ... bbbbbb cccccc\nQuestion: Do not provide any explanation. Please ignore the "
        "dots '....'. What are the three most frequently appeared words in the above coded text?",
    )
    assert draft.prefix == " Answer: According to the coded text above, the three most frequently appeared words are:"
    assert draft.answer.text == " aaaaaa, bbbbbb, cccccc"


def test_drawn_codes(write: Any) -> None:
    for length in (1000, 2000):
        draft = write("fwe", length)
        text = draft.messages[0].split("coded words. ")[1].split("\n")[0].split()
        counts = Counter(text)
        ranked = [code for code, _ in counts.most_common(4)]
        assert ranked == ["...", *draft.references]
        assert len({counts[code] for code in ranked}) == 4
        assert {len(code) for code in counts} == {3, 6}
        assert len(counts) <= length // 50
    with pytest.raises(DataError, match="task fwe takes at least 200 tokens; 199 were asked for"):
        write("fwe", 199)


KNOWN = Questions(
    (Question("Who?", ("Ann", "Ann B."), 1, (0,)), Question("When?", ("1900",), 2, ())),
    ("Doc zero.", "Doc one.", "Doc two."),
)


def test_question_answering() -> None:
    draft = questions.render(KNOWN.questions[0], [2, 1], KNOWN)
    assert draft.messages == (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
        "The following are given documents.\n\n"
        "Document 1:\nDoc two.\n\n"
        "Document 2:\nDoc one.\n\n"
        "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
        "Question: Who?",
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
    assert [len(q.answers) for q in resources.questions.questions] == [1] * 12
    # the others are left to calibration and validation
    assert {q.answers[0].split(".")[0] for q in resources.questions.questions} == {"2", "5", "8", "11"}
    few, all_ = (write("qa-squad", length, resources=resources) for length in (760, 8000))
    article = few.references[0].split(".")[0]
    shown = [line.split()[1] for line in few.messages[0].split("\n") if line.endswith("x")]
    assert few.references[0] in shown
    assert len(shown) == 3
    assert {document.split(".")[0] for document in shown} == {article}
    shown = [line.split()[1] for line in all_.messages[0].split("\n") if line.endswith("x")]
    assert len(set(shown)) == len(shown) == 12
    asked = [write("qa-squad", 760, index=index, resources=resources).references[0] for index in range(12)]
    assert len(set(asked)) == 12


def test_a_question_with_too_long_a_document_makes_way(write: Any, tmp_path: Path) -> None:
    path = squad(tmp_path / "squad.json")
    data = json.loads(path.read_text())
    for article in data["data"][3:]:
        for paragraph in article["paragraphs"]:
            paragraph["context"] += "y" * 2000
    path.write_text(json.dumps(data))
    resources = Resources(squad=path)
    for index in range(8):
        assert write("qa-squad", 900, index=index, resources=resources).references[0].startswith("2.")


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
            "no answerable question in every third article",
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

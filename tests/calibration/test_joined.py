"""Questions over joined documents: exact lengths, whole documents, depth, splits, and what is wrong with data."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moacompress.calibration.data.answers import SampleDraft
from moacompress.calibration.data.data_rows import read_rows
from moacompress.calibration.data.joined import SLACK, Library, exact_cut, joined_drafts
from moacompress.core.errors import DataError
from moacompress.evaluation.tasks.squad_questions import Questions
from moacompress.prompts.pools import SPLITS, Split
from moacompress.prompts.recall import WORDS
from moacompress.prompts.sentences import DOCUMENTS
from moacompress.recipe_sections import SourceRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]


def prose(seed: int, words: int, end: str = ", é and 漢字.") -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS["calibration"]) for _ in range(words)) + end


def rows(documents: int = 60, words: int = 30, end: str = ", é and 漢字.") -> Rows:
    """Returns a row for each document; its text and its question begin with its number."""
    return [
        {"context": f"D{i} {prose(i, words, end)}", "question": f"What of D{i}?", "answer": "unused"}
        for i in range(documents)
    ]


def subwords(kind: str) -> PreTrainedTokenizerBase:
    """Returns a tokenizer of merged pieces: `bytes` as GPT-2's, or `spaces` as Llama 2's, with a first token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "spaces"))
    byte_level = kind == "bytes"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False) if byte_level else pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["context"] + row["question"] + DOCUMENTS.prompt for row in rows()], trainer)
    if kind == "spaces":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    found: dict[str, Any] = {"letters": tiny_tokenizer, "bytes": subwords("bytes"), "spaces": subwords("spaces")}
    for name in tuple(found):
        found[f"{name}-chat"], found[name] = copy.deepcopy(found[name]), copy.deepcopy(found[name])
        found[f"{name}-chat"].chat_template = tiny_tokenizer.chat_template
        found[name].chat_template = None
    return found


def draw(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int = 4, split: Split = "calibration", **given: Any
) -> list[SampleDraft]:
    return joined_drafts(
        given.get("rows") or rows(), "qa", {length: count}, split, (given.get("seed", 0),), tokenizer, 16
    )


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("letters", 777),
        ("letters-chat", 2000),
        ("bytes", 1024),
        ("bytes-chat", 700),
        ("spaces", 2000),
        ("spaces-chat", 777),
    ],
)
def test_prompt_and_room_are_the_length(tokenizers: dict[str, PreTrainedTokenizerBase], name: str, length: int) -> None:
    many = rows(documents=240)
    drafts = draw(tokenizers[name], length, 6, rows=many)
    found = [len(draft.ids) + draft.room for draft in drafts]
    assert all(length - SLACK <= tokens <= length for tokens in found)
    assert found.count(length) >= 5
    assert {draft.kind for draft in drafts} == {"answer"}
    assert not any(any(draft.mask) for draft in drafts)


def test_any_length_is_met_whatever_is_left_for_the_last_document(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    """Over more lengths than a document has tokens, a document of its own is sometimes too much for what is left."""
    for length in range(600, 760, 5):
        (draft,) = draw(tokenizers["bytes-chat"], length, 1, rows=rows(120, 12))
        assert len(draft.ids) + draft.room == length


def test_the_prompt(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    given = rows(90, end=".")
    text_of = {row["context"].split()[0]: row["context"] for row in given}
    begins = "Several texts follow, and after them a question that one of the texts answers.\n\n[Text "
    for name, end in (("letters", " Answer:"), ("letters-chat", "<|im_end|>\n<|im_start|>assistant\nAnswer:")):
        for draft in draw(tokenizers[name], 2500, 4, rows=given):
            text = str(tokenizers[name].decode(list(draft.ids)))
            assert text.startswith(f"<|im_start|>user\n{begins}" if "chat" in name else begins)
            asked = text.split("Question: What of ")[1].split("?")[0]
            closing = f"\n\nQuestion: What of {asked}?\nReply with the answer alone, as short as it can be.{end}"
            assert text.endswith(closing)
            shown = text.split(begins)[1].removesuffix(closing).split("\n\n[Text ")
            assert [part.split("]")[0] for part in shown] == [str(i) for i in range(1, len(shown) + 1)]
            documents = [part.split("]\n")[1] for part in shown]
            whole = [document for document in documents if document in text_of.values()]
            assert len(whole) >= len(documents) - 1
            assert text_of[asked] in whole
            assert len({document.split()[0] for document in documents}) == len(documents)
            assert "unused" not in text


def test_own_document_is_at_any_depth(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    places = []
    for draft in draw(tokenizers["letters"], 3000, 60, rows=rows(360, 12)):
        text = str(tokenizers["letters"].decode(list(draft.ids)))
        asked = text.split("Question: What of ")[1].split("?")[0]
        shown = text.split("\n\nQuestion: ")[0].split("[Text ")[1:]
        places.append(next(i for i, part in enumerate(shown) if part.split()[1] == asked) / (len(shown) - 1))
    assert sum(place < 0.34 for place in places) > 8
    assert sum(place > 0.66 for place in places) > 8
    assert {0.0, 1.0} <= set(places)


def documents_of(tokenizer: PreTrainedTokenizerBase, drafts: list[SampleDraft]) -> set[str]:
    text = " ".join(str(tokenizer.decode(list(draft.ids))) for draft in drafts)
    return {word for word in text.replace("?", "").split() if word[0] == "D" and word[1:].isdigit()}


def test_splits_and_lengths_share_nothing(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers["letters-chat"]
    seen = {split: documents_of(tokenizer, draw(tokenizer, 3000, 10, split)) for split in SPLITS}
    assert all(len(names) > 10 for names in seen.values())
    assert len(set.union(*seen.values())) == sum(map(len, seen.values()))
    first, second = joined_drafts(rows(), "qa", {1500: 1, 2000: 1}, "calibration", (0,), tokenizer, 16)
    asked = [str(tokenizer.decode(list(draft.ids))).split("Question: ")[1] for draft in (first, second)]
    assert asked[0] != asked[1]
    again = joined_drafts(rows(), "qa", {1500: 1, 2000: 1}, "calibration", (0,), tokenizer, 16)
    assert [draft.ids for draft in again] == [first.ids, second.ids]
    other = joined_drafts(rows(), "qa", {1500: 1, 2000: 1}, "calibration", (1,), tokenizer, 16)
    assert [draft.ids for draft in other] != [first.ids, second.ids]


def test_articles_stay_together() -> None:
    titled = [{**row, "title": f"T{index // 4}"} for index, row in enumerate(rows(40))]
    libraries = [Library.of(titled, "qa", split) for split in SPLITS]
    held = [{int(text.split()[0][1:]) // 4 for text in library.documents} for library in libraries]
    assert sorted(article for articles in held for article in articles) == list(range(10))
    assert all(len(library.documents) == 4 * len(articles) for library, articles in zip(libraries, held, strict=True))
    shared = [*rows(6), {"context": rows(1)[0]["context"], "question": "What else?", "title": "elsewhere"}]
    asked = [Library.of(shared, "qa", split).questions for split in SPLITS]
    assert sum(("What else?", 0) in questions and ("What of D0?", 0) in questions for questions in asked) == 1
    library = Library.of(titled, "qa", "calibration")
    near = library.distractors(0, np.random.default_rng(0))
    assert {library.articles[index] for index in near[:3]} == {library.articles[0]}
    assert sorted([0, *near]) == list(range(len(library.documents)))


def squad(path: Path, articles: int = 9, paragraphs: int = 4) -> SourceRecipe:
    def paragraph(number: int) -> dict[str, Any]:
        asked = {"question": f"What of D{number}?", "answers": [{"text": "unused"}]}
        impossible = {"question": f"What not of D{number}?", "answers": [], "is_impossible": True}
        return {"context": f"D{number} {prose(number, 20)}", "qas": [asked, impossible]}

    data = [
        {"title": "same", "paragraphs": [paragraph(article * paragraphs + i) for i in range(paragraphs)]}
        for article in range(articles)
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return SourceRecipe(path=str(path))


def test_squad_files_are_split_by_article(tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    source = squad(tmp_path / "squad.json")
    read: Any = read_rows(source)
    assert len(read) == 36
    assert not any("What not" in row["question"] for row in read)
    held = []
    for split in SPLITS:
        drafts = joined_drafts(read, "squad", {560: 3}, split, (0,), tokenizers["bytes"], 16)
        text = " ".join(str(tokenizers["bytes"].decode(list(draft.ids))) for draft in drafts)
        held.append({int(number) // 4 for number in re.findall(r"\]\nD(\d+) ", text)})
    assert len(set.union(*held)) == sum(map(len, held))
    known = Questions.load(tmp_path / "squad.json")
    assert set(known.documents) == set(Library.of(read, "squad", "evaluation").documents)
    assert {known.documents[q.document] for q in known.questions} == set(known.documents)


def test_an_article_that_is_added_moves_no_other() -> None:
    given = rows(40)
    before, after = (
        {split: set(Library.of(some, "qa", split).documents) for split in SPLITS} for some in (given[1:], given)
    )
    assert all(before[split] <= after[split] for split in SPLITS)
    copied = [*given, {"context": f"\ufeff{given[3]['context'].upper()}\u00a0 ", "question": "Again?"}]
    again = {split: Library.of(copied, "qa", split).documents for split in SPLITS}
    assert sum(len({text.casefold().strip("\ufeff") for text in texts}) for texts in again.values()) == 40


def test_a_question_whose_document_is_too_long_makes_way(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    mixed = [{**row, "context": row["context"] * (9 if i % 2 else 1)} for i, row in enumerate(rows(120, 12))]
    drafts = draw(tokenizers["letters"], 1000, 5, rows=mixed)
    asked = [str(tokenizers["letters"].decode(list(draft.ids))).split("What of D")[1].split("?")[0] for draft in drafts]
    assert len(set(asked)) == 5
    assert not any(int(number) % 2 for number in asked)


@pytest.mark.parametrize(
    ("given", "length", "message"),
    [
        (rows(2), 900, r"qa has too few distinct documents or articles with questions: 2; .*need at least one each"),
        (
            rows(9, 5),
            4000,
            r"the \d documents of qa \(calibration\) fill \d+ tokens with the question; a prompt of 3,984 was asked",
        ),
        (
            rows(9, 200),
            600,
            r"qa has 0 calibration questions left whose document fits a prompt of 600 tokens, of 40 needed",
        ),
        (rows(40, 30), 800, r"qa has \d+ calibration questions left .*of 40 needed"),
        ([*rows(9), {"context": "x", "question": " "}], 800, r"row 9 of qa has no text under 'question' but ' '"),
        ([{"question": "x"}, *rows(9)], 800, r"row 0 of qa has no text under 'context' but None"),
    ],
)
def test_bad_data(given: Rows, length: int, message: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    with pytest.raises(DataError, match=message):
        draw(tokenizers["letters"], length, 40, rows=given)


@pytest.mark.parametrize(
    ("tokens", "target", "cut"),
    [
        (lambda size: 10 + size, 40, 30),
        (lambda size: 10 + size // 4, 40, 123),
        (lambda size: 10 + 2 * size, 41, 15),
        (lambda size: 10 + 4 * size, 53, 0),
        (lambda size: 10 + size - (size > 35), 45, 36),
        (lambda size: 50 + size, 50, 0),
        (lambda size: 10 + size // 400, 40, 0),
    ],
)
def test_exact_cut(tokens: Callable[[int], int], target: int, cut: int) -> None:
    found = exact_cut(tokens, 1000, target)
    assert found == cut
    assert not found or 0 <= target - tokens(found) <= SLACK

"""LongEval's lines, recall and the second question, against expected strings written out by hand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moacompress.core.errors import DataError
from moacompress.evaluation import associative_recall, longeval, second_question
from moacompress.evaluation.drafts import draft_ids, encode_draft
from moacompress.evaluation.prompt_request import PromptRequest
from moacompress.evaluation.tasks import make_cases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture
def base_tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    base: Any = copy.deepcopy(tiny_tokenizer)
    base.chat_template = None
    return base


def test_lines(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    draft = longeval.render([("calm-otter", 7), ("bold-raven", 41234)], "calm-otter", 7)
    assert draft.messages == (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
        "line calm-otter: REGISTER_CONTENT is <7>\n"
        "line bold-raven: REGISTER_CONTENT is <41234>\n"
        "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line calm-otter? I need the number.",
    )
    assert draft.answer.text == "The <REGISTER_CONTENT> in line calm-otter is <7>."
    assert draft.references == ("7",)
    ids = encode_draft(tiny_tokenizer, draft)
    assert str(tiny_tokenizer.decode(ids.prompt_ids)).endswith("I need the number.<|im_end|>\n<|im_start|>assistant\n")
    values = [i for i, counts in zip(ids.answer_ids, ids.is_value, strict=True) if counts]
    assert tiny_tokenizer.decode(values) == "7"


def test_drawn_lines(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    case = make_cases("lines", 3000, 1, 0, tiny_tokenizer)[0]
    text = str(tiny_tokenizer.decode(case.prompt_ids))
    lines = [line for line in text.split("\n") if line.startswith("line ")]
    assert len(lines) > 30
    assert len({line.split()[1] for line in lines}) == len(lines)
    asked = text.split("> in line ")[1].split("?")[0]
    assert f"line {asked}: REGISTER_CONTENT is <{case.references[0]}>" in lines
    assert (case.match, case.new_tokens) == ("last-integer", 100)
    with pytest.raises(DataError, match=r"task lines has 4,\d+ keys, too few for a prompt of 400,000 tokens"):
        make_cases("lines", 400_000, 1, 0, tiny_tokenizer)


def test_recall(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    draft = associative_recall.render([("bold-raven", "harvest"), ("calm-otter", "lake")], "bold-raven", "harvest")
    ids = encode_draft(tiny_tokenizer, draft)
    assert tiny_tokenizer.decode(ids.prompt_ids) == "bold-raven: harvest\ncalm-otter: lake\nbold-raven:"
    assert tiny_tokenizer.decode(ids.answer_ids) == " harvest"
    assert ids.is_value == [False] + [True] * 7


def test_drawn_recall(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    case = make_cases("recall", 1500, 1, 0, tiny_tokenizer)[0]
    *pairs, asked = str(tiny_tokenizer.decode(case.prompt_ids)).split("\n")
    assert len(pairs) > 40
    assert f"{asked} {case.references[0]}" in pairs
    assert sum(pair.endswith(f" {case.references[0]}") for pair in pairs) == 1


FIRST = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\nHay.\nWhat is the special magic number for bold-raven mentioned in the provided text?"
)
SECOND = "What is the special magic number for calm-otter mentioned in the provided text?"
ANSWERED = "The special magic number for bold-raven mentioned in the provided text is 1111111."
PREFIX = "The special magic number for calm-otter mentioned in the provided text is"


def test_second_question(tiny_tokenizer: PreTrainedTokenizerBase, base_tokenizer: PreTrainedTokenizerBase) -> None:
    draft = second_question.render("Hay.", ("bold-raven", "calm-otter"), ("1111111", "2222222"))
    assert draft.references == ("2222222",)
    for tokenizer, before, after in (
        (
            tiny_tokenizer,
            f"<|im_start|>user\n{FIRST}<|im_end|>\n<|im_start|>assistant\n{ANSWERED}<|im_end|>\n",
            f"<|im_start|>user\n{SECOND}<|im_end|>\n<|im_start|>assistant\n{PREFIX}",
        ),
        (base_tokenizer, f"{FIRST} {ANSWERED}", f"\n{SECOND} {PREFIX}"),
    ):
        ids = encode_draft(tokenizer, draft)
        assert ids.turn_at is not None
        assert tokenizer.decode(ids.prompt_ids[: ids.turn_at]) == before
        assert tokenizer.decode(ids.prompt_ids[ids.turn_at :]) == after
        assert tokenizer.decode(ids.answer_ids) == " 2222222"
        assert ids.is_value == [False] + [True] * 7


def test_drawn_second_question(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    firsts = 0
    for case in make_cases("second-question", 1200, 40, 0, tiny_tokenizer):
        text = str(tiny_tokenizer.decode(case.prompt_ids[: case.turn_at]))
        assert text.count("One of the special magic numbers for ") == 2
        needles = [line for line in text.split("\n") if line.startswith("One of")]
        asked = [f"is: {case.references[0]}." in needle for needle in needles]
        assert sum(asked) == 1
        firsts += asked[0]
    assert 10 < firsts < 30


def test_base_models_get_the_text_alone(base_tokenizer: PreTrainedTokenizerBase) -> None:
    draft = longeval.render([("a-b", 1)], "a-b", 1)
    text = str(base_tokenizer.decode(draft_ids(base_tokenizer, draft)))
    assert text == draft.messages[0] + "\n"
    request = PromptRequest("second-question", 1500, 0, 0, np.random.default_rng(0), base_tokenizer)
    assert request.tokens(second_question.make_second_question(request)) <= 1500

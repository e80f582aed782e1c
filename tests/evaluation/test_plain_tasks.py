"""Lines, recall and the second question, against expected strings written out by hand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moacompress.core.errors import DataError
from moacompress.evaluation.tasks import lookups, needles
from moacompress.evaluation.tasks.drafts import draft_ids, encode_draft
from moacompress.evaluation.tasks.registry import make_cases
from moacompress.evaluation.tasks.task import PromptRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture
def base_tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    base: Any = copy.deepcopy(tiny_tokenizer)
    base.chat_template = None
    return base


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


FIRST = (
    "In the following lines some names are each given a number. Read them to the end, where one is asked for.\n"
    "Hay.\nWhich number was bold-raven given?"
)
SECOND = "Which number was calm-otter given?"
ANSWERED = "bold-raven was given the number 1111111."
PREFIX = "calm-otter was given the number"


def test_second_question(tiny_tokenizer: PreTrainedTokenizerBase, base_tokenizer: PreTrainedTokenizerBase) -> None:
    draft = needles.render_second_question("Hay.", ("bold-raven", "calm-otter"), ("1111111", "2222222"))
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
        assert text.count("\nNote that ") == 2
        needles = [line for line in text.split("\n") if line.startswith("Note that ")]
        asked = [f" {case.references[0]}." in needle for needle in needles]
        assert sum(asked) == 1
        firsts += asked[0]
    assert 10 < firsts < 30


def test_base_models_get_the_text_alone(base_tokenizer: PreTrainedTokenizerBase) -> None:
    draft = lookups.render_lines([("a-b", 1)], "a-b", 1)
    text = str(base_tokenizer.decode(draft_ids(base_tokenizer, draft)))
    assert text == draft.messages[0] + "\n"
    request = PromptRequest("second-question", 1500, 0, 0, np.random.default_rng(0), base_tokenizer)
    assert request.tokens(needles.make_second_question(request)) <= 1500

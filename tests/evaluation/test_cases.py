"""Cases, drafts and their tokens."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from moacompress.core.errors import DataError
from moacompress.evaluation.tasks.cases import Case, mean_tokens
from moacompress.evaluation.tasks.drafts import Answer, PromptDraft, draft_ids, encode_draft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def test_tokens() -> None:
    def case(prompt: int) -> Case:
        return Case("t", 64, [1] * prompt, [2, 3], [True, True], ("x",), "all", 6)

    assert case(10).tokens == 12
    assert mean_tokens([case(10), case(11), case(13)]) == 13


def test_answers() -> None:
    answer = Answer.of("12", "34", before=" <", between=", ", after=">.")
    assert answer.text == " <12, 34>."
    assert [answer.text[a:b] for a, b in answer.spans] == ["12", "34"]
    answer = Answer.numbered(["one", "two"], "")
    assert answer.text == "1. one 2. two"
    assert [answer.text[a:b] for a, b in answer.spans] == ["one", "two"]


def decoded(tokenizer: PreTrainedTokenizerBase, draft: PromptDraft) -> str:
    return str(tokenizer.decode(draft_ids(tokenizer, draft)))


def test_the_prefix_opens_the_assistants_turn(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    draft = PromptDraft(("Ask.",), " It is", Answer.of("1"), ("1",))
    assert decoded(tiny_tokenizer, draft) == "<|im_start|>user\nAsk.<|im_end|>\n<|im_start|>assistant\nIt is"
    tight: Any = copy.deepcopy(tiny_tokenizer)
    tight.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert decoded(tight, draft) == "[Ask.] It is"
    tight.chat_template = None
    assert decoded(tight, draft) == "Ask. It is"
    talk = PromptDraft(("A", "B", "C"), " D", Answer.of("1"), ("1",))
    assert decoded(tight, talk) == "A B\nC D"


def test_a_template_that_refuses(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    strict: Any = copy.deepcopy(tiny_tokenizer)
    strict.chat_template = "{{ raise_exception('one turn only') }}"
    with pytest.raises(DataError, match="refuses a conversation with the roles user, assistant, user: one turn only"):
        encode_draft(strict, PromptDraft(("A", "B", "C"), "", Answer.of("1"), ("1",)))


def test_a_token_over_the_boundary_belongs_to_the_answer() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "is": 1, ": 12": 2, ": ": 3, "34": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(": (12)?"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    ids = encode_draft(tokenizer, PromptDraft(("is",), ": ", Answer.of("12", "34", before="", between=""), ("12",)))
    assert (ids.prompt_ids, ids.answer_ids, ids.is_value) == ([1], [2, 4], [True, True])


def test_only_values_count(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    for answer, wanted in (
        (Answer.of("12", "a-b"), "12ab"),
        (Answer.of("12", before="Line 3 is <", after=">."), "12"),
        (Answer.numbered(["ab", "1c"]), "ab1c"),
        (Answer.of("$5.20"), "520"),
        (Answer.of("?!"), "?!"),  # nothing else there is
    ):
        ids = encode_draft(tiny_tokenizer, PromptDraft(("Ask.",), "Say:", answer, ()))
        counted = [i for i, counts in zip(ids.answer_ids, ids.is_value, strict=True) if counts]
        assert tiny_tokenizer.decode(counted) == wanted
        assert tiny_tokenizer.decode(ids.answer_ids) == answer.text


def test_bytes_of_a_character_count() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = encode_draft(tokenizer, PromptDraft(("Ask.",), " Say:", Answer.of("Zoë", before=" (", after=")"), ("Zoë",)))
    assert ids.is_value == [False, False, True, True, True, True, False]

"""How texts and conversations become tokens that an answer follows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from moacompress.core.errors import DataError
from moacompress.prompts.templates import (
    encode_conversation,
    encode_prompt,
    encode_text,
    shared_start,
    template_around,
)
from tests.templates import without_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def test_a_greeting_answers_nobody(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("assistant", "hello"), ("user", "hi"), ("assistant", "so"), ("user", "and?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    marked = copy.deepcopy(tiny_tokenizer)
    marked.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for tokenizer, answer in (
        (tiny_tokenizer, "so<|im_end|>"),
        (without_template(tiny_tokenizer), "so"),
        (marked, "so<|im_end|>"),
    ):
        ids, mask = encode_conversation(tokenizer, messages)
        assert tokenizer.decode([token for token, flag in zip(ids, mask, strict=True) if flag]) == answer
    text = str(tiny_tokenizer.decode(encode_conversation(tiny_tokenizer, messages)[0]))
    assert text.endswith("and?<|im_end|>\n<|im_start|>assistant\n")


def test_marks_of_a_template_need_no_beginnings_that_are_alike(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Only a greeting is looked for in the beginning of a conversation; others a template may render as it likes."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    turns = [("user", "hi"), ("assistant", "so"), ("user", "and?")]
    ids, mask = encode_conversation(tokenizer, [{"role": role, "content": content} for role, content in turns])
    assert tokenizer.decode([token for token, answer in zip(ids, mask, strict=True) if answer]) == "so"


def test_what_a_tokenizer_puts_behind_a_text_is_left_out_where_it_goes_on(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    from tokenizers.processors import TemplateProcessing

    base = without_template(tiny_tokenizer)
    conversation = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    plain = encode_prompt(base, "What?", " So"), encode_conversation(base, conversation), encode_text(base, "a", False)
    base.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[(name, base.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")],
    )
    begin, end = (base.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert base("a")["input_ids"] == [begin, *plain[2], end]
    assert encode_prompt(base, "What?", " So") == [begin, *plain[0]]
    ids, mask = encode_conversation(base, conversation)
    assert (ids, mask) == ([begin, *plain[1][0]], [False, *plain[1][1]])
    assert encode_text(base, "a<|im_end|>") == [begin, *plain[2], end]


def test_turns_of_a_base_model_are_found_by_where_tokens_stand(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """The assistant's text is also in the user's, so a search for it would find too much or the wrong place."""
    base = without_template(tiny_tokenizer)
    turns = [
        {"role": "user", "content": "say yes. or no."},
        {"role": "assistant", "content": "yes."},
        {"role": "user", "content": "yes.?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "yes."},
    ]
    ids, mask = encode_conversation(base, turns)
    text = str(base.decode(ids))
    assert text == "say yes. or no.\nyes.\nyes.?\n\nyes.\n"
    assert [index for index, flag in enumerate(mask) if flag] == [16, 17, 18, 19]

    class Slow:
        chat_template = None
        all_special_ids = (0,)

        def __call__(self, text: str, **options: Any) -> Any:
            if options.get("return_offsets_mapping"):
                raise NotImplementedError
            return {"input_ids": [1] * len(text)}

    slow: Any = Slow()
    assert encode_conversation(slow, turns[:1]) == ([1] * 16, [False] * 16)
    with pytest.raises(DataError, match="does not tell where tokens stand in the text, .*one assistant turn"):
        encode_conversation(slow, turns)


def test_what_a_template_puts_around_a_users_text(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = template_around(tiny_tokenizer)
    whole = encode_prompt(tiny_tokenizer, "said")
    assert [*before, *tiny_tokenizer("said", add_special_tokens=False)["input_ids"], *after] == whole
    assert shared_start(before, whole) == len(before)
    base = copy.deepcopy(tiny_tokenizer)
    base.chat_template = None
    assert template_around(base) == ([], tiny_tokenizer("\n", add_special_tokens=False)["input_ids"])
    base.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(DataError, match="a user's text 0 times"):
        template_around(base)

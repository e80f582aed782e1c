"""Prompts and how they become tokens: through the tokenizer's chat template, or plain for a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moacompress.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A question whose answer is known.

    Attributes:
        user: what the user says.
        prefix: how the answer begins; given to the model, not scored. May be empty. See `encode_prompt`.
        answer: the reference, the value alone.
        task: name of the task, such as `needle-noise`.
        kind: `needle`, `multi-needle`, `key-value`, `records` or `recall`.
        plain: the text goes to the model as it is, without the chat template.
    """

    user: str
    prefix: str
    answer: str
    task: str
    kind: str
    plain: bool = False


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Returns the token ids of a text that continues, if `special` behind what the tokenizer puts before a text."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    return _without_end(tokenizer, text, ids) if special else ids


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Returns the text of token ids without special tokens, for its shingles."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _without_end(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """Returns the ids of a text without the special tokens that a tokenizer puts behind it, as the text continues."""
    if not ids or ids[-1] not in tokenizer.all_special_ids:
        return ids
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not plain:  # of no text all of them are special
        return [token for token in ids if token == tokenizer.bos_token_id]
    ends = (
        begin + len(plain) for begin in range(len(ids) - len(plain) + 1) if ids[begin : begin + len(plain)] == plain
    )
    return ids[: next(ends, len(ids))]


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generate: bool) -> str:
    """Returns the conversation as text, through the chat template; if `generate`, ended by an assistant turn's header.

    Raises:
        DataError: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(f"the model's chat template refuses a conversation with the roles {roles}: {error}") from error
    return str(text)


def template_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the tokens before and after the text of a single user's turn, with the assistant's header behind it.

    Without a chat template there is nothing before it, and a line break behind it.

    Raises:
        DataError: the template does not render the user's text once and as it is.
    """
    if tokenizer.chat_template is None:
        return [], encode_text(tokenizer, "\n", special=False)
    text = "the user's text"
    parts = render_messages(tokenizer, [{"role": "user", "content": text}], generate=True).split(text)
    if len(parts) != 2:
        raise DataError(
            f"the model's chat template renders a user's text {len(parts) - 1} times; it must stand there once"
        )
    before, after = (encode_text(tokenizer, part, special=False) for part in parts)
    return before, after


def encode_prompt(tokenizer: PreTrainedTokenizerBase, user: str, prefix: str = "", plain: bool = False) -> list[int]:
    """Returns the token ids after which the answer follows.

    With a chat template: the user's turn, the assistant's header, the prefix. Without: `user`, a line break, the
    prefix. White space that the prefix begins with stands in place of the line break, and is dropped after a header
    that ends in white space. If `plain`, `user` and the prefix go to the model as they are.
    """
    if plain:
        return encode_text(tokenizer, user + prefix)
    if tokenizer.chat_template is None:
        return encode_text(tokenizer, user + ("" if prefix[:1].isspace() else "\n") + prefix)
    rendered = render_messages(tokenizer, [{"role": "user", "content": user}], generate=True)
    return encode_text(tokenizer, rendered + (prefix.lstrip() if rendered[-1:].isspace() else prefix), special=False)


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Returns token ids and answer mask of a conversation that the assistant continues.

    Without a chat template the turns follow each other, a line break after each. `messages` are all turns before the
    assistant's last one; its header at the end is included. The mask holds an assistant's earlier turns, with their closing
    tokens.

    Raises:
        DataError: the template refuses the conversation, or renders the beginning of a conversation differently from
            the same turns inside the whole, so that turns cannot be told apart; or there is no template and the
            tokenizer does not tell where its tokens stand in the text.
    """
    if tokenizer.chat_template is None:
        return _encode_turns(tokenizer, messages)
    ids = encode_text(tokenizer, render_messages(tokenizer, messages, generate=True), special=False)
    mask = [False] * len(ids)
    turns = [number for number in range(len(messages)) if _answers(messages, number)]
    if not turns:
        return ids, mask
    if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
        encoded: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [bool(flag) for flag in encoded["assistant_masks"]]
        before = messages[: turns[0]]
        if any(message["role"] == "assistant" for message in before):  # a greeting, which answers nobody
            first = _prefix_length(tokenizer, before, ids, generate=False)
            marked[:first] = [False] * first
        return list(encoded["input_ids"]), marked
    for turn in turns:
        start = _prefix_length(tokenizer, messages[:turn], ids, generate=True)
        end = _prefix_length(tokenizer, messages[: turn + 1], ids, generate=False)
        closing = [i for i in range(start, end) if ids[i] == tokenizer.eos_token_id]
        mask[start : (closing[0] + 1 if closing else end)] = [True] * ((closing[0] + 1 if closing else end) - start)
    return ids, mask


def _encode_turns(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Returns `encode_conversation` of a base model; a token that spans a turn's boundary belongs to the answer."""
    text, answers = "", []
    for number, message in enumerate(messages):
        if _answers(messages, number):
            answers.append((len(text), len(text) + len(message["content"])))
        text += f"{message['content']}\n"
    if not answers:
        ids = encode_text(tokenizer, text)
        return ids, [False] * len(ids)
    try:
        encoded: Any = tokenizer(text, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise DataError(
            "the model has no chat template and its tokenizer does not tell where tokens stand in the text, so the "
            "assistant's turns cannot be found; give rows with one assistant turn"
        ) from error
    places = encoded["offset_mapping"]
    mask = [any(max(first, begin) < min(last, end) for begin, end in answers) for first, last in places]
    ids = _without_end(tokenizer, text, list(encoded["input_ids"]))
    return ids, mask[: len(ids)]


def _answers(messages: Messages, number: int) -> bool:
    """Returns whether a turn is the assistant's answer to a user, and not the greeting that a conversation begins with."""
    asked = any(message["role"] == "user" for message in messages[:number])
    return asked and messages[number]["role"] == "assistant"


def _prefix_length(tokenizer: PreTrainedTokenizerBase, messages: Messages, ids: list[int], *, generate: bool) -> int:
    head = encode_text(tokenizer, render_messages(tokenizer, messages, generate=generate), special=False)
    if ids[: len(head)] != head:
        raise DataError(
            f"the chat template renders the first {len(messages)} turns of a conversation differently from the same "
            f"turns inside the whole (token {shared_start(ids, head):,} of {len(head):,}), so the assistant's turns cannot "
            "be found; give rows with one assistant turn"
        )
    return len(head)


def shared_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many tokens two texts begin with alike."""
    size = min(len(first), len(second))
    return next((i for i in range(size) if first[i] != second[i]), size)

"""Prompts as text, before a tokenizer has seen them, and how they become token ids.

A task writes a `PromptDraft`; `encode_draft` renders it through the tokenizer's chat template, or plainly for a base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moacompress.prompts.templates import encode_text, render_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """A reference answer and where its values are.

    Attributes:
        text: what follows the answer prefix, with the space between them.
        spans: `[begin, end)` in `text` of every value, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]

    @staticmethod
    def of(*values: str, before: str = " ", between: str = ", ", after: str = "") -> Answer:
        """Returns the values joined by `between`, with `before` and `after` around them; only values count."""
        text, spans = before, []
        for index, value in enumerate(values):
            text += between if index else ""
            spans.append((len(text), len(text) + len(value)))
            text += value
        return Answer(text + after, tuple(spans))

    @staticmethod
    def numbered(values: Sequence[str], before: str = " ") -> Answer:
        """Returns `1. first 2. second ...`; the words count, their numbers do not."""
        text, spans = before, []
        for index, value in enumerate(values, 1):
            text += f"{index}. " if index == 1 else f" {index}. "
            spans.append((len(text), len(text) + len(value)))
            text += value
        return Answer(text, tuple(spans))


@dataclass(frozen=True)
class PromptDraft:
    """A question whose answer is known.

    Attributes:
        messages: what is said, the user first and last, the assistant in between.
        prefix: how the answer begins; given to the model, not scored. White space at its beginning stands between it
            and what the user said, and is dropped after a chat template's header that ends in white space.
        answer: what teacher forcing feeds.
        references: what is looked for in a generated answer.
        plain: the text goes to the model as it is, without the chat template.
        second_turn: the last message is a second turn, fed apart from what is before it.
        system: what the system says before the user; empty for nothing.
        question: how the last message ends, with what is asked; empty for its last line.
        document: the text that is asked about, where other prompts may ask about it too; empty for one of its own.
    """

    messages: tuple[str, ...]
    prefix: str
    answer: Answer
    references: tuple[str, ...]
    plain: bool = False
    second_turn: bool = False
    system: str = ""
    question: str = ""
    document: str = ""

    @property
    def asked(self) -> str:
        """What is asked: the end of the last message, or of a second turn all of it."""
        last = self.messages[-1].strip()
        return self.question.strip() or (last if self.second_turn else last.rpartition("\n")[2])

    @property
    def before_question(self) -> tuple[str, ...] | None:
        """The messages without what is asked; None where nothing is before it, as in a single message of one line."""
        *earlier, last = self.messages
        before, _, line = last.rstrip().rpartition("\n")
        if self.question:
            before = last.removesuffix(self.question)
        elif self.second_turn:
            before = ""
        elif before:
            before = last[: last.rindex(line)]
        return (*earlier, before) if before.strip() or earlier else None


class Encoded(NamedTuple):
    """A draft as token ids: the fields of `Case` that a tokenizer decides."""

    prompt_ids: list[int]
    answer_ids: list[int]
    is_value: list[bool]
    turn_at: int | None
    question_at: int | None


def encode_draft(tokenizer: PreTrainedTokenizerBase, draft: PromptDraft) -> Encoded:
    """Returns the token ids of a draft.

    The answer is tokenized together with the prompt, because tokens may span the boundary; a token that does belongs to
    the answer. The second turn begins with the first token that the conversation before it does not have.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    alone, whole = draft_ids(tokenizer, draft), draft_ids(tokenizer, draft, draft.answer.text)
    cut = _common(alone, whole)
    answer_ids = whole[cut:]
    turn_at = None
    if draft.second_turn:
        turn_at = _common(_ids(tokenizer, draft, _conversation(tokenizer, draft, draft.messages[:-1])), whole)
    before, question_at = draft.before_question, None
    if before is not None:
        question_at = min(_common(_ids(tokenizer, draft, _conversation(tokenizer, draft, before)), whole), cut)
    counts = _value_tokens(tokenizer, answer_ids, draft.answer)
    return Encoded(whole[:cut], answer_ids, counts, turn_at, question_at)


def draft_ids(tokenizer: PreTrainedTokenizerBase, draft: PromptDraft, answer: str = "") -> list[int]:
    """Returns the token ids of the prompt, with `answer` after its prefix.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    text = _conversation(tokenizer, draft, draft.messages)
    prefix = draft.prefix.lstrip() if _chats(tokenizer, draft) and text[-1:].isspace() else draft.prefix
    return _ids(tokenizer, draft, text + prefix + answer)


def _chats(tokenizer: PreTrainedTokenizerBase, draft: PromptDraft) -> bool:
    return tokenizer.chat_template is not None and not draft.plain


def _ids(tokenizer: PreTrainedTokenizerBase, draft: PromptDraft, text: str) -> list[int]:
    return encode_text(tokenizer, text, special=not _chats(tokenizer, draft))  # a template writes special tokens itself


def _conversation(tokenizer: PreTrainedTokenizerBase, draft: PromptDraft, messages: Sequence[str]) -> str:
    """Returns the turns as text, the header of the assistant's turn included if it is the assistant's."""
    if not _chats(tokenizer, draft):
        turns = [
            text if index == 0 else f"{' ' if index % 2 else chr(10)}{text}" for index, text in enumerate(messages)
        ]
        return "".join([f"{draft.system}\n"] * bool(draft.system) + turns)
    roles = ("user", "assistant")
    said = [{"role": "system", "content": draft.system}] * bool(draft.system)
    said += [{"role": roles[index % 2], "content": text} for index, text in enumerate(messages)]
    return render_messages(tokenizer, said, generate=len(messages) % 2 == 1)


def _value_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], answer: Answer) -> list[bool]:
    """Returns for each token of an answer whether it carries part of a value; punctuation alone does not.

    Tokens are found in the text one after the other. One that is not there, such as a byte of a longer character, is
    taken to stand where the one before it ended.
    """
    spelt = any(map(str.isalnum, "".join(answer.text[begin:end] for begin, end in answer.spans)))
    flags, at = [], 0
    for token in ids:
        piece = str(tokenizer.decode([token])).strip()
        found = answer.text.find(piece, at)
        begin = found if found >= 0 else at + len(answer.text[at:]) - len(answer.text[at:].lstrip())
        end = begin + (len(piece) if found >= 0 else 1)
        at = end if found >= 0 else at
        counts = bool(piece) and (found < 0 or not spelt or any(map(str.isalnum, piece)))
        flags.append(counts and any(first < end and begin < last for first, last in answer.spans))
    return flags


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    size = min(len(first), len(second))
    return next((i for i in range(size) if first[i] != second[i]), size)

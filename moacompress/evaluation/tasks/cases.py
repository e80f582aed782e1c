"""One prompt to be scored, with its reference: what the tasks make and the scores are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Match = Literal["all", "any", "any-words", "last-integer", "json"]


@dataclass(frozen=True)
class Case:
    """One prompt to be scored.

    Attributes:
        task: name of its task.
        length: nominal length, tokens; prompt and generated answer stay within it.
        prompt_ids: everything before the answer, chat template and answer prefix included.
        answer_ids: the reference answer that teacher forcing feeds after the prompt.
        is_value: for each of `answer_ids` whether it counts in accuracy and NLL: the digits where the answer is a
            number, the value's tokens otherwise; at least one does.
        references: strings looked for in the greedy answer, whatever their case.
        match: how. `all`: the share of references found; `any`: 1 if one is found, as RULER scores question answering;
            `any-words`: 1 if one is found that is not part of a longer word; `last-integer`: 1 if the last integer of the
            answer is the reference; `json`: 1 if the first JSON object of `opening` and answer is the reference's.
        new_tokens: most tokens generated.
        turn_at: `prompt_ids[turn_at:]` is a second turn, fed as a forward of its own on the cache of the first part;
            None for a prompt of one part.
        question_at: `prompt_ids[question_at:]` is what is asked, with all that follows it; None where that is not known.
        opening: the text of the answer that the prompt ends with.
        question: what is asked, for a reader.
        document: fingerprint of the text that is asked about, where other prompts may ask about it too, at this length or
            another; empty for one of its own.
    """

    task: str
    length: int
    prompt_ids: list[int]
    answer_ids: list[int]
    is_value: list[bool]
    references: tuple[str, ...]
    match: Match
    new_tokens: int
    turn_at: int | None = None
    question_at: int | None = None
    opening: str = ""
    question: str = ""
    document: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens, the reference answer included."""
        return len(self.prompt_ids) + len(self.answer_ids)


def mean_tokens(cases: Sequence[Case]) -> int:
    """Returns the mean number of tokens of the cases, rounded: the length at which their KV bytes are stated."""
    return round(sum(case.tokens for case in cases) / len(cases))


def mean_answer_tokens(cases: Sequence[Case]) -> int:
    """Returns the mean number of tokens of the reference answers, rounded: what is read after the prompt."""
    return round(sum(len(case.answer_ids) for case in cases) / len(cases))

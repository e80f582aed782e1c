"""LongEval's line retrieval (LongChat): a record of lines, each a key and a number, one of which is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.evaluation.drafts import Answer, PromptDraft
from moacompress.evaluation.prompt_request import PromptRequest
from moacompress.prompts.pools import KEYS_PER_SPLIT, draw_keys

TEMPLATE = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
    "certain line index. Now the record start:\n\n{context}\n"
    "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number."
)
LINE = "line {key}: REGISTER_CONTENT is <{value}>\n"
ANSWER = ("The <REGISTER_CONTENT> in line {key} is <", ">.")
"""What teacher forcing feeds around the number; generation gets no beginning."""
LARGEST = 50_000


def make_lines(request: PromptRequest) -> PromptDraft:
    """Returns a prompt of lines with different keys.

    Raises:
        DataError: the length is too short, or too long for the keys there are.
    """
    limit = min(request.length, KEYS_PER_SPLIT) - 1
    (asked, *others) = draw_keys(request.rng, "evaluation", limit + 1)
    (value, *values) = request.rng.integers(1, LARGEST + 1, limit + 1).tolist()
    depth = float(request.rng.random())

    def write(count: int) -> PromptDraft:
        pairs = list(zip(others[:count], values, strict=False))
        pairs.insert(round(depth * count), (asked, value))
        return render(pairs, asked, value)

    short = f"task {request.task} has {KEYS_PER_SPLIT:,} keys, too few for a prompt of {request.length:,} tokens"
    return request.fit(write, limit, short)


def render(pairs: Sequence[tuple[str, int]], asked: str, value: int) -> PromptDraft:
    """Returns the prompt of keys and values in which the value of `asked` is asked for."""
    context = "".join(LINE.format(key=key, value=number) for key, number in pairs)
    user = TEMPLATE.format(context=context, key=asked)
    before, after = ANSWER
    return PromptDraft(
        (user,), "\n", Answer.of(str(value), before=before.format(key=asked), after=after), (str(value),)
    )

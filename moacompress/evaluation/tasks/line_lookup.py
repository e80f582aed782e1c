"""Line lookup: a list of lines, each a name and a number, one of which is asked for in a sentence of the model's own."""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.prompts.pools import KEYS_PER_SPLIT, draw_keys

TEMPLATE = (
    "Every line of this list has a name and a number.\n\n{context}\nWhich number is on the line of {key}? Say it in a "
    "short sentence."
)
LINE = "{key} has the number {value}\n"
ANSWER = ("The line of {key} has the number ", ".")
"""What teacher forcing feeds around the number; generation gets no beginning."""
SAID = (TEMPLATE, LINE, ANSWER)
"""All that prompts and answers say."""
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

"""A second question on a context that was read before the first: two needles in noise, asked for one after the other.

The first question is answered by its reference. What the first answer did not need may be what the second one needs, so
a cache that keeps only what one question points to fails here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.needles import in_lines
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.prompts.pools import draw_keys, draw_numbers
from moacompress.prompts.sentences import EVALUATION_NEEDLES


def make_second_question(request: PromptRequest) -> PromptDraft:
    """Returns a conversation of two questions, the first of them answered.

    Raises:
        DataError: the length is too short.
    """
    rng = request.rng
    keys, values = draw_keys(rng, "evaluation", 2), draw_numbers(rng, "evaluation", 2)
    depths = np.sort(rng.random(2))
    hidden = rng.permutation(2).tolist()
    needles = [EVALUATION_NEEDLES.hide("number", keys[index], values[index]) for index in hidden]

    def write(count: int) -> PromptDraft:
        return render(in_lines([" ".join(EVALUATION_NEEDLES.noise)] * count, needles, depths), keys, values)

    return request.fit(write, request.length)


def render(context: str, keys: Sequence[str], values: Sequence[str]) -> PromptDraft:
    """Returns the conversation about a context; the first key's question is answered, the second's is asked."""
    first, second = (EVALUATION_NEEDLES.ask("number", [key], 1) for key in keys)
    asked = f"{first.before}\n{context}\n{first.after}"
    messages = (asked, f"{first.answer} {values[0]}.", second.after)
    return PromptDraft(messages, f" {second.answer}", Answer.of(values[1]), (values[1],), second_turn=True)

"""A task of another package: one file, and one line in its entry points."""

from __future__ import annotations

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.registry import EvaluationTask
from moacompress.evaluation.tasks.task import PromptRequest

KEYS = ("house", "boat", "door", "tree")
COLOUR_NAMES = ("red", "green", "blue", "white")
SENTENCE = "The {thing} is {colour}."


def write(request: PromptRequest) -> PromptDraft:
    """Returns a prompt: facts on colours, one of them asked for, and filler up to the length."""
    colours = [str(name) for name in request.rng.permutation(COLOUR_NAMES)]
    asked = int(request.rng.integers(len(KEYS)))
    facts = " ".join(SENTENCE.format(thing=thing, colour=colour) for thing, colour in zip(KEYS, colours, strict=True))

    def draft(filler: int) -> PromptDraft:
        user = f"{facts} {'Nothing happens here. ' * filler}Which colour has the {KEYS[asked]}?"
        return PromptDraft((user,), f"The {KEYS[asked]} is", Answer.of(colours[asked]), (colours[asked],))

    return request.fit(draft, request.length)


COLOURS = EvaluationTask("colours", "the colour of one thing of four", write, lambda: (SENTENCE, KEYS))
AGAIN = EvaluationTask("recall", "a name that is taken", write, lambda: SENTENCE)

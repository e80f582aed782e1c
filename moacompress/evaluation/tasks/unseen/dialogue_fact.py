"""A dialogue of several speakers, one of whom once said a number that is asked for."""

from __future__ import annotations

import numpy as np

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.unseen.names import SPEAKERS, pick

LINE_TOKENS = 8
"""A line surely has more tokens: how many are drawn at most."""
COMPANY = 4
"""Speakers of a dialogue."""
TEMPLATE = "Here is a conversation between {company}.\n\n{context}\n\nWhat is {name}'s {noun}?"
PREFIX = "{name}'s {noun} is"
NOUNS = (
    "locker number", "room number", "bus pass number", "gate code", "parking space", "order number", "alarm code",
    "membership number", "ticket number", "desk extension", "raffle number", "bicycle lock code",
)  # fmt: skip
STATED = (
    "By the way, my {noun} is {value}.", "Before I forget, my {noun} is {value}.",
    "In case you need it, my {noun} is {value}.", "They finally told me that my {noun} is {value}.",
)  # fmt: skip
_OPENINGS = (
    "Honestly,", "Well,", "You know,", "I suppose", "To tell you the truth,", "Funny you should ask,", "Oh,", "Anyway,",
    "If you ask me,", "I heard that", "Listen,", "As I said,",
)  # fmt: skip
_WHO = (
    "my sister", "our landlord", "the new manager", "my cousin", "the plumber", "that waiter", "our neighbour upstairs",
    "the bus driver", "my old teacher", "the woman next door", "our dentist", "my boss",
)  # fmt: skip
_DID = (
    "forgot to lock the back door", "talked about moving abroad", "cooked far too much", "never answered the phone",
    "tried to learn the accordion", "missed the last train again", "painted the whole kitchen blue", "fell asleep",
    "lost a bet and had to pay for lunch", "kept asking about the holidays", "adopted two stray dogs", "ran a marathon",
    "broke the dishwasher", "got stuck in the lift", "talked about nothing but football", "burnt all the pancakes",
)  # fmt: skip
_WHEN = (
    "last weekend", "on Tuesday", "this morning", "while we were away", "right before the party", "all of a sudden",
    "for the third time", "without telling anyone", "as usual", "after the meeting",
)  # fmt: skip
_OTHERS = (
    "Can you believe it?", "What do you think?", "I was so surprised.", "That is just how it goes.", "It made me laugh.",
    "Do you remember that?", "I would not worry about it.", "We should talk about it later.", "Pass me the bread.",
    "Shall we go by tram or walk?", "I could not agree more.", "Nobody told me!", "So what happened next?", "Not again.",
    "The soup was too salty anyway.", "Let us meet at the corner at noon.", "I have to water the plants.", "Good for them!",
)  # fmt: skip

SENTENCES = (TEMPLATE, PREFIX, NOUNS, STATED, _OPENINGS, _WHO, _DID, _WHEN, _OTHERS, SPEAKERS)
"""All that prompts say but for what is drawn."""


def make_dialogue_fact(request: PromptRequest) -> PromptDraft:
    """Returns a dialogue in which two speakers say a number of something each; one of them is asked for.

    Raises:
        DataError: the length is too short.
    """
    rng = request.rng
    company = [SPEAKERS[index] for index in rng.permutation(len(SPEAKERS))[:COMPANY]]
    nouns = [NOUNS[index] for index in rng.permutation(len(NOUNS))[:2]]
    values = [str(value) for value in 1000 + rng.choice(9000, 2, replace=False)]
    facts = [
        {"name": name, "noun": noun, "value": value} for name, noun, value in zip(company, nouns, values, strict=False)
    ]
    said = [(f"{fact['name']}: {pick(rng, STATED).format(**fact)}", float(rng.random())) for fact in facts]
    limit = request.length // LINE_TOKENS
    lines = [f"{pick(rng, company)}: {_remark(rng)}" for _ in range(limit)]
    speakers, asked = f"{', '.join(company[:-1])} and {company[-1]}", facts[0]

    def write(count: int) -> PromptDraft:
        spoken = lines[:count]
        for line, depth in sorted(said, key=lambda pair: -pair[1]):
            spoken.insert(round(depth * count), line)
        user = TEMPLATE.format(company=speakers, context="\n".join(spoken), **asked)
        return PromptDraft((user,), f"\n{PREFIX.format(**asked)}", Answer.of(asked["value"]), (asked["value"],))

    return request.fit(write, limit)


def _remark(rng: np.random.Generator) -> str:
    """Returns a story, a short remark, or both."""
    story = f"{pick(rng, _OPENINGS)} {pick(rng, _WHO)} {pick(rng, _DID)} {pick(rng, _WHEN)}."
    return (story, pick(rng, _OTHERS), f"{story} {pick(rng, _OTHERS)}")[int(rng.integers(3))]

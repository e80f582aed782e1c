"""Question answering: a SQuAD question whose document is hidden among others of the same file.

The sentences are an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count, islice

import numpy as np

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.squad_questions import Question, Questions
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.prompts.sentences import DocumentSentences

STRIDE = 1000
"""A question whose document is too long makes way for the one so many places further on, in a smaller file `TURN` of all."""
TURN = 0.381966
"""The golden section, whose multiples stay apart from each other and from where they began."""
TRIES = 50


def make_question(request: PromptRequest, sentences: DocumentSentences) -> PromptDraft:
    """Returns a prompt of one question; documents of its article are taken first, then any, as many as fit.

    Two prompts of one seed share a question only beyond `STRIDE` prompts, or in a smaller file beyond a fifth of its questions
    where a few documents are too long.

    Raises:
        DataError: no SQuAD file, or the length is too short.
    """
    known = request.resources.questions
    order = np.random.default_rng(request.seed).permutation(len(known.questions))
    stride = STRIDE if len(order) > STRIDE else _all_round(len(order))
    tried = [known.questions[order[(request.index + i * stride) % len(order)]] for i in range(TRIES)]
    alone = ((question, render(question, (question.document,), known, sentences)) for question in tried)
    question = next((question for question, draft in alone if request.tokens(draft) <= request.length), tried[0])
    others = _distractors(question, known, request)
    rank = request.rng.random(len(known.documents))  # shuffles any choice of documents

    def write(count: int) -> PromptDraft:
        chosen = sorted((question.document, *others[:count]), key=lambda index: float(rank[index]))
        return render(question, chosen, known, sentences)

    return request.fit(write, len(others))


def _all_round(places: int) -> int:
    """Returns the stride nearest above `TURN` that comes to all places before it is back where it began."""
    return next(stride for stride in count(max(int(TURN * places), 1)) if math.gcd(stride, places) == 1)


def render(question: Question, chosen: Sequence[int], known: Questions, sentences: DocumentSentences) -> PromptDraft:
    """Returns the prompt of a question with the documents `chosen`, in that order."""
    user = sentences.render([known.documents[index] for index in chosen], question.text)
    asked, answer = sentences.asks(question.text), Answer.of(question.answers[0])
    return PromptDraft(
        (user,), sentences.answer, answer, question.answers, question=asked, document=known.documents[question.document]
    )


def _distractors(question: Question, known: Questions, request: PromptRequest) -> list[int]:
    near = [question.article[i] for i in request.rng.permutation(len(question.article)).tolist()]
    taken = {question.document, *near}
    most = max(request.length // 8 - len(near), 0)  # no document is so short
    far = (index for index in request.rng.permutation(len(known.documents)).tolist() if index not in taken)
    return [*near, *islice(far, most)]

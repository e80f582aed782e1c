"""Questions, answers and documents of a SQuAD file (v1.1 or v2, as its authors publish it)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.files import read_json
from moacompress.prompts.pools import SPLITS
from moacompress.prompts.squad import Paragraph, parse_articles


@dataclass(frozen=True)
class Question:
    """An answerable question.

    Attributes:
        text: the question.
        answers: texts any of which is right, at least one.
        document: index of the document that holds the answer.
        article: indices of the other documents of its article.
    """

    text: str
    answers: tuple[str, ...]
    document: int
    article: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """The answerable questions and the documents of a file's evaluation third, each document once.

    Every third article is evaluation's, so that calibration with the same file never sees its documents; one that two
    articles share belongs to the first.
    """

    questions: tuple[Question, ...]
    documents: tuple[str, ...]

    @staticmethod
    def load(path: str | Path) -> Questions:
        """Reads a SQuAD file.

        Raises:
            DataError: unreadable, or not SQuAD, or without an answerable question in every third article.
        """
        try:
            data = read_json(Path(path), "SQuAD file")
        except ArtefactError as error:
            raise DataError(str(error)) from error
        questions = _index(_evaluation_third(parse_articles(data, path)))
        if not questions.questions:
            raise DataError(
                f"{path} has no answerable question in every third article, which are evaluation's; give a file with more "
                "articles"
            )
        return questions


def _evaluation_third(articles: list[list[Paragraph]]) -> list[list[Paragraph]]:
    first: dict[str, int] = {}
    for number, article in enumerate(articles):
        for paragraph in article:
            first.setdefault(paragraph.context.strip(), number)
    ours = SPLITS.index("evaluation")
    return [
        [paragraph for paragraph in article if first[paragraph.context.strip()] == number]
        for number, article in enumerate(articles)
        if number % len(SPLITS) == ours
    ]


def _index(articles: list[list[Paragraph]]) -> Questions:
    documents = sorted({paragraph.context for article in articles for paragraph in article})
    index = {document: i for i, document in enumerate(documents)}
    questions = []
    for article in articles:
        members = [index[paragraph.context] for paragraph in article]
        for paragraph in article:
            own = index[paragraph.context]
            others = tuple(member for member in dict.fromkeys(members) if member != own)
            questions += [Question(asked.text, asked.answers, own, others) for asked in paragraph.questions]
    return Questions(tuple(questions), tuple(documents))

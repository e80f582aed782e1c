"""Questions, answers and documents of a SQuAD file (v1.1 or v2, as its authors publish it)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.files import read_json
from moacompress.prompts.pools import split_articles
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

    Articles are dealt by the hash of their documents (`prompts.pools`), so that calibration with the same file, or with one
    that has articles of it, never sees the documents of evaluation; one that two articles share belongs to the first.
    """

    questions: tuple[Question, ...]
    documents: tuple[str, ...]

    @staticmethod
    def load(path: str | Path) -> Questions:
        """Reads a SQuAD file.

        Raises:
            DataError: unreadable, or not SQuAD, or without an answerable question in evaluation's articles.
        """
        try:
            data = read_json(Path(path), "SQuAD file")
        except ArtefactError as error:
            raise DataError(str(error)) from error
        questions = _index(_of_evaluation(parse_articles(data, path), path))
        if not questions.questions:
            raise DataError(
                f"{path} has no answerable question in the third of its articles that is evaluation's; give a file with more "
                "articles"
            )
        return questions


def _of_evaluation(articles: list[list[Paragraph]], path: str | Path) -> list[list[Paragraph]]:
    documents = ((paragraph.context, number) for number, article in enumerate(articles) for paragraph in article)
    found = split_articles(documents, str(path))
    return [
        [paragraph for paragraph in article if found[paragraph.context] == (number, "evaluation")]
        for number, article in enumerate(articles)
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

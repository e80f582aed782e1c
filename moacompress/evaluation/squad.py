"""Questions, answers and documents of a SQuAD file (v1.1 or v2, as its authors publish it)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moacompress.artefacts import read_json
from moacompress.errors import ArtefactError, DataError


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
    """All answerable questions of a file and all its documents, each document once."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]

    @staticmethod
    def load(path: str | Path) -> Questions:
        """Reads a SQuAD file.

        Raises:
            DataError: unreadable, or not SQuAD, or without an answerable question.
        """
        try:
            data = read_json(Path(path), "SQuAD file")
        except ArtefactError as error:
            raise DataError(str(error)) from error
        try:
            return _parse(data["data"], path)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a SQuAD file: {type(error).__name__} {error}") from error


def _parse(articles: Any, path: str | Path) -> Questions:
    documents = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
    index = {document: i for i, document in enumerate(documents)}
    questions = []
    for article in articles:
        members = [index[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = index[paragraph["context"]]
            others = tuple(member for member in dict.fromkeys(members) if member != own)
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"] if answer["text"].strip()))
                if answers and not asked.get("is_impossible", False):
                    questions.append(Question(asked["question"].strip(), answers, own, others))
    if not questions:
        raise DataError(f"{path} has no answerable question")
    return Questions(tuple(questions), tuple(documents))

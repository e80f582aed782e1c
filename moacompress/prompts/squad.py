"""SQuAD's file format (v1.1 or v2): articles of paragraphs with questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moacompress.core.errors import DataError


@dataclass(frozen=True)
class Asked:
    """An answerable question and the texts any of which is right, at least one."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Paragraph:
    """A document and its answerable questions, of which there may be none."""

    context: str
    questions: tuple[Asked, ...]


def parse_articles(data: Any, path: str | Path) -> list[list[Paragraph]]:
    """Returns the paragraphs of every article of a parsed file.

    Raises:
        DataError: not SQuAD's form, or without an answerable question.
    """
    try:
        articles = [[_paragraph(entry) for entry in article["paragraphs"]] for article in data["data"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a SQuAD file: {type(error).__name__} {error}") from error
    if not any(paragraph.questions for article in articles for paragraph in article):
        raise DataError(f"{path} has no answerable question")
    return articles


def _paragraph(entry: Any) -> Paragraph:
    questions, context = [], entry["context"]
    if not isinstance(context, str):
        raise TypeError(f"context is {type(context).__name__}, not text")
    for asked in entry["qas"]:
        answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"] or () if answer["text"].strip()))
        if answers and not asked.get("is_impossible", False):
            questions.append(Asked(asked["question"].strip(), answers))
    return Paragraph(context, tuple(questions))

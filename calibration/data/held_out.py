"""Rows of the user's own that no calibration has: what a plan that was calibrated on the others is evaluated on.

They are dealt by the hash of what they ask, or of the document that they ask about, so that rows which are added move no other.
"""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.calibration.data.data_rows import DataRow, RowKind, first_of_each, split_rows
from moacompress.calibration.data.joined import asked_documents
from moacompress.prompts.pools import split_articles


def held_out_rows(rows: Sequence[DataRow], kind: RowKind, name: str) -> list[int]:
    """Returns the indices of a source's rows, other than of plain text, that calibration and validation never take.

    Raises:
        DataError: too few rows or documents for all three.
    """
    if kind != "question":
        return split_rows(first_of_each(rows, kind, name), "evaluation", name)
    asked = asked_documents(rows, name)
    owner = split_articles([(document, article) for document, _, article in asked], name)
    return [index for index, (document, _, _) in enumerate(asked) if owner[document][1] == "evaluation"]

"""The scores of single prompts, as an evaluation's JSON keeps them: whatever is said of it can be computed again from these.

An interval or a test is of its time; the scores stay. A file of them is small (three numbers for each prompt and model) and
has no text of prompts and answers, so that it can lie in a repository beside the tables that are made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moacompress.core.errors import ArtefactError
from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.evaluation.scoring.prompts import Score
from moacompress.evaluation.scoring.result_rows import PROMPT_METRICS, Measured, TaskCell

StoredScores = dict[str, Any]


@dataclass(frozen=True)
class StoredModel(ComparedModel):
    """A compared model of which only its scores are left; `notes` are the further fields of its rows."""

    notes: Mapping[str, Any] = field(default_factory=dict)

    def description(self, tokens: int) -> dict[str, Any]:
        """Returns the further fields."""
        return dict(self.notes)


def score_rows(cell: TaskCell, comparison: Iterable[Measured]) -> list[StoredScores]:
    """Returns the scores of a cell, one row for each model: lists in the order of the prompts, the same for all models."""
    return [
        {
            "task": cell.task,
            "length": cell.length,
            "tokens": cell.tokens,
            "model": one.compared.name,
            "kv_bytes": one.compared.kv_bytes,
            "notes": one.compared.description(cell.tokens),
            **{metric.name: one.values(metric.number) for metric in PROMPT_METRICS},
            **({"documents": list(one.documents)} if any(one.documents) else {}),
        }
        for one in comparison
    ]


def measured_again(rows: Sequence[StoredScores]) -> list[tuple[TaskCell, list[Measured]]]:
    """Returns the cells and the models on them that scores were stored of, in the order of `score_rows`.

    Raises:
        ArtefactError: the rows are not what `score_rows` makes.
    """
    found: dict[tuple[str, int], tuple[TaskCell, list[Measured]]] = {}
    try:
        for row in rows:
            scores = [Score(*values) for values in zip(*(row[metric.name] for metric in PROMPT_METRICS), strict=True)]
            cell = TaskCell(row["task"], row["length"], len(scores), row["tokens"])
            _, comparison = found.setdefault((cell.task, cell.length), (cell, []))
            model = StoredModel(row["model"], row["kv_bytes"], row["notes"])
            comparison.append(Measured(model, scores, row.get("documents", ())))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"stored scores are damaged ({error}); evaluate again") from error
    return list(found.values())

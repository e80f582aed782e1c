"""One task at one length after the other: prompts or windows of text, the models on them, and the rows that come of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moacompress.core.shingles import overlap, refuse_overlap
from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.evaluation.baselines.comparison import Comparison
from moacompress.evaluation.baselines.evictions import ComparedEviction
from moacompress.evaluation.baselines.quantized_caches import RESIDUAL
from moacompress.evaluation.scoring.result_rows import (
    Measured,
    ResultRow,
    TaskCell,
    answer_rows,
    at_floor,
    best_candidates,
    difference_rows,
    mean_overlap,
    pooled_rows,
    result_rows,
    seen_in_calibration,
)
from moacompress.evaluation.scoring.scores import CaseScorer
from moacompress.evaluation.scoring.stored_scores import StoredScores, score_rows
from moacompress.evaluation.scoring.text import Window, text_windows
from moacompress.evaluation.tasks.cases import Case, mean_answer_tokens, mean_tokens
from moacompress.evaluation.tasks.registry import KINDS, Resources, find_task, make_cases, rows_left_out
from moacompress.evaluation.tasks.task import TEXT
from moacompress.prompts.templates import decode_text
from moacompress.runtime.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """What is the same for every task and length of an evaluation, and how one of them is measured.

    Attributes:
        checkpoint: what is measured.
        resources: texts and rows that prompts are made of.
        comparison: what it is measured beside.
        scorer: runs the models, or finds scores that are there.
        prompts: of each task and length.
        seed: of prompts.
        allow_overlap: whether text that calibration has seen is measured too.
    """

    checkpoint: Checkpoint
    resources: Resources
    comparison: Comparison
    scorer: CaseScorer
    prompts: int
    seed: int
    allow_overlap: bool

    def check(self, task: str, length: int) -> int:
        """Returns the number of scores a task and length takes, after one prompt of it could be made.

        Whatever is wrong with the request is found here, before the first minute of work.
        """
        if task == TEXT:
            windows = self._windows(length)
            if not self.allow_overlap:
                seen = self._overlap(window.ids for window in windows)
                assert self.resources.prose is not None
                refuse_overlap(seen, f"the text in {self.resources.prose.name} (windows of {length:,} tokens)")
            return len(self._readers(length)) * self.prompts
        given = find_task(task, self.resources).given
        cases = self._cases(task, length, 1 if given is None else self.prompts)
        if given is not None:
            left, looked = rows_left_out(task, length, self.prompts, self.checkpoint.tokenizer, self.resources)
            if left:
                first = "" if looked == len(given) else "the first "
                logger.warning(
                    f"{left} of {first}{looked} rows of {task} do not fit into {length:,} tokens, answers included, and are "
                    "left out; longer --lengths takes them in"
                )
        answerers = self._answerers(cases)
        for compared in answerers:
            if isinstance(compared, ComparedEviction):
                for case in cases:
                    compared.check(case)
        return len(answerers) * (self.prompts if given is None else len(cases))

    def lengths(self, task: str, asked: Sequence[int]) -> list[int]:
        """Returns the lengths of those asked for at which a task is measured."""
        return sorted(set(asked)) if task == TEXT else find_task(task, self.resources).lengths(asked)

    def measured(self, wanted: Iterable[tuple[str, int]]) -> dict[str, Any]:
        """Returns `results`, `differences`, `pooled` and what is marked of them, as `evaluate` does, of tasks and lengths."""
        results: list[ResultRow] = []
        differences: list[ResultRow] = []
        answers: list[ResultRow] = []
        scores: list[StoredScores] = []
        cells: dict[str, list[TaskCell]] = {}
        fields: dict[str, list[list[Measured]]] = {}
        for task, length in wanted:
            if task == TEXT:
                cell, measured = self.text(length)
            else:
                cell, cases, measured = self.task(task, length)
                kind = find_task(task, self.resources).kind
                cells.setdefault(kind, []).append(cell)
                fields.setdefault(kind, []).append(measured)
                answers += answer_rows(cell, cases, measured)
                scores += score_rows(cell, measured)
            results += result_rows(cell, measured)
            differences += difference_rows(cell, measured)
        pooled = [pooled_rows(fields[kind], mean_overlap(cells[kind]), kind) for kind in KINDS if kind in fields]
        return {
            "results": results,
            "differences": differences,
            "at_floor": at_floor(results),
            "seen_in_calibration": seen_in_calibration(results),
            "pooled": {
                "results": [row for rows, _ in pooled for row in rows],
                "differences": [row for _, rows in pooled for row in rows],
            },
            "scores": scores,
            "answers": answers,
        }

    def task(self, task: str, length: int) -> tuple[TaskCell, list[Case], list[Measured]]:
        """Returns a task at a length, its prompts, and the models on them, each by its best candidate."""
        cases = self._cases(task, length, self.prompts)
        seen = self._overlap(case.prompt_ids for case in cases)
        cell = TaskCell(task, length, len(cases), mean_tokens(cases), seen)
        answerers, documents = self._answerers(cases), [case.document for case in cases]
        scored = zip(answerers, self.scorer.cases(answerers, cases), strict=True)
        return (
            cell,
            cases,
            best_candidates((Measured(*pair, documents) for pair in scored), lambda one: one.values("nll")),
        )

    def text(self, length: int) -> tuple[TaskCell, list[Measured]]:
        """Returns windows of long text, and the models on them, each by its best candidate."""
        windows = self._windows(length)
        cell = TaskCell(TEXT, length, len(windows), length, self._overlap(window.ids for window in windows))
        readers, documents = self._readers(length), [str(window.document) for window in windows]
        scored = zip(readers, self.scorer.windows(readers, [window.ids for window in windows], TEXT), strict=True)
        return cell, best_candidates((Measured(*pair, documents) for pair in scored), lambda one: one.means("nll_late"))

    def _answerers(self, cases: Sequence[Case]) -> list[ComparedModel]:
        """Returns the models that answer prompts."""
        found = self.comparison.at(mean_tokens(cases), mean_answer_tokens(cases))
        return [one.on_prompts(cases) if isinstance(one, ComparedEviction) else one for one in found]

    def _readers(self, length: int) -> list[ComparedModel]:
        """Returns the models that read windows of so many tokens: not those that evict after a prompt, or by token."""
        found = self.comparison.at(length, length % RESIDUAL)
        return [compared for compared in found if not isinstance(compared, ComparedEviction)]

    def _cases(self, task: str, length: int, prompts: int) -> list[Case]:
        return make_cases(task, length, prompts, self.seed, self.checkpoint.tokenizer, self.resources)

    def _overlap(self, prompts: Iterable[Sequence[int]]) -> float | None:
        """Returns how much of some token ids' text the plan's calibration has seen."""
        tokenizer = self.checkpoint.tokenizer
        return overlap(self.checkpoint.plan.seen, (decode_text(tokenizer, ids) for ids in prompts))

    def _windows(self, length: int) -> list[Window]:
        assert self.resources.prose is not None
        return text_windows(self.resources.prose, self.checkpoint.tokenizer, length, self.prompts, self.seed)

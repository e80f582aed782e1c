"""One task at one length after the other: prompts or windows of text, the models on them, and the rows that come of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moacompress.core.shingles import overlap, refuse_overlap
from moacompress.evaluation.baselines.compared_models import ComparedModel, Comparison
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
from moacompress.evaluation.scoring.text_rows import TEXT, TextMeasured, text_difference_rows, text_result_rows
from moacompress.evaluation.tasks.cases import Case, mean_answer_tokens, mean_tokens
from moacompress.evaluation.tasks.registry import KINDS, Resources, find_task, make_cases, rows_left_out
from moacompress.prompts.pools import Prose
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
                refuse_overlap(seen, f"the text in {self._prose.name} (windows of {length:,} tokens)")
            return len(self._readers(length)) * self.prompts
        given = find_task(task, self.resources).given
        if given is None:
            cases = self._cases(task, length, 1)
            return self._checked(cases) * self.prompts
        cases = self._cases(task, length, self.prompts)
        left, looked = rows_left_out(task, length, self.prompts, self.checkpoint.tokenizer, self.resources)
        if left:
            logger.warning(
                "%d of %s%d rows of %s do not fit into %s tokens, answers included, and are left out; longer --lengths takes "
                "them in",
                left,
                "" if looked == len(given) else "the first ",
                looked,
                task,
                f"{length:,}",
            )
        return self._checked(cases) * len(cases)

    def _checked(self, cases: Sequence[Case]) -> int:
        """Returns how many models answer prompts, each of which can."""
        answerers = self._answerers(cases)
        for compared in answerers:
            if isinstance(compared, ComparedEviction):
                for case in cases:
                    compared.check(case)
        return len(answerers)

    def lengths(self, task: str, asked: Sequence[int]) -> list[int]:
        """Returns the lengths of those asked for at which a task is measured."""
        return sorted(set(asked)) if task == TEXT else find_task(task, self.resources).lengths(asked)

    def measured(self, wanted: Iterable[tuple[str, int]]) -> dict[str, Any]:
        """Returns `results`, `differences`, `pooled` and what is marked of them, as `evaluate` does, of tasks and lengths."""
        results: list[ResultRow] = []
        differences: list[ResultRow] = []
        answers: list[ResultRow] = []
        cells: dict[str, list[TaskCell]] = {}
        fields: dict[str, list[list[Measured]]] = {}
        scores: list[StoredScores] = []
        for task, length in wanted:
            if task == TEXT:
                rows, paired = self.text(task, length)
            else:
                cell, cases, field_of_cell = self.task(task, length)
                kind = find_task(task, self.resources).kind
                cells.setdefault(kind, []).append(cell)
                fields.setdefault(kind, []).append(field_of_cell)
                answers += answer_rows(cell, cases, field_of_cell)
                scores += score_rows(cell, field_of_cell)
                rows = result_rows(cell, field_of_cell)
                paired = difference_rows(cell, field_of_cell)
            results += rows
            differences += paired
        pooled = [pooled_rows(fields[kind], mean_overlap(cells[kind]), kind) for kind in KINDS if kind in fields]
        parts = [[row for rows in side for row in rows] for side in zip(*pooled, strict=True)] or [[], []]
        return {
            "results": results,
            "differences": differences,
            "at_floor": at_floor(results),
            "seen_in_calibration": seen_in_calibration(results),
            "pooled": dict(zip(("results", "differences"), parts, strict=True)),
            "scores": scores,
            "answers": answers,
        }

    def task(self, task: str, length: int) -> tuple[TaskCell, list[Case], list[Measured]]:
        """Returns a task at a length, its prompts, and the models on them, each by its best candidate."""
        cases = self._cases(task, length, self.prompts)
        seen = self._overlap(case.prompt_ids for case in cases)
        cell = TaskCell(task, length, len(cases), mean_tokens(cases), seen)
        answerers = self._answerers(cases)
        documents = [case.document for case in cases]
        scored = zip(answerers, self.scorer.cases(answerers, cases), strict=True)
        comparison = [Measured(*pair, documents) for pair in scored]
        return cell, cases, best_candidates(comparison)

    def text(self, task: str, length: int) -> tuple[list[ResultRow], list[ResultRow]]:
        """Returns the rows and the differences on long text."""
        windows = self._windows(length)
        cell = TaskCell(task, length, len(windows), length, self._overlap(window.ids for window in windows))
        compared_models = self._readers(length)
        entries = self.scorer.windows(compared_models, [window.ids for window in windows], task)
        documents = [window.document for window in windows]
        measured = [TextMeasured(*pair, documents) for pair in zip(compared_models, entries, strict=True)]
        best = best_candidates(measured, "nll_late")
        return text_result_rows(cell, best), text_difference_rows(cell, best)

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

    @property
    def _prose(self) -> Prose:
        assert self.resources.prose is not None
        return self.resources.prose

    def _windows(self, length: int) -> list[Window]:
        return text_windows(self._prose, self.checkpoint.tokenizer, length, self.prompts, self.seed)

"""Scores of a whole set of prompts or windows, taken from the records where they are in it.

A batch is the unit: its scores are filed under all that is in it, so a score never depends on which of its neighbours
were computed before a stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from moacompress.core.files import fingerprint
from moacompress.core.progress import Progress
from moacompress.core.records import Entry, Records
from moacompress.evaluation.baselines.compared_models import DENSE, ComparedModel, ComparedPlan
from moacompress.evaluation.baselines.quantized_caches import RESIDUAL
from moacompress.evaluation.scoring.prompts import Score, batches, score_batch
from moacompress.evaluation.scoring.text import States, read, score_window
from moacompress.evaluation.tasks.cases import Case
from moacompress.rules.plan import Plan
from moacompress.runtime.checkpoint import Checkpoint

SCORE_VERSION = 2
"""Part of every records key: raised when the same prompt would be scored in another way."""


@dataclass(frozen=True)
class Scorer:
    """What scores a checkpoint's weights under one plan after another."""

    checkpoint: Checkpoint
    records: Records[Entry]
    progress: Progress

    def cases(self, compared: ComparedModel, cases: Sequence[Case]) -> list[Score]:
        """Returns the compared model's score on every case."""
        vocabulary = int(self.checkpoint.model.config.get_text_config(decoder=True).vocab_size)
        scores: dict[int, Score] = {}
        for members in batches(cases, vocabulary):
            batch = [cases[index] for index in members]
            content = fingerprint([asdict(case) for case in batch])
            keys = [self._key(compared, content, row) for row in range(len(batch))]
            held = [entry for entry in map(self.records.get, keys) if entry is not None]
            if len(held) == len(batch):
                found = [Score(**entry) for entry in held]
            else:
                model = compared.put_on(self.checkpoint)
                cache = compared.new_cache(model)
                found = score_batch(model, self.checkpoint.tokenizer, batch, cache, compared.unit)
            for index, key, case, score in zip(members, keys, batch, found, strict=True):
                scores[index] = score
                self._file(key, asdict(score), compared, case.task, case.length, index)
        return [scores[index] for index in range(len(cases))]

    def windows(
        self, compared_models: Sequence[ComparedModel], windows: Sequence[Sequence[int]], task: str
    ) -> list[list[Entry]]:
        """Returns for every compared model its numbers on every window of text.

        The dense model is read only where a number is missing, once for each window.

        Returns:
            For each compared model and window `nll_early`, `nll_late`, `kl` and `top1_agreement`, the last two of the late
            half.
        """
        found: list[list[Entry]] = [[] for _ in compared_models]
        full = ComparedPlan(DENSE, Plan.full(self.checkpoint.plan.model), 0)
        for index, window in enumerate(windows):
            content = fingerprint(list(window))
            dense: States | None = None
            for compared, column in zip(compared_models, found, strict=True):
                key = self._key(compared, content, "text")
                entry = self.records.get(key)
                if entry is None:
                    dense = dense or self._read(full, window)
                    ours = dense if compared.key() == full.key() else self._read(compared, window)
                    score = score_window(ours, dense, window)
                    entry = {
                        "nll_early": score.early.nll,
                        "nll_late": score.late.nll,
                        "kl": score.late.kl,
                        "top1_agreement": score.late.agreement,
                    }
                column.append(entry)
                self._file(key, entry, compared, task, len(window), index)
        return found

    def _read(self, compared: ComparedModel, window: Sequence[int]) -> States:
        model = compared.put_on(self.checkpoint)
        return read(model, window, compared.new_cache(model), RESIDUAL)

    def _key(self, compared: ComparedModel, content: str, part: int | str) -> str:
        return fingerprint([SCORE_VERSION, compared.key(), *self.checkpoint.identity, content, part])

    def _file(self, key: str, numbers: Entry, compared: ComparedModel, task: str, length: int, index: int) -> None:
        if self.records.get(key) is None:
            notes = {"model": compared.name, "task": task, "length": length, "prompt": index}
            self.records.append({"key": key, "numbers": numbers, **notes})
        self.progress.step(f"{compared.name} {task} {length:,}")

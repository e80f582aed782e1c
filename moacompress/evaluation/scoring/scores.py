"""Scores of a whole set of prompts or windows, taken from the records where they are in it.

A batch is the unit: its scores are filed under all that is in it, so a score never depends on which of its neighbours
were computed before a stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from moacompress.core.files import fingerprint
from moacompress.core.progress import Progress
from moacompress.core.records import JsonLine, Records, named_numbers
from moacompress.evaluation.baselines.compared_models import DENSE, ComparedModel, ComparedPlan
from moacompress.evaluation.baselines.evictions import ComparedEviction, score_evictions
from moacompress.evaluation.baselines.quantized_caches import text_steps
from moacompress.evaluation.scoring.prompts import Score, batches, score_batch
from moacompress.evaluation.scoring.text import States, TextScore, read, score_window
from moacompress.evaluation.tasks.cases import Case
from moacompress.models.processes import broadcast, check_alike, shared
from moacompress.rules.plan import Plan
from moacompress.runtime.checkpoint import Checkpoint

SCORE_VERSION = 5
"""Part of every records key: raised when the same prompt would be scored in another way."""
UNSCORED = ("question_at", "question", "document")
"""What of a case no score depends on."""
Entry = dict[str, Any]
"""The numbers of a score by name, and of a prompt `answer`, what the model said."""


class Scored(NamedTuple):
    """What a score is of, as a reader of the records sees it."""

    model: str
    task: str
    length: int
    prompt: int


def read_entry(line: JsonLine) -> dict[str, Entry]:
    """Returns the score on a line, by its key.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is another kind of line, or a number is not finite.
    """
    said = {"answer": str(line["answer"])} if "answer" in line else {}
    return {key: {**numbers, **said} for key, numbers in named_numbers(line).items()}


def _line(key: str, entry: Entry) -> JsonLine:
    numbers = {name: value for name, value in entry.items() if name != "answer"}
    return {"key": key, "numbers": numbers, **({"answer": entry["answer"]} if "answer" in entry else {})}


class ScoringJob(NamedTuple):
    """What one process scores at a time: the keys of its scores, and what each is of."""

    keys: tuple[str, ...]
    scores: tuple[Scored, ...]


@dataclass(frozen=True)
class CaseScorer:
    """What scores a checkpoint's weights under one plan after another."""

    checkpoint: Checkpoint
    records: Records[Entry]
    progress: Progress

    def cases(self, compared_models: Sequence[ComparedModel], cases: Sequence[Case]) -> list[list[Score]]:
        """Returns for every compared model its score on every case.

        Ways to evict tokens are scored together on one case after another: they share the dense reading of it.
        """
        evictions = [compared for compared in compared_models if isinstance(compared, ComparedEviction)]
        others = [compared for compared in compared_models if not isinstance(compared, ComparedEviction)]
        found = iter(self._batched(others, cases))
        evicted = iter(self._evicted(evictions, cases) if evictions else ())
        return [next(evicted if isinstance(compared, ComparedEviction) else found) for compared in compared_models]

    def _evicted(self, evictions: Sequence[ComparedEviction], cases: Sequence[Case]) -> list[list[Score]]:
        """Returns for every way to evict its score on every case."""
        contents = [_content([case]) for case in cases]
        jobs = [
            ScoringJob(
                tuple(self._key(compared.case_key(case), content, 0) for compared in evictions),
                tuple(Scored(compared.name, case.task, case.length, index) for compared in evictions),
            )
            for index, (case, content) in enumerate(zip(cases, contents, strict=True))
        ]

        def score(number: int) -> list[Entry]:
            known = [self.records.get(key) for key in jobs[number].keys]
            missing = [compared for compared, entry in zip(evictions, known, strict=True) if entry is None]
            scored = iter(score_evictions(self.checkpoint, cases[number], missing))
            return [asdict(next(scored)) if entry is None else entry for entry in known]

        self._share(jobs, score)
        return [[Score(**self._filed(job.keys[which])) for job in jobs] for which in range(len(evictions))]

    def _batched(self, compared_models: Sequence[ComparedModel], cases: Sequence[Case]) -> list[list[Score]]:
        """Returns for every compared model its score on every case, prompts of one length together."""
        vocabulary = int(self.checkpoint.model.config.get_text_config(decoder=True).vocab_size)
        of_batches = batches(cases, vocabulary)
        contents = [_content([cases[index] for index in members]) for members in of_batches]
        jobs = [
            ScoringJob(
                tuple(self._key(compared.key(), content, row) for row in range(len(members))),
                tuple(Scored(compared.name, cases[index].task, cases[index].length, index) for index in members),
            )
            for compared in compared_models
            for members, content in zip(of_batches, contents, strict=True)
        ]

        def score(number: int) -> list[Entry]:
            which, batch = divmod(number, len(of_batches))
            compared, members = compared_models[which], of_batches[batch]
            model = compared.put_on(self.checkpoint)
            cache, chosen = compared.new_cache(model), [cases[index] for index in members]
            found = score_batch(model, self.checkpoint.tokenizer, chosen, cache, compared.unit)
            return [asdict(one) for one in found]

        self._share(jobs, score)
        found: list[list[Score]] = []
        for which in range(len(compared_models)):
            scores: dict[int, Score] = {}
            for members, job in zip(of_batches, jobs[which * len(of_batches) :], strict=False):
                scores |= {index: Score(**self._filed(key)) for index, key in zip(members, job.keys, strict=True)}
            found.append([scores[index] for index in range(len(cases))])
        return found

    def windows(
        self, compared_models: Sequence[ComparedModel], windows: Sequence[Sequence[int]], task: str
    ) -> list[list[TextScore]]:
        """Returns for every compared model its score on every window of text.

        The dense model is read only where a score is missing, once for each window.
        """
        full = ComparedPlan(DENSE, 0, Plan.full(self.checkpoint.plan.model))
        jobs = [
            ScoringJob(
                tuple(self._key(compared.key(), fingerprint(list(window)), "text") for compared in compared_models),
                tuple(Scored(compared.name, task, len(window), index) for compared in compared_models),
            )
            for index, window in enumerate(windows)
        ]

        def score(number: int) -> list[Entry]:
            window, dense, entries = windows[number], None, []
            for compared, key in zip(compared_models, jobs[number].keys, strict=True):
                entry = self.records.get(key)
                if entry is None:
                    dense = dense or self._read(full, window)
                    ours = dense if compared.key() == full.key() else self._read(compared, window)
                    entry = asdict(score_window(ours, dense, window))
                entries.append(entry)
            return entries

        self._share(jobs, score)
        return [[TextScore(**self._filed(job.keys[which])) for job in jobs] for which in range(len(compared_models))]

    def _share(self, jobs: Sequence[ScoringJob], score: Callable[[int], list[Entry]]) -> None:
        """Files the scores of all jobs; under `torchrun` each is done in one process, and filed in the records of all.

        Jobs are the same in every process; `score` returns what the keys of a numbered job are filed with.
        """
        check_alike({"set of prompts": fingerprint([job.keys for job in jobs])})  # they are shared out by number
        keys = {key for job in jobs for key in job.keys}
        known = broadcast({key: self.records.get(key) for key in keys if self.records.get(key) is not None})
        for key in sorted(known):
            if self.records.get(key) is None:
                self.records.append(_line(key, known[key]))
        begun, left = set(known), []
        for number, job in enumerate(jobs):
            if begun.issuperset(job.keys):  # it is on disk, or another one that is left is as good
                self._told(job)
            else:
                left.append(number)
                begun |= set(job.keys)

        def file(number: int, entries: list[Entry]) -> None:
            job = jobs[number]
            for key, entry, scored in zip(job.keys, entries, job.scores, strict=True):
                if self.records.get(key) is None:
                    self.records.append({**_line(key, entry), **scored._asdict()})
            self._told(job)

        shared(left, score, file)

    def _told(self, job: ScoringJob) -> None:
        for scored in job.scores:
            self.progress.step(f"{scored.model} {scored.task} {scored.length:,}")

    def _filed(self, key: str) -> Entry:
        entry = self.records.get(key)
        assert entry is not None
        return entry

    def _read(self, compared: ComparedModel, window: Sequence[int]) -> States:
        model = compared.put_on(self.checkpoint)
        return read(model, window, compared.new_cache(model), text_steps(len(window)))

    def _key(self, compared: str, content: str, part: int | str) -> str:
        return fingerprint([SCORE_VERSION, compared, *self.checkpoint.identity, content, part])


def _content(cases: Sequence[Case]) -> str:
    """Returns what cases say; where the question begins matters to ways to evict alone, and stands in their own keys."""
    said = [asdict(case) for case in cases]
    return fingerprint([{name: each[name] for name in each if name not in UNSCORED} for each in said])

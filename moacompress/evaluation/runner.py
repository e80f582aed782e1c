"""Evaluation of a compressed checkpoint, beside the dense model and the usual alternatives at the plan's bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moacompress.core.errors import DataError, UsageError
from moacompress.core.files import write_json
from moacompress.core.progress import SILENT, Progress
from moacompress.core.records import Records
from moacompress.evaluation.cases import Case, mean_tokens
from moacompress.evaluation.checkpoint import Checkpoint, compressed_folder, load_checkpoint
from moacompress.evaluation.contenders import Contender, Field, check_names, make_field
from moacompress.evaluation.result_rows import (
    Measured,
    ResultRow,
    TaskCell,
    at_floor,
    best_candidates,
    difference_rows,
    pooled_rows,
    result_rows,
)
from moacompress.evaluation.scores import Scorer
from moacompress.evaluation.tasks import Resources, check_resources, expand_tasks, make_cases
from moacompress.evaluation.text import text_windows
from moacompress.evaluation.text_rows import (
    TEXT,
    TextMeasured,
    text_difference_rows,
    text_result_rows,
)
from moacompress.prompts.pools import Prose


def evaluate(
    target: str | Path,
    *,
    against: Sequence[str] = ("dense", "uniform"),
    tasks: Sequence[str] = ("needle-noise",),
    lengths: Sequence[int] = (1024,),
    prompts: int = 20,
    text: str | Path | None = None,
    squad: str | Path | None = None,
    profile: str | Path | None = None,
    every_candidate: bool = False,
    lm_eval: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a compressed model on held-out prompts and text.

    All models are the same loaded weights, run by the same kernels on the same prompts in the same batches: under the
    plan, with every KV head at full span (dense), and under baselines that take at most the plan's KV bytes at the
    prompts' mean length. A baseline with several candidates (sinks, streaming windows) is represented by the one with
    the lowest mean NLL on these very prompts.

    Args:
        target: a compressed checkpoint, or a run's folder with one under `model/`.
        against: what to measure beside the plan: `dense`; the baselines `uniform`, `uniform-elastic`, `per-layer` and
            `split`; `uniform:4`, `uniform:16` and `uniform:64` for a given sink; folders of other compressed checkpoints
            of the same weights.
        tasks: names of tasks or of groups of them; `text` for perplexity by position, KL and top-1 agreement with
            dense on windows of `text`.
        lengths: prompt lengths, tokens, template and answer included.
        prompts: prompts of each task and length.
        text: file or folder of long prose, for prose tasks and for `text`; its evaluation third is used.
        squad: SQuAD as JSON, for question answering.
        profile: folder of the profile that `per-layer` and `split` are made from; the one beside `target` by default.
        every_candidate: try every sink of a baseline, also where the search has found and noted the best one.
        lm_eval: tasks of lm-evaluation-harness, by name or as `.yaml` files, for the plan, dense and other folders.
        lm_eval_limit: only the first documents of each of them; None for all.
        seed: of prompts and intervals.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's.
        device: torch device.
        out: where to write the result as JSON, atomically. Finished scores are kept beside it (`eval.scores.jsonl` for
            `eval.json`) and not computed again.
        progress: told about every score.

    Returns:
        `results`: rows of `model, task, length, metric, value, ci95, prompts, kv_bytes, tokens` (the mean, where bytes
            are stated), and `sink` and `window` of a baseline where all its KV heads have the same. Metrics are
            `exact_match`, `accuracy`, `nll` (nats a token) and, where dense is measured and gets a prompt right,
            `retention`, whose `prompts` are those that dense gets right; for text see `TEXT_METRICS`.
        `differences`: rows of the plan minus each other `model`, paired by prompt.
        `pooled`: `results` and `differences` of all prompts of all tasks and lengths together, where there are several;
            differences there have `retention` too.
        `at_floor`: `task` and `length` of what the dense model cannot do itself, so that nothing follows from it.
        `lm_eval`: rows of lm-evaluation-harness, where asked for; see `run_lm_eval`. They are computed anew each time.

    Raises:
        UsageError: `target` is not compressed, an unknown task or baseline, or no prompts.
        DataError: prompts cannot be made at a length, or what they are made of is missing.
        PlanError: the plan is damaged, or another folder or the profile has other weights.
        ModelError, ArtefactError: the checkpoint is damaged, or `out` cannot be written.
        InfeasibleBudgetError: no plan of a baseline is small enough.
    """
    from moacompress.runtime.linear import pack_where_it_fits

    progress = progress or SILENT
    folder = compressed_folder(Path(target))
    check_names(against)
    task_names(tasks)  # an unknown name is said before texts are read
    resources = Resources(prose=Prose.load(text) if text is not None else None, squad=squad)
    names = task_names(tasks, resources)
    if prompts < 1 or not lengths or not (names or lm_eval):
        raise UsageError(f"nothing to evaluate: {len(names)} tasks, {len(lengths)} lengths, {prompts} prompts")
    check_resources((name for name in names if name != TEXT), resources)
    if TEXT in names and text is None:
        raise DataError(f"task {TEXT} needs prose: give a .txt file or a folder of them as text")
    checkpoint = load_checkpoint(folder, dtype, device)
    pack_where_it_fits(checkpoint.model)
    checkpoint.check_lengths(lengths)
    field = make_field(checkpoint, against, profile, every_candidate)
    ledger = Records(Path(out).with_name(f"{Path(out).stem}.scores.jsonl") if out is not None else None)
    bench = _Evaluation(checkpoint, resources, field, Scorer(checkpoint, ledger, progress), prompts, seed)
    wanted = [(task, length) for task in names for length in sorted(set(lengths))]
    progress.start("evaluating", sum(bench.check(task, length) for task, length in wanted))
    results: list[ResultRow] = []
    differences: list[ResultRow] = []
    fields: list[list[Measured]] = []
    for task, length in wanted:
        if task == TEXT:
            rows, paired = bench.text(task, length)
        else:
            cell, field_of_cell = bench.task(task, length)
            fields.append(field_of_cell)
            rows, paired = result_rows(cell, field_of_cell, seed), difference_rows(cell, field_of_cell, seed)
        results += rows
        differences += paired
    progress.done()
    report: dict[str, Any] = {"results": results, "differences": differences, "at_floor": at_floor(results)}
    if len(fields) > 1:
        report["pooled"] = dict(zip(("results", "differences"), pooled_rows(fields, seed), strict=True))
    if lm_eval:
        report["lm_eval"] = _lm_eval_rows(checkpoint, field, lm_eval, lm_eval_limit, seed, progress)
    if out is not None:
        write_json(Path(out), report)
    return report


def task_names(tasks: Iterable[str], resources: Resources | None = None) -> list[str]:
    """Returns the tasks with groups expanded and without repeats; `text` comes last.

    Args:
        tasks: names of tasks and groups; `all` holds what can be made, `text` too where there is prose.
        resources: what there is, for `all`.

    Raises:
        UsageError: unknown; names the nearest known one.
    """
    given = list(dict.fromkeys(tasks))
    prose = resources is not None and resources.prose is not None
    with_text = TEXT in given or ("all" in given and prose)
    return [*expand_tasks((name for name in given if name != TEXT), resources), *([TEXT] if with_text else [])]


def _lm_eval_rows(
    checkpoint: Checkpoint, field: Field, tasks: Sequence[str], limit: int | None, seed: int, progress: Progress
) -> list[ResultRow]:
    """Returns the rows of lm-evaluation-harness, whose prompts have any length: so there are no baselines at equal bytes."""
    from moacompress.evaluation.lm_harness import run_lm_eval

    contenders = field.without_baselines()
    progress.start("lm-evaluation-harness", len(contenders))
    rows = []
    for name, plan in contenders.items():
        rows += run_lm_eval(checkpoint.put_on(plan), checkpoint.tokenizer, tasks, limit, seed=seed, name=name)
        progress.step(name)
    progress.done()
    return rows


@dataclass(frozen=True)
class _Evaluation:
    """All that is the same for every task and length."""

    checkpoint: Checkpoint
    resources: Resources
    field: Field
    scorer: Scorer
    prompts: int
    seed: int

    def check(self, task: str, length: int) -> int:
        """Returns the number of scores a task and length takes, after one prompt of it could be made.

        Whatever is wrong with the request is found here, before the first minute of work.
        """
        if task == TEXT:
            self._windows(length)
            tokens = length
        else:
            tokens = mean_tokens(self._cases(task, length, 1))
        return len(self.field.at(tokens)) * self.prompts

    def task(self, task: str, length: int) -> tuple[TaskCell, list[Measured]]:
        """Returns a task with prompts at a length, and the models on it, each by its best candidate."""
        cases = self._cases(task, length, self.prompts)
        cell = TaskCell(task, length, len(cases), mean_tokens(cases))
        field = [Measured(contender, self.scorer.cases(contender, cases)) for contender in self._contenders(cell)]
        return cell, best_candidates(field)

    def text(self, task: str, length: int) -> tuple[list[ResultRow], list[ResultRow]]:
        """Returns the rows and the differences on long text."""
        windows = self._windows(length)
        cell = TaskCell(task, length, len(windows), length)
        contenders = self._contenders(cell)
        entries = self.scorer.windows(contenders, windows, task)
        measured = [TextMeasured(*pair) for pair in zip(contenders, entries, strict=True)]
        best = best_candidates(measured, "nll_late")
        return text_result_rows(cell, best, self.seed), text_difference_rows(cell, best, self.seed)

    def _contenders(self, cell: TaskCell) -> list[Contender]:
        return self.field.at(cell.tokens)

    def _cases(self, task: str, length: int, prompts: int) -> list[Case]:
        return make_cases(task, length, prompts, self.seed, self.checkpoint.tokenizer, self.resources)

    def _windows(self, length: int) -> list[list[int]]:
        assert self.resources.prose is not None
        return text_windows(self.resources.prose, self.checkpoint.tokenizer, length, self.prompts, self.seed)

"""Evaluation of a compressed checkpoint, beside the dense model and the usual baselines at the plan's bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import EVALUATION_FILE, of_evaluation, scores_file
from moacompress.core.errors import ArtefactError, DataError, UsageError
from moacompress.core.files import read_json, remove, sweep_files, write_json
from moacompress.core.lock_holders import own_file
from moacompress.core.progress import SILENT, Progress
from moacompress.core.ranks import rank, world_size
from moacompress.core.records import Records
from moacompress.core.shingles import OVERLAP_LIMIT, Shingles, overlap, refuse_overlap
from moacompress.core.shown import ShownDict
from moacompress.core.version import own_version
from moacompress.evaluation.baselines.comparison import Comparison, check_names, make_comparison
from moacompress.evaluation.eval_estimate import estimate_answers
from moacompress.evaluation.lm_harness import AUTO, check_lm_eval, read_batch_size, run_lm_eval
from moacompress.evaluation.measurement import Measurement
from moacompress.evaluation.scoring.result_rows import ResultRow
from moacompress.evaluation.scoring.scores import CaseScorer, read_entry
from moacompress.evaluation.tasks.own_rows import own_tasks
from moacompress.evaluation.tasks.registry import KINDS, Resources, check_resources, expand_tasks, find_task
from moacompress.evaluation.tasks.task import TEXT
from moacompress.models.processes import broadcast, check_alike, join
from moacompress.models.stored_plan import stored_plan
from moacompress.prompts.pools import Prose
from moacompress.rules.budget import format_length
from moacompress.rules.plan import Plan
from moacompress.rules.untrusted import reading_notes
from moacompress.runtime.checkpoint import Checkpoint, compressed_folder, load_checkpoint, with_dense
from moacompress.runtime.linear import use_kernels

logger = logging.getLogger(__name__)


NOT_ASKED = {
    "code": ("code-question", "code-completion"),
    "a second question": ("second-question",),
    "tables": ("table-lookup",),
    "dialogues": ("dialogue-fact",),
    "tool calls": ("tool-call",),
    "long text": (TEXT,),
}
"""What a cache is asked for in use, and the tasks that measure it."""


class EvaluationReport(ShownDict):
    """What an evaluation found, as `evaluate` describes it."""


def evaluate(
    target: str | Path,
    *,
    against: Sequence[str] = ("dense", "uniform", "best"),
    dense: str | Path | None = None,
    tasks: Sequence[str] = ("code-question", "second-question", "needle-noise"),
    lengths: Sequence[int] = (1024,),
    prompts: int = 20,
    text: str | Path | None = None,
    squad: str | Path | None = None,
    sources: Sequence[str] = (),
    profile: str | Path | None = None,
    every_candidate: bool = False,
    allow_overlap: bool = False,
    lm_eval: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    lm_eval_batch: int | str = AUTO,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measures a compressed model on held-out prompts and text.

    All models are the same loaded weights, run by the same kernels on the same prompts in the same batches: under the
    plan, with every KV head at full span (dense), and under baselines that take at most the plan's KV bytes at the
    prompts' mean length. With a quantized cache they run as transformers runs them, and the cache's tensors are counted.
    Beside such a side, or an eviction, dense runs as transformers runs it too (`dense:transformers`): the two attentions round
    differently, and retention is of the prompts that dense answers by both.
    Known ways to evict tokens run under masks, in plain PyTorch, within the plan's bytes of each prompt; their memory is
    counted as if it were freed. They have no rows for `text`.
    A baseline with several candidates (sinks, streaming windows) is represented by the one with the lowest mean NLL on
    these very prompts. Under `torchrun` the processes share the batches of prompts and the windows of text; every one of
    them is to call it alike, all return the report, and the first one writes.

    Args:
        target: a compressed checkpoint, or a run's folder with one under `model/`.
        against: what to measure beside the plan: `dense`; `dense:transformers`; the baselines `uniform`, `uniform-elastic`,
            `quantized`, `per-layer`, `split` and `moa`; `best` for the one of these that the search measured best, where the
            plan says so; `uniform:4`, `uniform:16` and `uniform:64` for a given sink; transformers' quantized caches, such as
            `quantized:hqq-8` (`quantized_caches.QUANTIZED`), at the bytes that they take;
            known ways to evict tokens (`baselines.evictions`), such as `snapkv`, which is measured with the question seen
            and unseen, or `snapkv:seen`; `snapkv:int4` rounds what it keeps too;
            folders of other compressed checkpoints of the same dense model, with their own weights where these were repaired
            or healed, or layers share attention.
        dense: the dense model, where the checkpoint's weights are not its any more: layers share attention, or the weights were
            repaired or healed. Everything but this and other checkpoints is then measured with its weights.
        tasks: names of tasks or of groups of them; `text` for perplexity by position, KL and top-1 agreement with
            dense on windows of `text`.
        lengths: prompt lengths, tokens, template and answer included.
        prompts: prompts of each task and length.
        text: file or folder of long prose, for prose tasks and for `text`; its evaluation third is used.
        squad: SQuAD as JSON, for question answering.
        sources: files of rows with answers of your own, or hub ids: each is a task more, of the rows that fit the longest of
            `lengths`, at most `prompts` of them; see `tasks.own_rows`. Of those that the plan was calibrated on only the rows
            count that were held out.
        profile: folder of the profile that `per-layer` and `split` are made from; the one beside `target` by default.
        every_candidate: try every sink of a baseline, also where the search has found and noted the best one.
        allow_overlap: measure also on text of which the plan's calibration has seen more than 1%; it is marked in the report.
        lm_eval: tasks of lm-evaluation-harness, by name or as `.yaml` files, for the plan, dense and other folders.
        lm_eval_limit: only the first documents of each of them; None for all.
        lm_eval_batch: requests of theirs that run at once: a number, "auto" or "auto:N"; see `run_lm_eval`.
        seed: of prompts.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's.
        device: torch device.
        out: where to write the result as JSON, atomically. Finished scores are kept beside it (`eval.scores.jsonl` for
            `eval.json`) and not computed again.
        overwrite: start from scratch: what is at `out` and the scores beside it are removed.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.
        progress: told about every score.

    Returns:
        A report with these parts, which a notebook shows as the command does:

        - `checkpoint`: fingerprints of what was measured, `plan` and `weights`; and `other_weights`, whether these are not
          those that the plan was made for.
        - `wording`: for every task a digest of what its prompts say. Numbers of two wordings are of two tasks.
        - `results`: rows of `model, task, length, metric, value, ci95, prompts, kv_bytes, tokens` (the mean, where bytes
          are stated), `overlap` (the share of the prompts' runs of 13 words that the plan's calibration has seen; None where
          the checkpoint does not say), `documents` where several prompts ask about one (of SQuAD, or a row's context, at any
          length): these count as one, with their mean; and `sink` and `window` of a baseline where all its KV heads have the
          same. Metrics are `exact_match`, `accuracy`, `nll` (nats per token) and, where dense is measured and gets a prompt
          right, `retention`, whose `prompts` are those that dense gets right, by both attentions where both are measured
          (`prompts_dense` has the number of each); for text see `result_rows.TEXT_METRICS`.
        - `differences`: rows of the plan minus each other `model`, paired by prompt, with `p`, the p-value of an exact or a
          permutation test. `ci95` is None below 5 prompts, as everywhere.
        - `kinds`: for every task which of `tasks.registry.KINDS` it is.
        - `pooled`: `results` and `differences` of all prompts of each kind together, the kind that a claim rests on first;
          `task` is the kind, and differences have `retention` too.
        - `not_measured`: what no task asks for, in words.
        - `answers`: for every prompt the end of its question, the references, what the plan and dense said (as far as it
          decides the score), and the exact match of both.
        - `seen_in_calibration`: `task`, `length` and `overlap` of what calibration has seen more than 1% of.
        - `scores`: of single prompts, see `scoring.stored_scores`; all of the above but text is computed from them.
        - `at_floor`: `task` and `length` of what the dense model cannot do itself, so that nothing follows from it.
        - `lm_eval`: rows of lm-evaluation-harness, where asked for; see `run_lm_eval`. They are computed from scratch each
          time, and those of other tasks that are at `out` stay there.

    Raises:
        UsageError: `target` is not compressed, an unknown task or baseline, a cache whose package is not installed or
            that cannot hold the model's layers, or no prompts.
        DataError: prompts cannot be made at a length, or what they are made of is missing; or calibration has seen more than 1%
            of the text, and `allow_overlap` is False.
        PlanError: the plan is damaged, or another folder or the profile has other weights.
        ModelError, ArtefactError: the checkpoint is damaged, or `out` cannot be written, is not an evaluation of this
            checkpoint, or is another process's at work.
        InfeasibleBudgetError: no plan of a baseline is small enough.
    """
    progress = progress or SILENT
    join()
    folder = compressed_folder(Path(target))
    read_batch_size(lm_eval_batch)
    check_names(against)
    own = own_tasks(sources, calibrated_on(stored_plan(folder)) if sources else ())
    task_names(tasks, Resources(own=own))  # an unknown name is said before texts are read
    resources = Resources(prose=Prose.load(text) if text is not None else None, squad=squad, own=own)
    names = task_names((*own, *tasks), resources)
    check_request(names, lengths, prompts, resources, harness=bool(lm_eval))
    if lm_eval:
        check_lm_eval(lm_eval, lm_eval_limit)
    if resources.prose is not None and not allow_overlap and any(map(partial(reads_prose, resources=resources), names)):
        check_overlap(resources.prose, stored_plan(folder).seen)
    checkpoint = load_checkpoint(folder, dtype, device, trust_remote_code=trust_remote_code)
    use_kernels(checkpoint.model)
    checkpoint.check_lengths(lengths)
    checkpoint = _with_dense(checkpoint, dense, compares=bool(against), reads_text=TEXT in names)
    comparison = make_comparison(checkpoint, against, profile, every_candidate)
    path = None if out is None or rank() else Path(out)
    kinds = {name: find_task(name, resources).kind for name in names if name != TEXT}
    wording = {name: find_task(name, resources).wording for name in names if name != TEXT}
    subject: dict[str, Any] = {
        "plan": checkpoint.plan.key(),
        "weights": checkpoint.weights,
        "other_weights": checkpoint.has_other_weights,
    }
    check_alike({"moacompress": own_version(), **subject})
    with nullcontext() if path is None else own_file(path):
        earlier = {} if path is None else _check_place(path, subject, wording, overwrite)
        kept = broadcast(earlier.get("lm_eval", []))
        records = Records(None if path is None else scores_file(path), read_entry, resume=not overwrite)
        scorer = CaseScorer(checkpoint, records, progress)
        bench = Measurement(checkpoint, resources, comparison, scorer, prompts, seed, allow_overlap)
        wanted = [(task, length) for task in names for length in bench.lengths(task, lengths)]
        counts = {(task, length): bench.check(task, length) for task, length in wanted}
        if path is not None and overwrite:
            remove(of_evaluation(path))
        if progress.shows and not len(records) and world_size() == 1:  # a run that is taken up has said so before
            progress.say(f"This takes {estimate_answers(checkpoint, counts, models=1).line()}")
        progress.start("evaluating", sum(counts.values()))
        report: dict[str, Any] = {"checkpoint": subject, "wording": wording, "kinds": kinds, **bench.measured(wanted)}
        report["not_measured"] = not_measured(kinds, lengths)
        progress.done()
        if kept:
            report["lm_eval"] = kept
        if lm_eval:
            if path is not None:
                write_json(path, report)  # the harness may fail, after hours
            rows = _lm_eval_rows(checkpoint, comparison, lm_eval, lm_eval_limit, lm_eval_batch, seed, progress)
            made = {row["task"] for row in rows}
            report["lm_eval"] = [*(row for row in kept if row["task"] not in made), *rows]
        if path is not None:
            write_json(path, report)
            _warn_of_lost(path, earlier.get("results", ()), report["results"])
        broadcast(None)  # no process ends before the report is there
        return EvaluationReport(report)


def _with_dense(checkpoint: Checkpoint, dense: str | Path | None, *, compares: bool, reads_text: bool) -> Checkpoint:
    """Returns a checkpoint with the dense model to compare it with, which may be its own weights; warns where they are changed.

    Raises:
        UsageError: its layers share attention, and no dense model was given.
    """
    folder, plan = checkpoint.folder, checkpoint.plan
    if dense is not None:
        checkpoint = with_dense(checkpoint, dense)
    elif plan.shares and (compares or reads_text):
        raise UsageError(
            f"{folder} has layers that share attention and no queries and keys of their own, so dense and baselines cannot be "
            "made of it; give the model it was made from (--dense MODEL), or leave them out (--against none)"
        )
    elif plan.changed_weights and compares:
        logger.warning(
            "the weights of %s were %s: what is called dense here, and the baselines, have these weights too; give the model "
            "it was made from (--dense MODEL)",
            folder,
            plan.changed_weights,
        )
    if checkpoint.has_other_weights:
        logger.warning(
            "the weights of %s are not those that its plan was made for: fingerprint %s, not %s. What the plan says of its KL "
            "is of the other weights; search again if they were fine-tuned, or get the checkpoint again if they were not",
            folder,
            checkpoint.weights,
            plan.model.weights_fingerprint,
        )
    return checkpoint


def calibrated_on(plan: Plan) -> set[str]:
    """Returns the files and hub sets that a plan was calibrated on, by path and by name.

    Raises:
        PlanError: the plan's recipe is damaged.
    """
    with reading_notes("its recipe"):
        calibration = (plan.provenance.get("recipe") or {}).get("calibration", {})
        seen = {part.get(key) for part in calibration.get("sources", ()) for key in ("path", "dataset")}
    return {name for each in seen if each for name in (each, Path(each).name)}


def reads_prose(task: str, resources: Resources) -> bool:
    """Returns whether a task's prompts are made of prose."""
    return task == TEXT or find_task(task, resources).needs == "prose"


def check_overlap(prose: Prose, seen: Shingles | None) -> None:
    """Refuses prose of whose evaluation pool calibration has seen more than `OVERLAP_LIMIT`, and names the worst file.

    Raises:
        DataError: it has.
    """
    texts = [" ".join(words) for words in prose.pools["evaluation"]]
    whole = overlap(seen, texts)
    if whole is None or whole <= OVERLAP_LIMIT:
        return
    shares = [overlap(seen, [text]) or 0.0 for text in texts]
    worst = shares.index(max(shares))
    refuse_overlap(
        whole, f"the evaluation text of {prose.name} ({prose.files['evaluation'][worst]}: {shares[worst]:.1%})"
    )


def check_request(
    names: Sequence[str], lengths: Sequence[int], prompts: int, resources: Resources, *, harness: bool = False
) -> None:
    """Refuses an evaluation of nothing, and tasks whose texts are not there; no model is needed.

    Where tasks of lm-evaluation-harness are measured too (`harness`), there need not be others.

    Raises:
        UsageError: there is nothing to measure.
        DataError: a text is missing, or cannot be used.
    """
    if prompts < 1 or not lengths or not (names or harness):
        raise UsageError(f"nothing to evaluate: {len(names)} tasks, {len(lengths)} lengths, {prompts} prompts")
    check_resources((name for name in names if name != TEXT), resources)
    if TEXT in names and resources.prose is None:
        raise DataError(f"task {TEXT} needs prose: give a .txt file or a folder of them as text")


def _check_place(
    out: Path, subject: Mapping[str, Any], wording: Mapping[str, str], overwrite: bool
) -> dict[str, list[ResultRow]]:
    """Refuses what is not an evaluation of this checkpoint; one of other tasks is, and its scores are beside it.

    One of the same tasks in another wording counts as one of other tasks, and it is said.

    Returns:
        Its `results`, and those of lm-evaluation-harness, `lm_eval`, which are nowhere else; nothing where none is there.
    """
    sweep_files(out)
    if out.is_dir():
        raise ArtefactError(f"{out} is a folder; name a file, such as {out / EVALUATION_FILE}")
    if overwrite or not out.exists():
        return {}
    rows: dict[str, list[ResultRow]] = {}
    try:
        found = read_json(out, "evaluation")
        ours = "results" in found and found.get("checkpoint", subject) == subject
        earlier = dict(found["wording"]) if ours else {}
        rows = {
            kind: [{**row, "task": str(row["task"])} for row in found.get(kind, ())] for kind in ("results", "lm_eval")
        }
    except (ArtefactError, TypeError, AttributeError, KeyError):
        ours = False
    if not ours:
        raise ArtefactError(
            f"{out} exists already and is not an evaluation of this checkpoint; choose another file or pass --overwrite"
        )
    other = [name for name, digest in wording.items() if name in earlier and earlier[name] != digest]
    if other:
        logger.warning(
            "%s has numbers of other prompts of the same name (%s, in another wording); they are measured again",
            out,
            ", ".join(other),
        )
    return rows


def _warn_of_lost(out: Path, before: Iterable[ResultRow], now: Iterable[ResultRow]) -> None:
    """Says which numbers of an earlier evaluation are not in the one that takes its place."""

    def places(rows: Iterable[ResultRow]) -> list[str]:
        return list(dict.fromkeys(f"{row.get('model')} on {row['task']}@{row.get('length')}" for row in rows))

    there = set(places(now))
    lost = [place for place in places(before) if place not in there]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        logger.warning(
            "%s had numbers that were not asked for now (%s%s), and has them no more; their scores stay in %s: an evaluation "
            "of all together takes them from there",
            out,
            ", ".join(lost[:3]),
            more,
            scores_file(out).name,
        )


def task_names(tasks: Iterable[str], resources: Resources | None = None) -> list[str]:
    """Returns the tasks with groups expanded and without repeats, in the order of `KINDS`; `text` comes last.

    `all` holds what the resources allow, `text` too where there is prose.

    Raises:
        UsageError: unknown; names the nearest known one.
    """
    given = list(dict.fromkeys(tasks))
    prose = resources is not None and resources.prose is not None
    with_text = TEXT in given or ("all" in given and prose)
    names = expand_tasks((name for name in given if name != TEXT), resources)
    ordered = sorted(names, key=lambda name: KINDS.index(find_task(name, resources).kind))
    return [*ordered, *([TEXT] if with_text else [])]


def not_measured(tasks: Iterable[str], lengths: Iterable[int]) -> list[str]:
    """Returns in words what an evaluation of these tasks and lengths says nothing about."""
    asked = set(tasks)
    missing = [what for what, names in NOT_ASKED.items() if not asked & {*names}]
    return [f"prompts beyond {format_length(max(lengths))} tokens", *missing, "long answers"]


def _lm_eval_rows(
    checkpoint: Checkpoint,
    comparison: Comparison,
    tasks: Sequence[str],
    limit: int | None,
    batch: int | str,
    seed: int,
    progress: Progress,
) -> list[ResultRow]:
    """Returns the rows of lm-evaluation-harness, whose prompts have any length: so there are no baselines at equal bytes."""
    compared_models = comparison.without_baselines()
    progress.start("lm-evaluation-harness", len(compared_models))
    rows = []
    for compared in compared_models:
        rows += run_lm_eval(
            compared.put_on(checkpoint),
            checkpoint.tokenizer,
            tasks,
            limit,
            seed=seed,
            name=compared.name,
            batch_size=batch,
            quiet=not progress.shows,
        )
        progress.step(compared.name)
    progress.done()
    return rows

"""`moacompress eval`: measures a compressed model on held-out tasks and text, beside dense and the usual baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command, say
from moacompress.cli.options import AllowOverlap, split_list
from moacompress.core.errors import UsageError
from moacompress.core.files import write_text
from moacompress.core.place import check_replaceable, check_writable
from moacompress.core.ranks import rank
from moacompress.core.tables import Table

if TYPE_CHECKING:
    from moacompress.evaluation.runner import EvaluationReport
    from moacompress.evaluation.tasks.registry import Resources
    from moacompress.recipe import Recipe

SPLIT = ("dense", "uniform", "uniform-elastic", "per-layer", "split")
"""What can be measured beside a model that is split across ranks: the dense model, and other plans."""

Against = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="What to compare with: dense; dense:transformers (stock attention, always added beside quantized caches and "
        "evictions); best (the baseline that the search measured best); the baselines uniform, uniform:4, uniform-elastic, "
        "per-layer and split; transformers' quantized caches (quantized:hqq-8, quantized:hqq-4, quantized:quanto-4, "
        "quantized:fp8); eviction methods (streaming-llm, h2o, snapkv, pyramidkv, adakv, expected-attention, keydiff, "
        "kvzip; snapkv:seen if the method sees the question, snapkv:window=16 for a setting other than the default, "
        "snapkv:int8 or snapkv:int4 to round what it keeps, if it evicts after the prompt); "
        "folders of other models compressed from the same dense model; or none.",
    ),
]
Dense = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Dense model that DIR was made from. Needed if its layers share attention, and for dense and baselines if its "
        "weights were repaired or healed.",
    ),
]
ListTasks = Annotated[bool, typer.Option("--list-tasks", help="List the tasks and what they need; measure nothing.")]
Squad = Annotated[Path | None, typer.Option(metavar="FILE", help="SQuAD JSON file, for question answering.")]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="FILE",
        help="Your own rows with answers (.jsonl, .json, .csv, .parquet) or a hub dataset; each becomes a task. Repeatable.",
    ),
]
ProfileFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Profile that per-layer and split are made from. Default: the run's own."),
]
FailUnder = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Exit with 1 if the plan scores below a limit, such as exact_match=0.9, needle-noise:retention=0.95 or "
        "key-value@2k:accuracy=0.9.",
    ),
]
LmEval = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Tasks of lm-evaluation-harness (names or .yaml files). --prompts also limits their documents.",
    ),
]
LmEvalBatch = Annotated[
    str, typer.Option(metavar="N", help="Batch size of lm-evaluation-harness: a number, auto, or auto:N.")
]
ShowFailures = Annotated[
    bool,
    typer.Option(
        "--show-failures",
        help="Print the prompts on which the plan and dense score differently: question, reference and both answers. "
        "With -o and the file of an earlier evaluation of the same tasks nothing is measured again.",
    ),
]
Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write all rows as CSV.")]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Write the results here; a stopped run resumes from this file."),
]


@command(
    "moacompress eval runs/mine --tasks needle-noise,key-value --lengths 1k,2k --prompts 50 -o runs/mine/eval.json",
    "moacompress eval runs/mine --tasks all --text prose/ --squad dev-v2.0.json --against dense,uniform,per-layer,split",
    "moacompress eval runs/mine --source mine.jsonl --lengths 4k --prompts 200",
    "moacompress eval runs/mine/model --against dense,runs/other --csv scores.csv",
    "moacompress eval runs/mine/model --against snapkv,kvzip,kvzip:int4,quantized:hqq-4",
    "moacompress eval runs/mine --tasks needle-noise --fail-under exact_match=0.9,retention=0.95 --json",
    "moacompress eval --list-tasks",
    settings=(
        "evaluation.tasks",
        "evaluation.lengths",
        "evaluation.prompts",
        "calibration.text",
        "seed",
        "device",
        "dtype",
    ),
    takes=("dry_run", "overwrite", "tensor_parallel", "trust_remote_code"),
    computes=True,
    maps=True,
    shared=True,
)
def evaluate(
    run: CommandRun,
    path: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Compressed model, or the folder of a run.", show_default=False),
    ] = None,
    against: Against = "dense,uniform,best",
    dense: Dense = None,
    list_tasks: ListTasks = False,
    squad: Squad = None,
    source: Sources = None,
    profile: ProfileFolder = None,
    allow_overlap: AllowOverlap = False,
    fail_under: FailUnder = None,
    lm_eval: LmEval = None,
    lm_eval_batch: LmEvalBatch = "auto",
    show_failures: ShowFailures = False,
    csv: Csv = None,
    out: OutFile = None,
) -> Output:
    """Measure a compressed model beside dense and others.

    All models get the same prompts, which calibration has not seen; baselines get the plan's KV bytes. The default tasks are
    code-question, second-question and needle-noise, plus text with --text; none if --source or --lm-eval is given. -o keeps the
    question, the reference and both answers of every prompt.
    Under torchrun (torchrun --standalone --nproc-per-node 2 -m moacompress eval ...) the processes share the prompts.
    """
    if list_tasks:
        return _list_tasks()
    if path is None:
        raise UsageError("missing argument DIR: a compressed model, or the folder of a run")
    harness, recipe = split_list(lm_eval) or (), run.recipe()
    if lm_eval is not None and not harness:
        raise UsageError("no tasks of lm-evaluation-harness given; name some, or leave --lm-eval out")
    if csv is not None:
        _check_csv(csv, out)
    others = tuple(name for name in split_list(against) or () if name != "none")
    if run.common.tensor_parallel:
        _check_tensor_parallel(others)
    tasks, resources = _asked(run, recipe, source, squad, bool(harness), fail_under is not None)

    from moacompress.evaluation.runner import evaluate as evaluate_model
    from moacompress.evaluation.runner import task_names
    from moacompress.evaluation.scoring.thresholds import failures, parse_thresholds

    thresholds = parse_thresholds(fail_under, (*resources.own, *task_names(tasks, resources)))
    if run.common.dry_run:
        return _estimated(run, path, others, tasks, recipe, resources, harness)
    report = evaluate_model(
        path,
        against=others,
        dense=dense,
        profile=profile,
        allow_overlap=allow_overlap,
        out=out,
        tasks=tasks,
        squad=squad,
        sources=source or (),
        lm_eval=harness,
        lm_eval_batch=lm_eval_batch,
        lm_eval_limit=run.given.get("evaluation__prompts"),
        lengths=recipe.evaluation.lengths,
        prompts=recipe.evaluation.prompts,
        text=recipe.calibration.text,
        every_candidate=True,
        seed=recipe.seed,
        dtype=recipe.dtype,
        device=recipe.device,
        **run.how,
    )
    failed = failures(thresholds, report["results"])
    return _shown(report, csv, show_failures, None if fail_under is None else failed)


def _asked(
    run: CommandRun, recipe: Recipe, sources: list[str] | None, squad: Path | None, harness: bool, prose_too: bool
) -> tuple[tuple[str, ...], Resources]:
    """Returns the tasks that are measured, which depend on what else is given, and what there is to make them of.

    `evaluate` reads the text itself; here it is read where a dry run or a limit asks which tasks there are (`prose_too`).
    """
    from moacompress.evaluation.tasks.own_rows import own_tasks
    from moacompress.evaluation.tasks.registry import Resources
    from moacompress.evaluation.tasks.task import TEXT
    from moacompress.prompts.pools import Prose

    tasks, text = recipe.evaluation.tasks, recipe.calibration.text
    if "evaluation__tasks" not in run.given:
        tasks = () if harness or sources else (*tasks, TEXT) if text is not None else tasks
    prose = Prose.load(text) if text is not None and (run.common.dry_run or prose_too) else None
    return tasks, Resources(prose=prose, squad=squad, own=own_tasks(sources or ()))


def _shown(report: EvaluationReport, csv: Path | None, show_failures: bool, failed: list[str] | None) -> Output:
    """Writes the table of `--csv` and shows a report; `failed` are limits that the plan is below, None if none were given."""
    from moacompress.report.evaluation_tables import csv_text, evaluation_tables, failure_lines

    if csv is not None and not rank():
        write_text(csv, csv_text(report))
    if failed and not rank():
        say("below the threshold: " + "; ".join(failed))
    data = report if failed is None else {**report, "failures": failed}
    shown = [*evaluation_tables(report), *(failure_lines(report) if show_failures else [])]
    return Output(data, shown, exit_code=int(bool(failed)))


def _estimated(
    run: CommandRun,
    path: Path,
    others: tuple[str, ...],
    tasks: tuple[str, ...],
    recipe: Recipe,
    resources: Resources,
    harness: tuple[str, ...],
) -> Output:
    """Checks everything and estimates the time."""
    from moacompress.evaluation.baselines.comparison import check_names
    from moacompress.evaluation.eval_estimate import estimate_eval
    from moacompress.evaluation.lm_harness import check_lm_eval
    from moacompress.evaluation.runner import check_request, task_names

    check_names(others)
    names, asked = task_names(tasks, resources), recipe.evaluation
    check_request([*names, *resources.own], asked.lengths, asked.prompts, resources, harness=bool(harness))
    if harness:
        check_lm_eval(harness)
    expected = estimate_eval(
        path,
        others,
        names,
        asked.lengths,
        asked.prompts,
        own={name: len(task.given or ()) for name, task in resources.own.items()},
        dtype=recipe.dtype,
        device=recipe.device,
        trust_remote_code=run.common.trust_remote_code,
    )
    besides = " This excludes the tasks of lm-evaluation-harness." if harness else ""
    return Output(expected.to_dict(), [f"It would take {expected.line()}{besides} Nothing was measured."])


def _check_csv(csv: Path, out: Path | None) -> None:
    """Refuses a place of the table where it cannot go, before anything is measured.

    Raises:
        UsageError: it is that of the report.
        ArtefactError: something else is there, or it cannot be written.
    """
    from moacompress.report.evaluation_tables import CSV_COLUMNS

    if out is not None and csv.resolve() == out.resolve():
        raise UsageError(f"--csv and --out are both {csv}; give two different files")
    check_replaceable(csv, lambda text: text.splitlines()[:1] == [",".join(CSV_COLUMNS)], "a table of scores")
    check_writable(csv.absolute().parent)


def _check_tensor_parallel(against: tuple[str, ...]) -> None:
    """Refuses what cannot be measured of a model that is split over ranks.

    Raises:
        UsageError: says what.
    """
    unknown = [name for name in against if name not in SPLIT]
    if unknown:
        raise UsageError(
            f"{unknown[0]} has its own cache or weights and cannot be measured with --tensor-parallel; "
            f"choose from {', '.join(SPLIT)}"
        )


def _list_tasks() -> Output:
    """Returns the tasks with what they need."""
    from moacompress.evaluation.tasks.registry import known_tasks
    from moacompress.evaluation.tasks.task import TEXT

    rows = [(task.name, task.description, task.requirements) for task in known_tasks().values()]
    rows.append((TEXT, "perplexity by position, KL and top-1 agreement with dense on long text", "--text"))
    names = ("task", "description", "needs")
    data = [dict(zip(names, row, strict=True)) for row in rows]
    return Output({"tasks": data}, [Table("Tasks", names, rows, text_columns=3)])

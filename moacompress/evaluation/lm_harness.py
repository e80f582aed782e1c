"""The bridge to lm-evaluation-harness: any of its tasks, on a model that is loaded already.

Requests run in padded batches, as the harness makes them: those of about one length together. Under `torchrun` it deals the
documents out to the processes, as it does for models that it loads itself.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moacompress.core.errors import DataError, MoaCompressError, UsageError, did_you_mean
from moacompress.core.memory import available_bytes
from moacompress.core.ranks import rank, work_shard, world_size
from moacompress.core.statistics import reported_mean
from moacompress.models.placement import input_device
from moacompress.models.processes import broadcast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO = "auto"
MOST_ROWS = 64
"""Of a batch whose size is found."""
RESAMPLES = 1000
"""Of the harness's bootstraps, for metrics that are no means; its own default takes minutes."""


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: str | Path | None = None,
    seed: int = 0,
    name: str = "plan",
    batch_size: int | str = AUTO,
    *,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Runs tasks of lm-evaluation-harness: names of tasks, groups or tags, or paths of task files (`.yaml`).

    Only the first `limit` documents of a task are run; `include_path` is a folder with more task files, `seed` that of
    few-shot examples and sampling. Requests run `batch_size` at once: a number, "auto", or "auto:N" to find it N times, as
    requests become shorter. The harness finds it on a GPU by trying. On a CPU, where trying too many ends the process, it
    is the power of two up to `MOST_ROWS` whose logits at the model's context fit a quarter of the free memory. `quiet`
    hides the harness's bars and remarks.

    Rows have `model` (the name), `task, length` (None)`, metric, value, ci95, prompts`. `metric` is the harness's own, followed
    by its filter if it has one (`exact_match,flexible-extract`); `ci95` is of the harness's standard error, Wilson's for shares
    of yes and no and otherwise t, None where there is none or below 5 documents; `prompts` counts documents.

    Raises:
        UsageError: lm-evaluation-harness is not installed, unknown task, another batch size, or nothing to do.
        DataError: a task's data cannot be loaded.
    """
    batch_size = read_batch_size(batch_size)
    evaluator, manager_class, model_class = _harness()
    if not tasks or (limit is not None and limit < 1):
        raise UsageError(f"nothing to evaluate: {len(tasks)} tasks of lm-evaluation-harness, limit {limit}")
    with _printing(quiet):
        manager = _manager(manager_class, tasks, include_path)
        with _quiet("lm_eval"):  # it warns of every model that is loaded already
            harnessed = _of_ranks(model_class)(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                backend="causal",
                batch_size=batch_size,
                max_batch_size=MOST_ROWS,
            )
        if harnessed.batch_size == AUTO and input_device(model).type == "cpu":
            harnessed.batch_size_per_gpu = _rows_that_fit(harnessed.max_length, harnessed.vocab_size, available_bytes())
        try:
            found = evaluator.simple_evaluate(
                model=harnessed,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except MoaCompressError:
            raise
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if work_shard()[1] > 1 and "did not find any docs" in first:
                first = (
                    f"one of {work_shard()[1]} processes has no document to score; start as many as the smallest task has, or "
                    f"fewer{'' if limit is None else f', and no more than the {limit} that were asked for'}"
                )
            raise DataError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {first}") from error
    return list(broadcast(None if rank() else _rows(found, name)))


def _of_ranks(model_class: Any) -> Any:
    """Returns the harness's class of models for the processes of a run, which it takes for one where the model is loaded."""
    if world_size() == 1:
        return model_class

    class OfRanks(model_class):  # type: ignore[misc]
        """One model in each process."""

        @property
        def rank(self) -> int:
            """Number of this process."""
            return rank()

        @property
        def world_size(self) -> int:
            """Number of the processes."""
            return world_size()

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            """Returns the tensors of all processes, end to end."""
            mine = tensor.reshape(-1)
            parts = [torch.empty_like(mine) for _ in range(world_size())]
            dist.all_gather(parts, mine)
            return torch.cat(parts)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            """Returns the objects of all processes in one of them."""
            parts: list[Any] | None = [None] * world_size() if rank() == dst else None
            dist.gather_object(obj, parts, dst)
            return parts

        def barrier(self) -> None:
            """Waits for all processes."""
            broadcast(None)

    return OfRanks


def read_batch_size(given: int | str) -> int | str:
    """Returns a batch size as the harness takes it.

    Raises:
        UsageError: neither a positive number, "auto", nor "auto:N".
    """
    text = str(given)
    if re.fullmatch(rf"{AUTO}(:[1-9][0-9]*)?", text):
        return text
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise UsageError(f"the batch size of lm-evaluation-harness is {text!r}, not a positive number, auto or auto:N")
    return int(text)


def _rows_that_fit(length: int, vocabulary: int, free: int) -> int:
    """Returns the rows whose logits fit: a batch of them is there twice, in float32 and as their logarithms."""
    row = length * vocabulary * 2 * 4
    fit = min(MOST_ROWS, free // 4 // row)
    return 1 << max(0, int(fit).bit_length() - 1)


def check_lm_eval(tasks: Sequence[str], limit: int | None = None) -> None:
    """Refuses tasks of lm-evaluation-harness that there are not, before a model is loaded.

    Raises:
        UsageError: lm-evaluation-harness is not installed, an unknown task, or fewer documents than processes.
    """
    ranks = work_shard()[1]
    if limit is not None and limit < ranks:
        raise UsageError(
            f"{limit} documents of a task of lm-evaluation-harness were asked for, and each of the {ranks} processes takes "
            f"one or more; ask for {ranks}, or start fewer"
        )
    _, manager_class, _ = _harness()
    with _printing():
        _manager(manager_class, tasks, None)


def _harness() -> tuple[Any, Any, Any]:
    """Returns the modules and classes of the harness, imported only here: it takes seconds."""
    try:
        evaluator = importlib.import_module("lm_eval.evaluator")
        manager = importlib.import_module("lm_eval.tasks").TaskManager
        model = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise UsageError(
            f"lm-evaluation-harness is needed and cannot be imported ({error}); install it with "
            "`pip install 'moacompress[eval]'`"
        ) from error
    return evaluator, manager, model


def _manager(manager_class: Any, tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Returns a manager that knows all tasks; the harness's own are read, which takes long, only if one is asked for."""
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"{include_path} is no folder of task files")
    own = None if include_path is None else str(include_path)
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise UsageError(f"there is no task file {file}")
    manager = manager_class(include_path=own, include_defaults=False)
    unknown = sorted(set(tasks) - set(files) - set(manager.all_tasks))
    if not unknown:
        return manager
    manager = manager_class(include_path=own)
    for task in unknown:
        if task not in manager.task_index:
            hint = did_you_mean(task, manager.all_tasks, "`lm-eval ls tasks` shows all")
            raise UsageError(f"lm-evaluation-harness has no task {task!r}; {hint}")
    return manager


def _rows(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in found["results"].items():
        prompts = _documents(found, task)
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            interval = reported_mean(value, error, prompts) if isinstance(error, int | float) else None
            rows.append(
                {
                    "model": name,
                    "task": task,
                    "length": None,
                    "metric": metric if kind == "none" else key,
                    "value": float(value),
                    "ci95": list(interval) if interval else None,
                    "prompts": prompts,
                    "overlap": None,
                }
            )
    return rows


def _documents(found: dict[str, Any], task: str) -> int:
    """Returns the documents of a task, or of all tasks of a group."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_documents(found, part) for part in found["group_subtasks"].get(task, ()))


@contextlib.contextmanager
def _printing(quiet: bool = False) -> Iterator[None]:
    """Lets the harness print to stderr, as stdout is for results; or nowhere, its bars with it."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if quiet else sys.stderr
        stack.enter_context(contextlib.redirect_stdout(place))
        stack.enter_context(contextlib.redirect_stderr(place))
        yield


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Lets only errors of a logger through."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)

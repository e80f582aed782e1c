"""What an evaluation will take: how many prompts are read and tokens answered, times what the model takes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moacompress.core.tables import readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.estimator import Estimator
from moacompress.estimate.work import Kind, Work
from moacompress.evaluation.baselines.comparison import sides
from moacompress.models.placement import input_device
from moacompress.rules.rule import SINKS
from moacompress.runtime.checkpoint import Checkpoint, compressed_folder, load_checkpoint
from moacompress.runtime.linear import use_kernels

ANSWER = 16
"""Tokens of an answer, mean over tasks."""
TEACHER_FORCED = 0.2
"""What scoring the given answer takes of a prompt's forward pass: the prompt itself is read once for both."""


def eval_work(prompts: Mapping[tuple[str, int], int], models: int) -> list[Work]:
    """Returns what an evaluation runs: so many prompts of each task and length, answered by so many models."""
    return [
        Work(kind, length, models * count * each)
        for (_, length), count in prompts.items()
        for kind, each in (((Kind.FORWARD, 1 + TEACHER_FORCED), (Kind.STEP, ANSWER)) if count else ())
    ]


def estimate_answers(checkpoint: Checkpoint, prompts: Mapping[tuple[str, int], int], models: int) -> Estimate:
    """Estimates an evaluation from one timed prompt of each length under the plan, as if all models were as fast."""
    estimator = Estimator(checkpoint.put_on(checkpoint.plan), input_device(checkpoint.model))
    work = eval_work(prompts, models)
    seconds, count = estimator.seconds(work), models * sum(prompts.values())
    of_models = f" of {models} models" if models > 1 else ""
    return Estimate(
        seconds=seconds,
        text=(f"about {readable_seconds(seconds)} for {count:,} answers{of_models}.",),
        facts={"models": models, "answers": count},
        slowdown=estimator.watch.slowdown,
    )


def estimate_eval(
    target: Path,
    against: Sequence[str],
    tasks: Sequence[str],
    lengths: Sequence[int],
    prompts: int,
    *,
    own: Mapping[str, int] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Estimate:
    """Estimates an evaluation; nothing is written.

    Arguments are those of `runner.evaluate`, but for `own`: the number of rows of each of the user's own tasks, which count
    as if all were as long as the longest length. Baselines without a sink of their own are tried with every sink. Tasks of
    lm-evaluation-harness are not counted.

    Raises:
        UsageError: `target` is not compressed.
        DataError: a length beyond the model's context.
    """
    checkpoint = load_checkpoint(compressed_folder(target), dtype, device, trust_remote_code=trust_remote_code)
    use_kernels(checkpoint.model)
    checkpoint.check_lengths(lengths)
    models = 1 + sum(len(SINKS) if name in ("uniform", "uniform-elastic") else 1 for name in sides(against))
    wanted = {(task, length): prompts for task in tasks for length in lengths}
    wanted |= {(f"own {task}", max(lengths)): min(rows, prompts) for task, rows in (own or {}).items()}
    return estimate_answers(checkpoint, wanted, models)

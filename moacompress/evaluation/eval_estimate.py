"""What an evaluation will take: how many prompts are read and tokens answered, times what the model takes for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moacompress.core.tables import readable_seconds
from moacompress.estimate.devices import on_devices
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.estimator import Estimator
from moacompress.estimate.work import Kind, Work
from moacompress.evaluation.baselines.compared_models import sides
from moacompress.evaluation.scoring.prompts import BATCH_TOKENS
from moacompress.models.placement import input_device
from moacompress.models.weight_bytes import resident_bytes
from moacompress.rules.rule import SINKS
from moacompress.runtime.checkpoint import Checkpoint, compressed_folder, load_checkpoint
from moacompress.runtime.linear import use_kernels

ANSWER = 16
"""Tokens of an answer, mean over tasks."""
TEACHER_FORCED = 0.2
"""What scoring the given answer takes of a prompt's forward pass: the prompt itself is read once for both."""


def eval_work(prompts: Mapping[tuple[str, int], int], models: int) -> list[Work]:
    """Returns what an evaluation runs; devices share the batches of one task and length after another.

    Args:
        prompts: how many there are of each task and length, tokens.
        models: that answer them.
    """
    found = []
    for (task, length), count in prompts.items():
        batches = models * math.ceil(count / max(1, BATCH_TOKENS // length))
        for kind, each in ((Kind.FORWARD, 1 + TEACHER_FORCED), (Kind.STEP, ANSWER)) if count else ():
            found.append(Work(kind, length, models * count * each, 1, f"{task} {length}", batches))
    return found


def estimate_answers(
    checkpoint: Checkpoint, prompts: Mapping[tuple[str, int], int], models: int, devices: int = 1
) -> Estimate:
    """Estimates an evaluation from one timed prompt of each length under the plan.

    Args:
        checkpoint: what is evaluated.
        prompts: how many there are of each task and length, tokens.
        models: that answer them, as if all were as fast.
        devices: processes of `torchrun` that share it, each on a device as fast as this one.
    """
    estimator = Estimator(checkpoint.put_on(checkpoint.plan), input_device(checkpoint.model))
    work = eval_work(prompts, models)
    seconds, together = (estimator.seconds(work, number) for number in (1, devices))
    size, count = resident_bytes(checkpoint.model), models * sum(prompts.values())
    said, found = on_devices(seconds, together, devices, size)
    of_models = f" of {models} models" if models > 1 else ""
    return Estimate(
        seconds=seconds,
        text=(f"about {readable_seconds(seconds)} for {count:,} answers{of_models}.", *said),
        facts={"models": models, "answers": count, **found},
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
    devices: int = 1,
    trust_remote_code: bool = False,
) -> Estimate:
    """Estimates an evaluation; nothing is written.

    Arguments are those of `runner.evaluate`, but for `own`: the number of rows of each of the user's own tasks, which count
    as if all were as long as the longest length, and for `devices`, as in `estimate_answers`. Baselines without a sink of their
    own are tried with every sink. Tasks of lm-evaluation-harness are not counted.

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
    return estimate_answers(checkpoint, wanted, models, devices)

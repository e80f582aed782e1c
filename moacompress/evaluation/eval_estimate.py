"""What an evaluation will take: how many prompts are read and tokens answered, times the rates of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moacompress.core.tables import readable_seconds
from moacompress.estimate.devices import on_devices
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.rates import Rates, TimedRates
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


def eval_seconds(tasks: int, lengths: Sequence[int], prompts: int, models: int, rates: Rates) -> float:
    """Returns about how long an evaluation takes, seconds.

    Args:
        tasks: how many.
        lengths: of prompts, tokens.
        prompts: of each task and length.
        models: that answer them.
        rates: as if every model were as fast.
    """
    return tasks * prompts * models * sum(answer_seconds(n, rates) for n in lengths)


def answer_seconds(length: int, rates: Rates) -> float:
    """Returns about how long one model takes for one prompt of so many tokens, seconds."""
    return (1 + TEACHER_FORCED) * rates.forward(length) + ANSWER * rates.step(length)


def estimate_answers(checkpoint: Checkpoint, counts: Mapping[int, int]) -> Estimate:
    """Estimates an evaluation whose prompts are known, from one timed prompt of each length under the plan.

    Args:
        checkpoint: what is evaluated.
        counts: of every length, tokens, how many answers all models give together.
    """
    rates = TimedRates(checkpoint.put_on(checkpoint.plan), input_device(checkpoint.model))
    seconds = sum(count * answer_seconds(length, rates) for length, count in counts.items())
    answers = sum(counts.values())
    return Estimate(
        seconds=seconds,
        text=(f"about {readable_seconds(seconds)} for {answers:,} answers.",),
        facts={"answers": answers},
        slowdown=rates.watch.slowdown,
    )


def eval_seconds_on(tasks: int, lengths: Sequence[int], prompts: int, models: int, rates: Rates, devices: int) -> float:
    """Returns the same on several devices, which share the batches of one task and length after another."""
    seconds = 0.0
    for length in lengths if prompts else ():
        batches = models * math.ceil(prompts / max(1, BATCH_TOKENS // length))
        seconds += math.ceil(batches / devices) / batches * eval_seconds(tasks, [length], prompts, models, rates)
    return seconds


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
    """Estimates an evaluation from one timed prompt of each length under the plan; nothing is written.

    Arguments are those of `runner.evaluate`, but for `own`: the number of rows of each of the user's own tasks, which count
    as if all were as long as the longest length, and for `devices`: processes of `torchrun` that share it, each on a device as
    fast as this one. Baselines without a sink of their own are tried with every sink. Tasks of
    lm-evaluation-harness are not counted.

    Raises:
        UsageError: `target` is not compressed.
        DataError: a length beyond the model's context.
    """
    checkpoint = load_checkpoint(compressed_folder(target), dtype, device, trust_remote_code=trust_remote_code)
    use_kernels(checkpoint.model)
    checkpoint.check_lengths(lengths)
    models = 1 + sum(len(SINKS) if name in ("uniform", "uniform-elastic") else 1 for name in sides(against))
    rates = TimedRates(checkpoint.put_on(checkpoint.plan), input_device(checkpoint.model))
    seconds = eval_seconds(len(tasks), lengths, prompts, models, rates)
    rows = sum(min(count, prompts) for count in (own or {}).values())
    seconds += eval_seconds(1, [max(lengths)], rows, models, rates)
    answers = (len(tasks) * len(lengths) * prompts + rows) * models
    together = eval_seconds_on(len(tasks), lengths, prompts, models, rates, devices)
    together += eval_seconds_on(1, [max(lengths)], rows, models, rates, devices)
    size = resident_bytes(checkpoint.model)
    said, found = on_devices(seconds, together, devices, size) if devices > 1 else ("", {})
    return Estimate(
        seconds=seconds,
        text=(
            f"about {readable_seconds(seconds)} for {answers:,} answers of {models} models.",
            *([said] if said else []),
        ),
        facts={"models": models, "answers": answers, **found},
        slowdown=rates.watch.slowdown,
    )

"""What an evaluation will take, from what a forward pass and a decode step take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moacompress.core.stopwatch import Stopwatch, busy_note
from moacompress.core.tables import readable_seconds
from moacompress.evaluation.checkpoint import compressed_folder, load_checkpoint
from moacompress.models.device import stopwatch_on
from moacompress.rules.rule import SINKS

ANSWER = 16
"""Tokens of an answer, mean over tasks."""
TEACHER_FORCED = 0.2
"""What scoring the given answer takes of a prompt's forward pass: the prompt itself is read once for both."""


def eval_seconds(
    tasks: int,
    lengths: Sequence[int],
    prompts: int,
    models: int,
    forward: Callable[[int], float],
    decode: Callable[[int], float],
) -> float:
    """Returns about how long an evaluation takes, seconds.

    Args:
        tasks: how many.
        lengths: of prompts, tokens.
        prompts: of each task and length.
        models: that answer them.
        forward: seconds of a prompt of so many tokens.
        decode: seconds of a step after so many tokens.
    """
    each = sum((1 + TEACHER_FORCED) * forward(n) + ANSWER * decode(n) for n in lengths)
    return tasks * prompts * models * each


@dataclass(frozen=True)
class EvalEstimate:
    """What an evaluation will take.

    Attributes:
        models: that answer.
        answers: prompts times models.
        seconds: in all, alone on the machine.
        slowdown: how many times as long what was timed took beside whatever else ran then.
    """

    models: int
    answers: int
    seconds: float
    slowdown: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "estimate": True,
            "models": self.models,
            "answers": self.answers,
            "seconds": round(self.seconds, 1),
            "slowdown": round(self.slowdown, 2),
        }

    def line(self) -> str:
        """Returns one sentence, without its end, and a second one where the machine is busy."""
        busy = busy_note(self.seconds, self.slowdown)
        found = f"about {readable_seconds(self.seconds)} for {self.answers:,} answers of {self.models} models"
        return found if busy is None else f"{found}. {busy.removesuffix('.')}"


def estimate_eval(
    target: Path,
    against: Sequence[str],
    tasks: Sequence[str],
    lengths: Sequence[int],
    prompts: int,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> EvalEstimate:
    """Estimates an evaluation from one timed prompt of each length under the plan; nothing is written.

    Arguments are those of `runner.evaluate`. Baselines without a sink of their own are tried with every sink. Tasks of
    lm-evaluation-harness are not counted.

    Raises:
        UsageError: `target` is not compressed.
        DataError: a length beyond the model's context.
    """
    checkpoint = load_checkpoint(compressed_folder(target), dtype, device, trust_remote_code=trust_remote_code)
    checkpoint.check_lengths(lengths)
    models = 1 + sum(len(SINKS) if name in ("uniform", "uniform-elastic") else 1 for name in against)
    watch = stopwatch_on(device)
    forward, decode = timed_passes(checkpoint.put_on(checkpoint.plan), lengths, device, watch)
    seconds = eval_seconds(len(tasks), lengths, prompts, models, forward.__getitem__, decode.__getitem__)
    return EvalEstimate(models, len(tasks) * len(lengths) * prompts * models, seconds, watch.slowdown)


def timed_passes(
    model: Any, lengths: Sequence[int], device: str, watch: Stopwatch
) -> tuple[dict[int, float], dict[int, float]]:
    """Returns the seconds of a prompt of every length, and those of a step behind it.

    Args:
        model: under the plan.
        lengths: tokens.
        device: that it is on.
        watch: what they are timed with.
    """
    forward, decode = dict[int, float](), dict[int, float]()
    for length in lengths:
        ids = torch.full((1, length), 3, device=device)
        with torch.no_grad():
            begun = watch.begin()
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).cache
            forward[length] = watch.since(begun)
            begun = watch.begin()
            model(input_ids=ids[:, :1], cache=cache, use_cache=True)
            decode[length] = watch.since(begun)
    return forward, decode

"""What a heal will take, before anything is trained or written: tokens, time and memory, from one timed step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moacompress.calibration.answers import generate_greedy
from moacompress.calibration.samples import Sample
from moacompress.calibration.store import Profile
from moacompress.core.memory import peak_rss
from moacompress.core.progress import SILENT, Progress
from moacompress.core.stopwatch import busy_note
from moacompress.core.tables import readable_bytes
from moacompress.healer import processes
from moacompress.healer.distillation import soft_loss
from moacompress.healer.healing import HealRequest, accumulation
from moacompress.healer.teacher import HeldOut, Teacher, target_rows
from moacompress.healer.trained_weights import make_trainable
from moacompress.healer.training_data import count_samples, heal_lengths, held_out_samples
from moacompress.models.device import stopwatch_on
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe

ADAM_BYTES = 8
"""Of the two means that the optimizer keeps of every trained number, float32."""


@dataclass(frozen=True)
class HealEstimate:
    """What a heal will take.

    Attributes:
        steps: optimizer steps.
        tokens: of all steps and processes.
        new_samples: that the dense model has to answer first, or that are cut from texts.
        held_out_samples: that it is measured on.
        evaluations: times that it is measured, the start included.
        answer_seconds: for the answers.
        train_seconds: for the steps.
        evaluation_seconds: for measuring.
        peak_bytes: of this process, Python included; on a GPU of its memory.
        trained_parameters: numbers that are trained.
        max_minutes: after which the training ends, or None.
        slowdown: how many times as long what was timed took beside whatever else ran then.
    """

    steps: int
    tokens: int
    new_samples: int
    held_out_samples: int
    evaluations: int
    answer_seconds: float
    train_seconds: float
    evaluation_seconds: float
    peak_bytes: int
    trained_parameters: int
    max_minutes: float | None
    slowdown: float = 1.0

    @property
    def seconds(self) -> float:
        """All of the time; training ends early where it is limited."""
        training = self.train_seconds + self.evaluation_seconds
        return self.answer_seconds + (training if self.max_minutes is None else min(training, 60 * self.max_minutes))

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        values = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return {"estimate": True, **values, "seconds": round(self.seconds, 3), "slowdown": round(self.slowdown, 2)}

    def lines(self) -> list[str]:
        """Returns what a person sees."""
        limit = "" if self.max_minutes is None else f", of which {self.max_minutes:g} minutes are allowed"
        busy = busy_note(self.seconds, self.slowdown)
        return [
            "An estimate from one timed step; nothing was trained or written.",
            f"Training: {self.steps} steps, {self.tokens:,} tokens, {self.trained_parameters:,} parameters, about "
            f"{self.train_seconds:,.0f} s; {self.evaluations} evaluations on {self.held_out_samples} samples, about "
            f"{self.evaluation_seconds:,.0f} s{limit}.",
            f"Data: {self.new_samples} new samples, about {self.answer_seconds:,.0f} s.",
            f"In all about {self.seconds:,.0f} s, and about {readable_bytes(self.peak_bytes)} of memory.",
            *([] if busy is None else [busy]),
        ]


def estimate_heal(
    target: str | Path,
    *,
    profile: str | Path | Profile | None = None,
    teacher: str | SourceModel | None = None,
    recipe: Recipe | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> HealEstimate:
    """Estimates what `heal` would take with the same arguments. Nothing is written.

    Arguments and errors are those of `heal`.
    """
    request = HealRequest.of(target, profile, teacher, recipe or Recipe(), trust_remote_code)
    progress = progress or SILENT
    known, heal = request.profile, request.heal
    calibration = known.calibration_samples()
    counts = count_samples(known, calibration, request.recipe)
    lengths = heal_lengths(known, request.recipe)
    longest = max(lengths)
    held_out = held_out_samples(known, request.recipe)
    sample = min((*calibration, *known.validation), key=lambda one: abs(len(one.input_ids) - longest))
    progress.start("timing one step", 2)
    probe = _Timed(request, sample)
    progress.step("forward and backward")
    answering = probe.answer_seconds(known.recipe.calibration.answer_tokens) if counts.new_answers else 0.0
    progress.step("an answer")
    progress.done()
    taken = accumulation(request)
    trained = sum(weight.numel() for weight in probe.model.parameters() if weight.requires_grad)
    seen = heal.steps * taken * processes.world_size()
    asked = seen if heal.objective == "echoatt" else min(seen, heal.samples)  # what the teacher says is kept
    mean = sum(lengths) / len(lengths) / len(sample.input_ids)  # of a sample, as a share of the one that was timed
    measured = sum(len(one.input_ids) for one in held_out) / len(sample.input_ids)
    return HealEstimate(
        steps=heal.steps,
        tokens=round(seen * sum(lengths) / len(lengths)),
        new_samples=counts.new_answers + counts.new_texts,
        held_out_samples=len(held_out),
        evaluations=heal.evaluations + 1,
        answer_seconds=counts.new_answers * answering * mean,
        train_seconds=(seen * probe.step_seconds + asked * probe.teacher_seconds) * mean / processes.world_size(),
        evaluation_seconds=((heal.evaluations + 1) * probe.measure_seconds + probe.teacher_seconds)
        * measured
        / processes.world_size(),
        peak_bytes=probe.peak_bytes + ADAM_BYTES * trained,
        trained_parameters=trained,
        max_minutes=heal.max_minutes,
        slowdown=probe.watch.slowdown,
    )


class _Timed:
    """One sample through the teacher, and forward and back through the model.

    Args:
        request: what is asked for.
        sample: a sample as long as those that will be trained on.
    """

    def __init__(self, request: HealRequest, sample: Sample) -> None:
        self._request, self._sample = request, sample
        device = request.recipe.device
        self.watch = stopwatch_on(device)
        ids, rows = torch.from_numpy(sample.input_ids).to(device), target_rows(sample).to(device)
        teacher = Teacher(request.teacher.model)
        begun = self.watch.begin()
        dense = teacher.target_logits(0, ids, rows)
        self.teacher_seconds = self.watch.since(begun)
        begun = self.watch.begin()
        HeldOut(teacher, [sample]).harms(request.checkpoint.model)
        self.measure_seconds = max(self.watch.since(begun) - self.teacher_seconds, 0.0)
        self.model = make_trainable(request.checkpoint.model, request.plan, request.heal, request.recipe.seed).train()
        if request.computes_twice(len(ids)):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        begun = self.watch.begin()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=request.compute == "bfloat16"):
            logits = self.model(input_ids=ids[None], logits_to_keep=rows, use_cache=False).logits[0]
            soft_loss(logits, dense).backward()
        self.step_seconds = self.watch.since(begun)
        on_gpu = torch.device(device).type == "cuda"
        self.peak_bytes = int(torch.cuda.max_memory_allocated()) if on_gpu else peak_rss()
        self.model.zero_grad()

    def answer_seconds(self, tokens: int) -> float:
        """Returns the seconds of one answer of the dense model."""
        prompt = self._sample.input_ids[:-tokens].tolist()
        begun = self.watch.begin()
        generate_greedy(self._request.teacher.model, [prompt], tokens)
        return self.watch.since(begun)

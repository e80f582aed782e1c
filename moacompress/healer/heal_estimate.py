"""What a heal will take, before anything is trained or written: tokens, time and memory, from one timed step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import KEEP_TOKENS
from moacompress.calibration.profile.store import Profile
from moacompress.core.memory import peak_rss
from moacompress.core.place import named_folder
from moacompress.core.progress import SILENT, Progress
from moacompress.core.ranks import world_size
from moacompress.core.tables import readable_bytes
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.estimator import Estimator
from moacompress.estimate.work import Kind, Work, answers
from moacompress.healer.distillation import soft_loss
from moacompress.healer.heal_request import HealRequest
from moacompress.healer.healing import check_out
from moacompress.healer.teacher import HeldOut, Teacher
from moacompress.healer.trained_weights import make_trainable
from moacompress.healer.training_data import count_samples, heal_drafts, heal_lengths, held_out_samples
from moacompress.models.kept_logits import kept_logits
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe

ADAM_BYTES = 8
"""Of the two means that the optimizer keeps of every trained number, float32."""


def estimate_heal(
    target: str | Path,
    out: str | Path | None = None,
    *,
    profile: str | Path | Profile | None = None,
    teacher: str | SourceModel | None = None,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Estimate:
    """Estimates what `heal` would take with the same arguments, from the beginning. Nothing is written.

    Arguments and errors are those of `heal`; without `out` no place is looked at.
    """
    request = HealRequest.of(target, profile, teacher, recipe or Recipe(), trust_remote_code)
    progress = progress or SILENT
    if out is not None and check_out(named_folder(out), request, overwrite) is not None:
        there = f"{out} is of this very heal already; it would be left as it is."
        return Estimate(seconds=0.0, text=[there], facts={"exists": True})
    known, heal = request.profile, request.heal
    calibration = known.calibration_samples()
    counts = count_samples(known, calibration, request.recipe)
    heal_drafts(known, request.teacher, request.recipe, counts)  # whether they can be made
    lengths = heal_lengths(known, request.recipe)
    held_out = held_out_samples(known, request.recipe)
    sample = min((*calibration, *known.validation), key=lambda one: abs(len(one.input_ids) - request.longest))
    progress.start("timing one step", 2)
    timed = _TimedHeal(request, sample)
    progress.step("forward and backward")
    estimator, tokens = timed.estimator, len(sample.input_ids)
    new = answers(tokens, counts.new_answers, known.recipe.calibration.answer_tokens) if counts.new_answers else []
    world, evaluations = world_size(), min(heal.evaluations, heal.steps) + 1  # the start is measured too
    epoch = math.ceil(heal.samples / (request.accumulation * world))  # steps, of which the last has what is left
    seen = round(heal.steps * heal.samples / epoch)
    asked = seen if heal.objective == "echoatt" else min(seen, heal.samples)  # what the teacher says is kept
    mean = sum(lengths) / len(lengths) / tokens  # of a sample, as a share of the one that was timed
    measured = sum(len(one.input_ids) for one in held_out) / tokens / world
    evaluation_seconds = estimator.seconds(
        [Work(Kind.TEACHER, tokens, measured), Work(Kind.HELD_OUT, tokens, evaluations * measured)]
    )
    train_seconds = estimator.seconds(
        [Work(Kind.TEACHER, tokens, asked * mean / world), Work(Kind.TRAINING, tokens, seen * mean / world)]
    )
    answer_seconds = mean * estimator.seconds(new)
    progress.step("an answer")
    progress.done()
    training = train_seconds + evaluation_seconds
    facts = {
        "exists": False,
        "steps": heal.steps,
        "tokens": round(seen * sum(lengths) / len(lengths)),
        "new_samples": counts.new_answers + counts.new_texts,
        "held_out_samples": len(held_out),
        "evaluations": evaluations,
        "answer_seconds": answer_seconds,
        "train_seconds": train_seconds,
        "evaluation_seconds": evaluation_seconds,
        "peak_bytes": timed.peak_bytes + ADAM_BYTES * timed.trained,
        "trained_parameters": timed.trained,
        "max_minutes": heal.max_minutes,
        "weight_bytes": timed.weights,
    }
    seconds = answer_seconds + (training if heal.max_minutes is None else min(training, 60 * heal.max_minutes))
    return Estimate(seconds=seconds, text=_said(facts, seconds), facts=facts, slowdown=estimator.watch.slowdown)


def _said(facts: Mapping[str, Any], seconds: float) -> list[str]:
    """Returns what a person is told."""
    minutes, weights = facts["max_minutes"], []
    if facts["weight_bytes"] is not None:
        before, after = (readable_bytes(sum(facts["weight_bytes"][name].values())) for name in ("before", "after"))
        weights = [
            f"Weights: {before}, in part blocks of codes; {after} once healed: trained layers are stored as numbers."
        ]
    limit = "" if minutes is None else f", of which {minutes:g} minutes are allowed"
    return [
        "An estimate from one timed step; nothing was trained or written.",
        f"Training: {facts['steps']} steps, {facts['tokens']:,} tokens, {facts['trained_parameters']:,} parameters, about "
        f"{facts['train_seconds']:,.0f} s; {facts['evaluations']} evaluations on {facts['held_out_samples']} samples, about "
        f"{facts['evaluation_seconds']:,.0f} s{limit}.",
        *weights,
        f"Data: {facts['new_samples']} new samples, about {facts['answer_seconds']:,.0f} s.",
        f"In all about {seconds:,.0f} s, and about {readable_bytes(facts['peak_bytes'])} of memory.",
    ]


class _TimedHeal:
    """Times a sample as long as those that will be trained on: through the teacher, and forward and back through the model.

    `trained` is how many numbers are trained, `peak_bytes` of this process or, on a GPU, of its memory.
    """

    def __init__(self, request: HealRequest, sample: Sample) -> None:
        device, dense, model = torch.device(request.recipe.device), request.teacher.model, request.checkpoint.model
        ids, rows = (torch.from_numpy(part).to(device) for part in (sample.input_ids, sample.target_rows))
        held_out = HeldOut(Teacher(dense), [sample])

        def read(tokens: int, targets: int) -> Tensor:
            held_out.teacher = Teacher(dense)  # which keeps what it has read, for `measure`
            return held_out.teacher.target_logits("held out 0", ids, rows)

        def measure(tokens: int, targets: int) -> object:
            return held_out.kls(model)

        def train(tokens: int, targets: int) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=request.compute == "bfloat16"):
                logits = kept_logits(model, rows, input_ids=ids[None], use_cache=False).logits[0]
                soft_loss(logits, held_out.teacher.target_logits("held out 0", ids, rows)).backward()

        passes = {Kind.TEACHER: read, Kind.HELD_OUT: measure, Kind.TRAINING: train}
        self.estimator = Estimator(dense, device, passes)
        for kind in (Kind.TEACHER, Kind.HELD_OUT):
            self.estimator.one(kind, len(ids))
        model = make_trainable(model, request.plan, request.heal, request.recipe.seed).train()
        if len(ids) > KEEP_TOKENS:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.estimator.one(Kind.TRAINING, len(ids))
        self.peak_bytes = int(torch.cuda.max_memory_allocated()) if device.type == "cuda" else peak_rss()
        model.zero_grad()
        self.weights = request.weight_bytes(model)
        self.trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)

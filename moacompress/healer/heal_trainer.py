"""transformers' Trainer with the losses of a heal, its pace, and what is measured on the way."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from moacompress.calibration.data.samples import Sample
from moacompress.core.errors import ModelError
from moacompress.core.progress import Progress
from moacompress.core.ranks import rank
from moacompress.healer.distillation import hard_loss, hidden_loss, soft_loss
from moacompress.healer.heal_history import Evaluated, HealHistory, save_best
from moacompress.healer.teacher import HeldOut, Teacher
from moacompress.healer.trained_weights import as_written, written_tensors
from moacompress.models import processes
from moacompress.models.kept_logits import kept_logits
from moacompress.recipe_sections import HealRecipe

WARM_UP = 0.05
"""Share of the heal in which the learning rate rises."""
FIRST_STAGE = 0.7
"""Share of the steps in EchoAtt's first stage, on hidden states, KL and tokens alike; then tokens alone."""
SAVE_SECONDS = 600.0
"""A checkpoint is written at every evaluation, and where the last one is this old."""


class TrainingProgress:
    """How far a heal is: by its steps, or by its time where that is nearer to its end; `spent` are seconds of earlier runs."""

    def __init__(self, heal: HealRecipe, spent: float) -> None:
        self._steps = heal.steps
        self._limit = None if heal.max_minutes is None else 60 * heal.max_minutes
        self._spent, self._begun = spent, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._spent + time.monotonic() - self._begun

    def share(self, step: int) -> float:
        """Returns the share of the heal that is done after so many steps, in all processes the same."""
        if self._limit is None:
            return min(step / self._steps, 1.0)
        return float(processes.broadcast(min(max(step / self._steps, self.seconds / self._limit), 1.0)))


def rate_factor(share: float) -> float:
    """Returns the learning rate as a share of the largest: up over `WARM_UP`, then down to 0 in a straight line."""
    return min((share + 0.01) / WARM_UP, 1.0) * max(1.0 - share, 0.0)


@dataclass(frozen=True)
class HealParts:
    """What trainer and callback share."""

    heal: HealRecipe
    layers: tuple[int, ...]  # whose states are distilled
    teacher: Teacher
    held_out: HeldOut
    dtype: torch.dtype  # of the checkpoint that will be written
    history: HealHistory
    training: TrainingProgress
    work: Path  # the work folder

    def measure(self, model: Any, step: int, mark: int) -> Evaluated:
        """Returns the held-out KL of the model as it would be written."""
        with as_written(model, self.dtype) as written:
            return Evaluated(step, mark, self.held_out.kls(written))


def as_batches(samples: list[Sample]) -> list[dict[str, Any]]:
    """Returns what the Trainer takes for a dataset: one batch for every sample, of one row and without padding."""
    return [
        {
            "input_ids": torch.from_numpy(sample.input_ids)[None],
            "rows": torch.from_numpy(sample.target_rows),
            "number": torch.tensor(number),
        }
        for number, sample in enumerate(samples)
    ]


class HealTrainer(Trainer):
    """Lowers a heal's loss: mean over the targets of a sample, then over the samples of a step."""

    def __init__(self, parts: HealParts, **arguments: Any) -> None:
        self._parts = parts
        super().__init__(data_collator=lambda batch: batch[0], **arguments)
        self.model_accepts_loss_kwargs = False  # so that the Trainer divides by the samples of a step
        self.step_losses: list[float] = []
        self.step_tokens = 0
        self.done = 0.0  # share of the heal

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the learning rate follow the progress of training."""
        if self.lr_scheduler is None:
            training, chosen = self._parts.training, optimizer or self.optimizer
            assert chosen is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                chosen, lambda step: rate_factor(training.share(step))
            )
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the loss of one sample."""
        loss = self._loss(model, inputs["input_ids"], inputs["rows"], int(inputs["number"]))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"the loss is not finite at step {self.state.global_step}; heal with --dtype float32 or a lower --lr"
            )
        self.step_losses.append(value)
        self.step_tokens += inputs["input_ids"].numel()
        return loss

    def _loss(self, model: Any, ids: Tensor, rows: Tensor, number: int) -> Tensor:
        heal, teacher = self._parts.heal, self._parts.teacher
        if heal.objective == "kl":
            logits = kept_logits(model, rows, input_ids=ids, use_cache=False).logits[0]
            return soft_loss(logits, teacher.target_logits(number, ids[0], rows))
        labels = ids[0, rows + 1]
        if self.done >= FIRST_STAGE:
            return hard_loss(kept_logits(model, rows, input_ids=ids, use_cache=False).logits[0], labels)
        dense, wanted = teacher.logits_and_layers(ids[0], rows, self._parts.layers)
        out = kept_logits(model, rows, input_ids=ids, use_cache=False, output_hidden_states=True)
        states = [out.hidden_states[layer + 1] for layer in self._parts.layers]
        logits = out.logits[0]
        return hidden_loss(states, wanted) + soft_loss(logits, dense) + hard_loss(logits, labels)

    def end_step(self) -> tuple[float, int]:
        """Returns the mean loss of the step that ended, and its tokens, over all processes; and begins the next."""
        mean = sum(self.step_losses) / max(len(self.step_losses), 1)
        losses = processes.gathered({rank(): mean})
        tokens = processes.gathered({rank(): float(self.step_tokens)})
        self.step_losses, self.step_tokens = [], 0
        return sum(losses.values()) / len(losses), int(sum(tokens.values()))


class OneGpuArguments(TrainingArguments):
    """Arguments of a process that trains on one GPU, also where it sees several: a batch is one sample."""

    @property
    def n_gpu(self) -> int:
        """One."""
        return 1


class HealCallback(TrainerCallback):
    """Keeps the history, measures when it is due, keeps the best state, and ends the training, also where `stop` is set."""

    def __init__(self, parts: HealParts, trainer: HealTrainer, stop: threading.Event, progress: Progress) -> None:
        self._parts, self._trainer, self._stop, self._progress = parts, trainer, stop, progress
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Runs after every optimizer step."""
        parts, history = self._parts, self._parts.history
        loss, tokens = self._trainer.end_step()
        history.losses.append(loss)
        history.tokens += tokens
        share = self._trainer.done = parts.training.share(state.global_step)
        stopped = bool(processes.broadcast(self._stop.is_set()))
        mark = math.floor(share * parts.heal.evaluations + 1e-9)
        last = history.evaluations[-1].mark if history.evaluations else 0
        if mark > last:  # also where a stop was asked for: no later step makes up for it
            better = history.add(parts.measure(self._trainer.model, state.global_step, mark))
            if better and rank() == 0:
                save_best(parts.work, written_tensors(self._trainer.model, parts.dtype))
            control.should_save = True
        history.finished = share >= 1 or history.evaluations_without_improvement() >= parts.heal.patience
        old = bool(processes.broadcast(time.monotonic() - self._saved > SAVE_SECONDS))
        control.should_save |= stopped or old or history.finished
        control.should_training_stop |= stopped or history.finished
        if control.should_save:
            history.seconds = parts.training.seconds
            if rank() == 0:  # before the checkpoint: a run that goes on from an older one forgets what is newer
                history.write(parts.work)
        self._progress.step(self._note(loss))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Runs after a checkpoint was written."""
        self._saved = time.monotonic()

    def _note(self, loss: float) -> str:
        history = self._parts.history
        assert history.start is not None
        now = (history.evaluations or [history.start])[-1].mean
        return f"loss {loss:.3g}, held-out KL {now:.4g}, {history.start.mean:.4g} at the start"


@contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """Makes the first Ctrl-C ask for a stop after the step that is under way; the second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

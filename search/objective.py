"""Measured harm: KL(dense || plan) in nats at the answer tokens of validation samples, teacher-forced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from moacompress.calibration.passes import output_logits, target_states
from moacompress.calibration.samples import Sample
from moacompress.errors import DataError, ModelError
from moacompress.plan import Plan

MAX_DENSE_BYTES = 2 * 2**30
"""Dense logits kept in memory; beyond them they are computed again whenever a plan is measured."""

Harm = Callable[[int], float]
"""Harm of one sample, by its number, in nats: mean over its answer tokens."""


class Measure(Protocol):
    """What a study needs of the model: plans go in, harms come out."""

    size: int

    def under(self, plan: Plan) -> Any:
        """Returns a context manager that yields the `Harm` of `plan`; the model is dense again when it ends."""
        ...


class Objective:
    """The real model under a plan, against itself dense.

    Args:
        model: a transformers causal LM, dense, in eval mode.
        samples: validation samples with answer tokens.

    Attributes:
        size: number of samples.

    Raises:
        DataError: there is no sample.
    """

    def __init__(self, model: Any, samples: Sequence[Sample]) -> None:
        if not samples:
            raise DataError("there are no validation samples to measure plans on; profile again")
        self.model, self.samples, self.size = model, list(samples), len(samples)
        self._dense: dict[int, torch.Tensor] = {}
        self._dense_bytes = 0

    @contextmanager
    def under(self, plan: Plan) -> Iterator[Harm]:
        """Puts the model under a plan for the block's length and yields the harm of single samples."""
        from moacompress import runtime

        attached = False

        def harm(number: int) -> float:
            nonlocal attached
            dense = self._dense.get(number)
            if dense is None:
                if attached:
                    runtime.detach(self.model)
                    attached = False
                dense = self._remember(number, answer_logits(self.model, self.samples[number]))
            if not attached:
                runtime.attach(self.model, plan)
                attached = True
            value = kl(dense, answer_logits(self.model, self.samples[number]))
            if not math.isfinite(value):
                raise ModelError(f"the logits of validation sample {number} are not finite; try --dtype float32")
            return value

        try:
            yield harm
        finally:
            if attached:
                runtime.detach(self.model)

    def harms(self, plan: Plan, numbers: Sequence[int] | None = None) -> npt.NDArray[np.float64]:
        """Returns the harm of every sample (or of those numbered), float64 [samples], nats."""
        with self.under(plan) as harm:
            return np.array([harm(number) for number in (range(self.size) if numbers is None else numbers)])

    def _remember(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        size = logits.numel() * logits.element_size()
        if self._dense_bytes + size <= MAX_DENSE_BYTES:
            self._dense[number] = logits
            self._dense_bytes += size
        return logits


def answer_logits(model: Any, sample: Sample) -> torch.Tensor:
    """Returns the logits that predict the answer tokens, float32 [answer tokens, vocabulary].

    Only those rows go through the language-model head.
    """
    rows = torch.from_numpy(np.flatnonzero(sample.answer_mask[1:])).to(model.device)
    ids = torch.from_numpy(np.ascontiguousarray(sample.input_ids, np.int64)).to(model.device)
    with torch.inference_mode():
        return output_logits(model, target_states(model, ids, rows)).float()


def kl(dense: torch.Tensor, other: torch.Tensor) -> float:
    """Returns KL(dense || other) in nats, mean over rows.

    Args:
        dense: logits [rows, vocabulary].
        other: logits of the same shape.
    """
    total = 0.0
    for p_row, q_row in zip(dense, other, strict=True):  # a row at a time: float64 of the whole would be large
        p, q = p_row.double().log_softmax(-1), q_row.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return max(total / len(dense), 0.0)

"""Measured KL: KL(dense || plan) in nats at the answer tokens of validation samples, teacher-forced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import answer_logits
from moacompress.core.errors import DataError, ModelError
from moacompress.core.ranks import rank, splits_model, work_shard
from moacompress.models.kl import MAX_DENSE_BYTES, kl_divergence
from moacompress.models.processes import broadcast, gathered
from moacompress.repair.projections import Weights, with_weights
from moacompress.rules.plan import Plan
from moacompress.search.measure.prefix import first_changed, record, resumed

SampleKl = Callable[[int], float]
"""KL of one sample, by its number, in nats: mean over its answer tokens."""


class Measure(Protocol):
    """What a study needs of the model: plans go in, KLs come out."""

    @property
    def size(self) -> int:
        """Number of samples."""
        ...

    def under(self, plan: Plan) -> Any:
        """Returns a context manager that yields the `SampleKl` of `plan`; the model is dense again when it ends."""
        ...


def own_weights(plan: Plan) -> Weights:
    """Returns no weights in place of the model's own."""
    return {}


class Objective:
    """The real model under a plan, against itself dense.

    Where the processes of a run have a model each, they share what is measured: each takes another sample, or another plan, and
    all are told of each number. They must ask for the same in the same order.

    Args:
        model: a transformers causal LM, dense, in eval mode.
        samples: validation samples with answer tokens.
        weights_of: returns the weights that the model has under a plan in place of its own, by the names of its parameters.

    Attributes:
        size: number of samples.
        order: their numbers as they are mostly asked for: processes measure ahead in it.

    Raises:
        DataError: there is no sample.
    """

    def __init__(
        self, model: Any, samples: Sequence[Sample], weights_of: Callable[[Plan], Weights] = own_weights
    ) -> None:
        if not samples:
            raise DataError("there are no validation samples to measure plans on; profile again")
        self.model, self.samples, self.size = model, list(samples), len(samples)
        self._weights_of = weights_of
        self.order: Sequence[int] = range(self.size)
        self._dense: dict[int, torch.Tensor] = {}

    @contextmanager
    def under(self, plan: Plan) -> Iterator[SampleKl]:
        """Puts the model under a plan for the block's length and yields the KL of single samples."""
        with ExitStack() as running:
            runs = False

            def measured(number: int) -> float:
                nonlocal runs
                if runs and number not in self._dense:
                    running.close()
                    runs = False
                dense = self._dense_logits(number)
                if not runs:
                    running.enter_context(self._running(plan))
                    runs = True
                return kl_divergence(dense, answer_logits(self.model, self.samples[number]))

            ahead: dict[int, float] = {}
            name = plan.key() if work_shard()[1] > 1 else ""

            def kl(number: int) -> float:
                if number not in ahead:
                    ahead.update(self._by_ranks(number, measured, name))
                return _finite(ahead.pop(number), number)

            yield kl

    def _by_ranks(self, number: int, measured: SampleKl, name: str) -> dict[int, float]:
        """Returns the KL of a sample under the named plan; with it those of the next ones, one per process with a model."""
        turn, ranks = work_shard()
        if ranks == 1:
            return {number: measured(number)}
        at = self.order.index(number)
        own = self.order[at : at + ranks][turn : turn + 1]
        return _gathered({each: measured(each) for each in own}, name)

    @contextmanager
    def _running(self, plan: Plan) -> Iterator[None]:
        """Puts the model under a plan, with its weights, for the block's length."""
        from moacompress import runtime

        with with_weights(self.model, self._weights_of(plan)):
            runtime.attach(self.model, plan)
            try:
                yield
            finally:
                runtime.detach(self.model)

    def kls(self, plan: Plan, numbers: Sequence[int] | None = None) -> npt.NDArray[np.float64]:
        """Returns the KL of every sample (or of those numbered), float64 [samples], nats."""
        with self.under(plan) as kl:
            return np.array([kl(number) for number in (range(self.size) if numbers is None else numbers)])

    def _dense_logits(self, number: int) -> torch.Tensor:
        """Returns the dense model's logits at a sample's answer; the model is under no plan."""
        if number in self._dense:
            return self._dense[number]
        logits = answer_logits(self.model, self.samples[number])
        if logits.nbytes + sum(kept.nbytes for kept in self._dense.values()) <= MAX_DENSE_BYTES:
            self._dense[number] = logits
        return logits


def _gathered(kls: dict[int, float], name: str) -> dict[int, float]:
    """Returns the KLs of all processes together; `name` is of the plans that they are of.

    Raises:
        ModelError: another process measured other plans.
    """
    found = gathered({rank(): (name, kls)})
    if any(theirs != name for theirs, _ in found.values()):
        raise ModelError(
            "the processes of the search came to different plans, as those on unlike processors, or with other versions of a "
            "library, can; start them on machines that are alike, or as workers of one search with --storage"
        )
    return {number: kl for _, part in found.values() for number, kl in part.items()}


def _finite(kl: float, number: int) -> float:
    if splits_model():
        kl = broadcast(kl)  # ranks go on alike, to the last bit
    if not math.isfinite(kl):
        raise ModelError(f"the logits of validation sample {number} are not finite; try --dtype float32")
    return kl


def kls_of_sample(
    model: Any,
    sample: Sample,
    plans: Mapping[int, Plan],
    dense: torch.Tensor | None,
    base: Plan,
    weights_of: Callable[[Plan], Weights] = own_weights,
) -> Iterator[tuple[int, float]]:
    """Yields the KL of every plan, by its number; leaves the model under the last one, with its own weights.

    The dense model's logits at the sample's answer are needed unless `base` is the full plan, which has them. Plans start from
    the first layer in which they differ from `base`; the weights of both must be the same in the layers before that.
    """
    from moacompress import runtime

    if not plans:
        return
    runtime.attach(model, base)
    with with_weights(model, weights_of(base)):
        prefix, logits = record(model, lambda: answer_logits(model, sample))
    for number, plan in plans.items():
        runtime.attach(model, plan)
        with with_weights(model, weights_of(plan)), resumed(model, prefix, first_changed(plan, base)):
            kl = kl_divergence(logits if dense is None else dense, answer_logits(model, sample))
        yield number, kl

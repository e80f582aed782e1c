"""Repair of a plan's weights: fitted on a profile's calibration samples, chosen and judged by measured KL on validation.

Of the validation samples every other one chooses among the settings, and the rest judge the choice. Weights are changed only
where both say that this lowers KL, the latter by a permutation test; otherwise the model keeps its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import answer_logits
from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats, spread_over
from moacompress.core.errors import DataError, ModelError
from moacompress.core.progress import SILENT, Progress
from moacompress.core.statistics import SIGNIFICANT, p_value, standard_error
from moacompress.models.kl import MAX_DENSE_BYTES, kl_divergence
from moacompress.models.source import SourceModel
from moacompress.repair.projections import Weights, repaired_weights, with_weights
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan

PENALTIES = (0.03, 0.1, 0.3)
"""Weights of the ridge that are tried, and no repair at all beside them. All rows count alike: on SmolLM2, with 0.1 and 4,000
tokens, giving half the weight to the rows of answers left a KL of 0.0170 nats where all alike left 0.0154, within the noise."""
TOKENS_PER_INPUT = 32
"""Calibration tokens for every input of an output projection: enough that the fit is not to their noise."""
VALIDATION_SAMPLES = 16
"""Validation samples that are measured on, at most."""


@dataclass(frozen=True)
class Repaired:
    """What a repair came to.

    Attributes:
        weights: of the parameters that it changed, in the checkpoint's dtype; empty where no repair lowered the KL.
        report: the `penalty`, None where nothing was changed; `harm` in nats per answer token, each of `before`, `after` and
            `change` with its `mean` and standard `error`, on samples that had no part in the choice, and the change that would
            have been where it was `not_enough`; changes with the `p` of a permutation test too; `tokens` and `samples` that
            were fitted to, `validation_samples` that judged, `seconds`. Of a plan that keeps everything as it is, `tokens` are
            0 and nothing was judged.
    """

    weights: Weights
    report: dict[str, Any] = field(default_factory=dict)


def repair(
    source: SourceModel,
    plan: Plan,
    samples: Sequence[Sample],
    validation: Sequence[Sample],
    *,
    penalties: Sequence[float] = PENALTIES,
    progress: Progress = SILENT,
) -> Repaired:
    """Fits the output projections of all layers to what a plan leaves of their attention, where a test says that KL is lower.

    The dense model has its own weights again afterwards; the repaired ones are rounded to its dtype. Of at least two
    validation samples every other one chooses among the penalties and no repair, and the rest judge.

    Raises:
        DataError: too few samples.
        ModelError: logits that are not finite, or a model whose output projections cannot be found.
    """
    if not samples:
        raise DataError("there are no calibration samples to repair with; profile again")
    if len(validation) < 2:
        raise DataError(
            f"a repair is chosen on one validation sample and judged on another; there are {len(validation)}; profile with "
            "more --validation-samples"
        )
    begun = time.perf_counter()
    tokens = sum(len(sample.input_ids) for sample in samples)
    counts = {"tokens": tokens, "samples": len(samples)}
    if not plan.shares and all(rule.is_full for row in plan.rules for rule in row):
        return Repaired({}, {"penalty": None, "tokens": 0, "samples": 0, "seconds": 0.0})
    kls = _RepairedKl(source.model, plan, validation)
    choosing, judging = kls.numbers[::2], kls.numbers[1::2]
    before = kls.under({})
    found = repaired_weights(source.model, plan, samples, penalties, getattr(torch, plan.model.dtype), progress)
    progress.start("measuring repairs", len(found))
    chosen: tuple[float | None, Weights] = (None, {})
    best = before[choosing].mean()
    for penalty, weights in zip(penalties, found, strict=True):
        kl = kls.under(weights, choosing)[choosing].mean()
        progress.step(f"{kl:.3g} nats, {before[choosing].mean():.3g} without")
        if kl < best:
            chosen, best = (penalty, weights), kl
    after, not_enough = before, {}
    if chosen[0] is not None:
        tried = kls.under(chosen[1], judging)
        change = _change(tried[judging], before[judging])
        if change["mean"] < 0 and change["p"] < SIGNIFICANT:
            after = tried
        else:
            chosen, not_enough = (None, {}), {"not_enough": change}
    progress.done()
    report = {
        "penalty": chosen[0],
        "harm": {
            "before": _mean(before[judging]),
            "after": _mean(after[judging]),
            "change": _change(after[judging], before[judging]),
            **not_enough,
        },
        **counts,
        "validation_samples": len(judging),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    return Repaired(chosen[1], report)


def repair_by_profile(source: SourceModel, plan: Plan, profile: Profile, progress: Progress = SILENT) -> Repaired:
    """Repairs with the samples of a profile: `TOKENS_PER_INPUT` and `VALIDATION_SAMPLES` of them, spread over its kinds.

    `report["profile"]` is the profile's fingerprint.

    Raises:
        ModelError: the profile is of another model.
        PlanError: the plan is.
        ArtefactError: the profile's calibration samples cannot be read.
        DataError: too few samples.
    """
    profile.check_model(source, "repair")
    plan.check_model(source.shape, weights=True)
    samples = repair_samples(profile, plan.model)
    done = repair(source, plan, samples, spread_over(profile.validation, VALIDATION_SAMPLES), progress=progress)
    return Repaired(done.weights, {**done.report, "profile": profile.fingerprint})


def repair_samples(profile: Profile, shape: ModelShape) -> list[Sample]:
    """Returns the calibration samples that output projections are fitted to: `TOKENS_PER_INPUT`, spread over all kinds.

    They are as few as have so many tokens; all where there are not so many.
    """
    samples, wanted = profile.calibration_samples(), TOKENS_PER_INPUT * shape.heads * shape.head_dim
    for count in range(1, len(samples)):
        some = spread_over(samples, count)
        if sum(len(sample.input_ids) for sample in some) >= wanted:
            return some
    return list(samples)


def _mean(kls: Floats) -> dict[str, Any]:
    return {"mean": float(kls.mean()), "error": standard_error(kls.tolist())}


def _change(after: Floats, before: Floats) -> dict[str, Any]:
    return {**_mean(after - before), "p": p_value(after.tolist(), before.tolist())}


class _RepairedKl:
    """Measured KL of a plan with other weights, against the model's own dense.

    Attributes:
        numbers: of the samples that are measured on, those whose dense logits there is memory for.
    """

    def __init__(self, model: Any, plan: Plan, samples: Sequence[Sample]) -> None:
        self._model, self._plan, self._samples = model, plan, samples
        # kept from before any weight is changed: they cannot be computed again while one is
        self._dense: list[torch.Tensor] = []
        sizes = [
            int(sample.answer_mask.sum()) * int(model.config.get_text_config().vocab_size) * 4 for sample in samples
        ]
        fitting = sum(total <= MAX_DENSE_BYTES for total in accumulate(sizes))
        self.numbers = list(range(max(2, fitting)))
        for number in self.numbers:
            self._dense.append(answer_logits(model, samples[number]))

    def under(self, weights: Mapping[str, torch.Tensor], numbers: Sequence[int] | None = None) -> Floats:
        """Returns the KL of every sample under the plan with these weights, nats; NaN for samples that were not asked for."""
        from moacompress import runtime

        kls = np.full(len(self.numbers), np.nan)
        with with_weights(self._model, weights):
            runtime.attach(self._model, self._plan)
            try:
                for number in self.numbers if numbers is None else numbers:
                    kls[number] = kl_divergence(self._dense[number], answer_logits(self._model, self._samples[number]))
                    if not np.isfinite(kls[number]):
                        raise ModelError(
                            f"the logits of validation sample {number} are not finite; try --dtype float32"
                        )
            finally:
                runtime.detach(self._model)
        return kls

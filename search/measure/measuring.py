"""Measured KL of many plans on many samples, each computed once in the life of the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moacompress.calibration.data.samples import Sample, fingerprint_ordered
from moacompress.core.arrays import Floats
from moacompress.core.errors import ModelError
from moacompress.core.files import fingerprint
from moacompress.core.progress import Progress
from moacompress.core.records import Records, named_numbers
from moacompress.models.source import SourceModel
from moacompress.repair.projections import Weights
from moacompress.rules.plan import Plan
from moacompress.search.measure.objective import kls_of_sample, own_weights


def measured_kls(
    model: SourceModel,
    samples: Sequence[Sample],
    plans: Sequence[Plan],
    path: Path,
    progress: Progress,
    weights_of: Callable[[Plan], Weights] = own_weights,
    of: str = "",
) -> Floats:
    """Returns the KL of every plan on every sample, float64 [plans, samples], nats per answer token.

    Each sample is run whole once; a plan is run from the first layer that it changes. What the records at `path` hold is not
    measured again; `of` tells measurements under other weights apart there.

    Raises:
        ModelError: logits that are not finite.
        ArtefactError: the records cannot be read or written.
    """
    from moacompress import runtime

    records = Records(path, named_numbers)
    marks = [fingerprint_ordered([sample]) for sample in samples]
    dtype = model.computes_in
    keys = [
        [fingerprint([plan.model.weights_fingerprint, dtype, plan.key(), mark, *filter(None, [of])]) for mark in marks]
        for plan in plans
    ]
    missing = [
        [row for row, key in enumerate(column) if records.get(key) is None] for column in zip(*keys, strict=True)
    ]
    progress.start("measuring", sum(map(len, missing)))
    try:
        for number, rows in enumerate(missing):
            wanted = {row: plans[row] for row in rows}
            full = Plan.full(model.shape)
            for row, kl in kls_of_sample(model.model, samples[number], wanted, None, full, weights_of):
                if not math.isfinite(kl):
                    raise ModelError(f"the logits of held-out sample {number} are not finite; try --dtype float32")
                key = keys[row][number]
                records.append({"key": key, "numbers": {"harm": kl}, "plan": plans[row].key(), "sample": number})
                progress.step(f"sample {number + 1} of {len(samples)}: {kl:.2g} nats")
    finally:
        runtime.detach(model.model)
    progress.done()
    return np.array([[(records.get(key) or {})["harm"] for key in row] for row in keys])

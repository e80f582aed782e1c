"""What a model loses by rounded weights alone, on the validation samples that plans are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import answer_logits
from moacompress.core.artefact_names import ROUNDING_FILE
from moacompress.core.errors import ArtefactError
from moacompress.core.files import read_json, write_json
from moacompress.core.progress import Progress
from moacompress.core.ranks import rank
from moacompress.core.statistics import standard_error
from moacompress.models.kl import kl_divergence
from moacompress.models.processes import broadcast, shared
from moacompress.models.source import SourceModel
from moacompress.models.weight_rounding import ROUNDED
from moacompress.recipe import Recipe
from moacompress.runtime.ready_model import load_for


def measure_rounding(
    folder: Path,
    source: SourceModel,
    recipe: Recipe,
    samples: list[Sample],
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Writes KL(model || model with rounded weights) beside a profile, where its recipe rounds weights and it is not there.

    The model is loaded a second time, with the weights as they come, and compared on the validation samples. Under `torchrun`
    every process must call it: they share the samples, and the first one writes.
    """
    if recipe.weights not in ROUNDED:
        return
    if broadcast(None if rank() else rounding_of(folder, source.shape.weights_fingerprint)) is not None:
        return
    plain = recipe.model_copy(update={"weights": "keep", "head_weights": None})
    before = load_for(plain, source.source, trust_remote_code=trust_remote_code)
    progress.start("measuring the rounded weights", len(samples))
    of_samples: dict[int, float] = {}

    def measure(index: int) -> float:
        return kl_divergence(*(answer_logits(each.model, samples[index]) for each in (before, source)))

    def keep(index: int, kl: float) -> None:
        of_samples[index] = kl
        progress.step()

    shared(range(len(samples)), measure, keep)
    progress.done()
    if rank():
        return
    write_rounding(
        folder, recipe, source.shape.weights_fingerprint, [of_samples[index] for index in range(len(samples))]
    )


def write_rounding(folder: Path, recipe: Recipe, weights_fingerprint: str, kls: Sequence[float]) -> None:
    """Writes what rounded weights lose on every validation sample, and the mean, beside a profile."""
    write_json(
        folder / ROUNDING_FILE,
        {
            "weights": recipe.weights,
            "head_weights": recipe.head_weights,
            "kl": float(np.mean(kls)) if len(kls) else None,
            "standard_error": standard_error(kls),
            "samples": len(kls),
            "of_samples": list(kls),
            "weights_fingerprint": weights_fingerprint,
        },
    )


def rounding_of(folder: Path, weights_fingerprint: str) -> dict[str, Any] | None:
    """Returns what `measure_rounding` found of the rounded model with this fingerprint, or None where it is not there."""
    file = folder / ROUNDING_FILE
    try:
        found = read_json(file, "measurement of the rounded weights") if file.is_file() else None
    except ArtefactError:  # it is measured again
        return None
    if not isinstance(found, dict) or found.get("weights_fingerprint") != weights_fingerprint:
        return None
    return found if isinstance(found.get("kl"), float) or found.get("samples") == 0 else None

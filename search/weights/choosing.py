"""Choosing weights: they are priced on calibration samples, a knapsack proposes, and measured KL decides.

Prices of weights and those of KV heads are predictions of different kinds, and either may be off by a factor. So the joint
problem is solved with the prices of weights as they are, smaller and larger; beside that, all layers have one format. Of each
the KV heads get the best predicted plan in what its weights leave, and the pair of least measured KL is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.store import Profile
from moacompress.calibration.profile.weight_influence import block_error, weight_influence
from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import InfeasibleBudgetError, ModelError
from moacompress.core.files import fingerprint
from moacompress.core.progress import Progress
from moacompress.core.statistics import standard_error
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, dequantized
from moacompress.models.source import SourceModel
from moacompress.models.weight_choices import CHOICES
from moacompress.models.weight_rounding import ROUNDED, RoundedLayers
from moacompress.rules.budget import Budget, memory_budgets
from moacompress.rules.plan import Plan
from moacompress.rules.planned_weights import count_formats
from moacompress.search.deadline import Deadline
from moacompress.search.measure.objective import Objective
from moacompress.search.measure.plan_evaluator import PlanEvaluator
from moacompress.search.measure.study_storage import StudyStorage
from moacompress.search.predict.around import spread_samples
from moacompress.search.search_request import SearchRequest
from moacompress.search.weights.weight_choice import WeightChoice, joint_choice

SAMPLES = 8
"""Calibration samples that weights are priced on."""
DRAWS = 2
"""Random cotangents of each."""
SCALES = (1.0, 0.25, 4.0)
"""What prices of weights are multiplied by, beside those of KV heads."""


def choose_weights(
    request: SearchRequest,
    source: SourceModel,
    layers: RoundedLayers,
    objective: Objective,
    storage: StudyStorage,
    deadline: Deadline,
    progress: Progress,
) -> tuple[SearchRequest, dict[str, str]]:
    """Returns the request with chosen weights and the limits that they leave, and the formats of the layers.

    Args:
        request: its weights are to be chosen, and the smallest until here.
        source: the model.
        layers: its rounded layers.
        objective: the model on validation samples, with its own weights.
        storage: keeps what is measured, for a search that is resumed.
        deadline: checked before every measurement.
        progress: told of every measurement.

    Raises:
        TimeUp: the time is up before all is measured.
        ModelError: a price is not finite.
    """
    choice = request.weights
    assert choice is not None
    plain = PlanEvaluator.of(storage, objective, request.recipe.seed, deadline)
    surrogate = plain.calibrated(request, progress)
    choice = replace(choice, prices=weight_prices(request, choice, source, layers, storage, deadline, progress))
    candidates = candidate_weights(request, choice, surrogate.costs())
    progress.start("choosing weights", len(candidates) + 1)
    compared: list[dict[str, Any]] = []
    best: tuple[float, WeightChoice] | None = None

    def measured(plan: Plan, formats: Mapping[str, str]) -> list[float]:
        return measured_with(plain, objective, layers, plan, formats)

    for name, chosen in candidates.items():
        one = request.with_weights(choice.taking(chosen))
        plan = one.plan(surrogate, request.parameters.neutral)
        kl = float(np.mean(measured(plan, choice.choices.formats(chosen))))
        compared.append(_row(name, one, plan, one.predicted(surrogate, plan), kl))
        progress.step(f"{name}: {kl:.3g} nats")
        if best is None or kl < best[0]:
            best = kl, choice.taking(chosen)
    assert best is not None
    taken = best[1]
    kls = measured(Plan.full(request.profile.shape), taken.formats)
    progress.step("weights alone")
    progress.done()
    alone = {
        "weights": request.recipe.weights,
        "head_weights": request.recipe.head_weights,
        "kl": float(np.mean(kls)),
        "standard_error": standard_error(kls),
        "samples": len(kls),
    }
    taken = replace(taken, compared=tuple(compared), alone=alone)
    return request.with_weights(taken), taken.formats


def candidate_weights(request: SearchRequest, choice: WeightChoice, kv_costs: Floats) -> dict[str, Ints]:
    """Returns the choices that are measured, by name: those of the joint problem, and one format for all where that fits.

    Args:
        request: its budgets.
        choice: with prices.
        kv_costs: as `joint_choice` takes them.
    """
    found: dict[str, Ints] = {}
    for scale in SCALES:
        name = "joint" if scale == 1 else f"joint, prices of weights times {scale:g}"
        found[name] = joint_choice(request, choice, kv_costs, scale)
    for pick, kind in enumerate(CHOICES):
        found[f"all {kind}"] = np.full(len(choice.choices.names), pick, np.int64)
    kept: dict[str, Ints] = {}
    for name, chosen in found.items():
        if any(np.array_equal(chosen, other) for other in kept.values()):
            continue
        try:
            request.with_weights(choice.taking(chosen))
        except InfeasibleBudgetError:  # one format for all need not fit
            continue
        kept[name] = chosen
    return kept


def weight_prices(
    request: SearchRequest,
    choice: WeightChoice,
    source: SourceModel,
    layers: RoundedLayers,
    storage: StudyStorage,
    deadline: Deadline,
    progress: Progress,
) -> Floats:
    """Returns the predicted KL of every choice of every layer, nats, `[layers, choices]`: a mean over calibration samples.

    Arguments are those of `choose_weights`. Errors in blocks are made once; what a sample gives is kept.

    Raises:
        TimeUp, ModelError: as `choose_weights`.
    """
    names, kinds = choice.choices.names, CHOICES[1:]
    samples = priced_samples(request.profile)
    kept = [storage.recall(f"weight-prices:{index}") for index in range(len(samples))]
    missing = [(index, sample) for index, sample in enumerate(samples) if kept[index] is None]
    progress.start("pricing weights", len(missing))
    priced = layer_prices(source, names, layers, missing, request.recipe.seed)
    for index, _ in missing:
        deadline.check()
        found = next(priced)
        if not np.isfinite(found).all():
            raise ModelError(
                f"what rounded weights do is not finite on calibration sample {index}; try --dtype float32"
            )
        kept[index] = found.ravel().tolist()
        storage.claims.keep(f"weight-prices:{index}", kept[index])
        progress.step()
    progress.done()
    prices = np.mean(np.array(kept, np.float64), axis=0).reshape(len(names), len(kinds))
    return np.concatenate([np.zeros((len(names), 1)), prices], axis=1)


def priced_samples(profile: Profile) -> list[Sample]:
    """Returns the calibration samples that weights are priced on: answers of the shortest length, evenly spread."""
    samples = profile.calibration_samples()
    samples = [sample for sample in samples if sample.kind == "answer"] or samples
    shortest = min(sample.length for sample in samples)
    return spread_samples([sample for sample in samples if sample.length == shortest], SAMPLES)


def layer_prices(
    source: SourceModel,
    names: Sequence[str],
    layers: RoundedLayers,
    samples: Sequence[tuple[int, Sample]],
    seed: int,
) -> Iterator[Floats]:
    """Yields for every sample what each layer is predicted to cost in each format, nats, `[layers, formats]`.

    Args:
        source: the model.
        names: of linear layers.
        layers: its rounded layers.
        samples: what the costs are predicted on, by number, which with the seed decides the cotangents.
        seed: the run's seed.
    """
    errors: dict[str, torch.Tensor] = {}
    for index, sample in samples:
        errors = errors or {name: _errors(source, layers, name) for name in names}
        yield weight_influence(source.model, source.shape, errors, sample, DRAWS, seed, index)


def _errors(source: SourceModel, layers: RoundedLayers, name: str) -> torch.Tensor:
    weight = source.model.get_parameter(f"{name}.weight").detach()
    rounded = [dequantized(layers.blocks(name, kind), WEIGHT_TYPES[ROUNDED[kind]]) for kind in CHOICES[1:]]
    return torch.stack([block_error(weight, numbers) for numbers in rounded])


def measured_with(
    evaluator: PlanEvaluator, objective: Objective, layers: RoundedLayers, plan: Plan, formats: Mapping[str, str]
) -> list[float]:
    """Returns the KL of a plan with rounded weights on every validation sample, measured at most once.

    Args:
        evaluator: of the search.
        objective: the model with its own weights.
        layers: its rounded layers.
        plan: the plan.
        formats: of layers.
    """

    def rounding() -> AbstractContextManager[None]:
        return layers.in_place(formats)

    with_weights = replace(evaluator, measure=objective.with_rounding(rounding))
    return with_weights.kls(f"weights-{fingerprint(dict(formats))}", plan, evaluator.order)


def _row(name: str, request: SearchRequest, plan: Plan, predicted: float | None, kl: float) -> dict[str, Any]:
    assert request.weights is not None
    lengths = sorted({budget.length or 0 for budget in memory_budgets(map(Budget.parse, request.asked))})
    return {
        "name": name,
        "formats": count_formats(request.weights.formats.values()),
        "weight_bytes": request.weights.bytes.bytes,
        "kv_bytes": {str(n): plan.kv_bytes(n) for n in lengths},
        "predicted": predicted,
        "kl": kl,
    }

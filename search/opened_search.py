"""Opening a search: its study is owned, the model loaded, and a first plan written, before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moacompress.core.artefact_names import rounds_folder, study_journal
from moacompress.core.progress import Progress
from moacompress.models.source import SourceModel
from moacompress.search.measure.deadline import Deadline
from moacompress.search.measure.objective import Measure, Objective
from moacompress.search.measure.plan_evaluator import PlanEvaluator
from moacompress.search.measure.study_storage import StudyStorage, own_study, quiet_optuna
from moacompress.search.predict.around import Around, ProfileAround, spread_samples
from moacompress.search.problem.search_request import SearchRequest
from moacompress.search.result.found_plan import write_first
from moacompress.search.search_context import SearchContext

MOVE_SAMPLES = 12
"""Calibration samples on which single moves are measured."""


@contextmanager
def opened(
    request: SearchRequest,
    out: Path | None,
    from_scratch: bool,
    source: SourceModel,
    progress: Progress,
    deadline: Deadline,
) -> Iterator[SearchContext]:
    """Makes this process the lock holder of a search's study as long as the block runs.

    Args:
        request: what is asked for.
        out: where the plan will be; owned by this process.
        from_scratch: forget what the study holds.
        source: the profile's model.
        progress: told of every measurement.
        deadline: when to stop.

    Yields:
        What the steps work with.

    Raises:
        TimeUp: the time is up, and copies are not repaired yet.
        ArtefactError: the storage cannot be used, or another process is searching there.
    """
    profile, name = request.profile, f"moacompress-{request.key}"
    storage = request.recipe.search.storage
    if storage is None and out is not None:
        storage = str(study_journal(out))
    with quiet_optuna(), own_study(storage, name, from_scratch=from_scratch):
        if out is not None:
            write_first(request, out)
        request = request.repaired(source, deadline.within(progress))
        study_storage = StudyStorage(
            storage,
            name,
            profile.fingerprint,
            request.parameters.distributions(),
            request.parameters.neutral,
            request.recipe.seed,
            [*map(request.parameters.within, request.starts), *request.parameters.starts],
        )
        measure = request.as_healed(Objective(source.model, profile.validation, request.weights_of))
        evaluator = PlanEvaluator.of(study_storage, measure, request.recipe.seed, deadline)
        around, trainer = _improvers(request, source, out, deadline)
        yield SearchContext(
            request=request,
            storage=storage,
            name=name,
            evaluator=evaluator,
            surrogate=request.surrogate,
            measured_baselines={},
            around=around,
            trainer=trainer,
            out=out,
            deadline=deadline,
            progress=progress,
        )


def _improvers(
    request: SearchRequest, source: SourceModel, out: Path | None, deadline: Deadline
) -> tuple[Around, Measure] | tuple[None, None]:
    """Returns what profiles around plans and what measures moves, both on calibration samples, where either is wanted."""
    settings = request.recipe.search
    if not settings.rounds and not settings.moves:
        return None, None
    samples = request.profile.calibration_samples()
    folder = None if out is None else rounds_folder(out)
    chosen = spread_samples(samples, settings.round_samples)
    around = ProfileAround(request.profile, request.recipe, source, chosen, folder, deadline)
    answers = [sample for sample in samples if sample.kind == "answer"] or samples
    return around, request.as_healed(Objective(source.model, spread_samples(answers, MOVE_SAMPLES), request.weights_of))

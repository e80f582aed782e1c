"""What a profile is asked for: its rules, its fingerprint before any sample is made, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moacompress.calibration.data import sample_sources
from moacompress.calibration.gates import gate_samples
from moacompress.calibration.profile.manifest import VERSION
from moacompress.core.artefact_names import CALIBRATION_FILE, GATES_FILE, VALIDATION_FILE
from moacompress.core.errors import DataError
from moacompress.core.files import digest_files, fingerprint
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.recipe_sections import INFLUENCE, file_name
from moacompress.rules.candidates import candidate_rules, gated_rules
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import SINKS, Rule


def rules_on_offer(recipe: Recipe) -> tuple[Rule, ...]:
    """Returns the rules that a profile is of; some select where gates are trained."""
    bounds = max(recipe.calibration.lengths), SINKS, recipe.profile.min_window
    return candidate_rules(*bounds) + (gated_rules(*bounds) if recipe.profile.gates else ())


def data_recipe(recipe: Recipe, rules: Sequence[Rule]) -> Recipe:
    """Returns the recipe that samples are made by: some data is left for gates where any of the rules selects."""
    gates = recipe.profile.model_copy(update={"gates": any(rule.selects for rule in rules)})
    return recipe.model_copy(update={"profile": gates})


def request_fingerprint(
    shape: ModelShape,
    rules: Sequence[Rule],
    recipe: Recipe,
    files: dict[str, str],
    computes_in: str | None = None,
) -> str:
    """Returns a hash of all that decides a profile's numbers and is known before its samples are made.

    Choices that only matter later (estimator, search, evaluation) are not in it, nor is which statistics are recorded.
    `files` are `file_digests` of the recipe. `computes_in` is a dtype, by default the model's own.
    """
    other = computes_in not in (None, shape.dtype)
    trains = any(rule.selects for rule in rules)
    return fingerprint(
        {
            "version": VERSION,
            "model": shape.to_dict(),
            "rules": [rule.to_list() for rule in rules],
            "min_window": recipe.profile.min_window,
            "draws": recipe.profile.draws,
            "seed": recipe.seed,
            "calibration": recipe.calibration.hashed(),
            "files": files,
            **({"computes_in": computes_in} if other else {}),
            **({} if recipe.profile.centres else {"centres": False}),
            **({"gate_samples": recipe.profile.gate_samples} if trains else {}),
            **({"scorer": recipe.profile.scorer} if trains and recipe.profile.scorer != INFLUENCE else {}),
        }
    )


def file_digests(recipe: Recipe) -> dict[str, str]:
    """Returns the digest of every local file or folder that samples are made of, by its name; of several alike all."""
    named = [*(source.path for source in recipe.calibration.sources), recipe.calibration.text]
    found: dict[str, dict[str, None]] = {}
    for path in named:
        if path:
            found.setdefault(str(file_name(path)), {})[digest_files(Path(path))] = None
    return {name: " ".join(digests) for name, digests in found.items()}


def check_lengths(context: int, recipe: Recipe) -> None:
    """Refuses lengths that cannot be profiled by a model with a context of so many tokens, 0 if it has no limit.

    Raises:
        DataError: beyond the model's context, or so short that no rule would leave anything out.
    """
    shortest, longest = min(recipe.calibration.lengths), max(recipe.calibration.lengths)
    if context and longest > context:
        raise DataError(
            f"length {longest:,} is beyond the model's context of {context:,} tokens; ask for lengths up to that"
        )
    needed = max(SINKS) + recipe.profile.min_window
    if shortest <= needed:
        raise DataError(
            f"length {shortest:,} is too short to profile: with a sink of {max(SINKS)} and a window of "
            f"{recipe.profile.min_window} tokens nothing would be left out; ask for lengths above {needed}"
        )


def check_samples(source: SourceModel, recipe: Recipe, out: Path | None = None) -> None:
    """Refuses samples that cannot be made, before anything is written: drafts are made of all that are not in `out` yet.

    The model does not run.

    Raises:
        DataError: data that no samples can be made of, or lengths that cannot be profiled.
    """
    check_lengths(source.context, recipe)
    if recipe.profile.gates and (out is None or not (out / GATES_FILE).exists()):
        gate_samples.gate_drafts(source, recipe)
    if out is None or not (out / CALIBRATION_FILE).exists():
        sample_sources.make_drafts(source, recipe, "calibration")
    if out is None or not (out / VALIDATION_FILE).exists():
        sample_sources.make_drafts(source, recipe, "validation")

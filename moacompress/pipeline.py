"""A whole run: profile, search, export, evaluate, report. Each step leaves one artefact; the same command resumes a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moacompress.calibration.profile.folder import clear_profile
from moacompress.calibration.profile.manifest import is_profile
from moacompress.core.artefact_names import (
    BENCH_FILE,
    DEMO_FILE,
    EVALUATION_FILE,
    MANIFEST_FILE,
    MODEL_FOLDER,
    PLAN_FILE,
    PROFILE_FOLDER,
    RECIPE_FILE,
    REPORT_FILE,
    SECONDS_FILE,
    SUMMARY_FILE,
    of_compress,
    of_demo,
)
from moacompress.core.errors import ArtefactError, MoaCompressError, RecipeError, one_line
from moacompress.core.files import holds_something, is_within, read_json, remove, sweep_files, sweep_folders, write_json
from moacompress.core.lock_holders import own_file, own_folder
from moacompress.core.place import check_writable, no_empty_folder
from moacompress.core.progress import Progress
from moacompress.core.shown import ShownDict
from moacompress.core.version import own_version
from moacompress.estimate.estimate import Estimate
from moacompress.evaluation.tasks.own_rows import answered_sources
from moacompress.exporter.card import state_measured
from moacompress.exporter.exporting import check_reusable, export, exported_plan, unrepaired
from moacompress.exporter.fresh import GREEDY
from moacompress.models.placement import checked_placement, input_device
from moacompress.models.skeleton import is_described
from moacompress.models.source import is_compressed
from moacompress.models.stored_plan import find_running_plan
from moacompress.models.weight_bytes import checkpoint_weight_bytes
from moacompress.recipe import Recipe, shared_name
from moacompress.rules.plan import Plan
from moacompress.run_checks import check_recipe, check_with_model, check_with_shape
from moacompress.run_counts import RunCounts, count_run, read_counts
from moacompress.run_estimate import COMPARED, asked_length, estimate_run, measured_length
from moacompress.runtime.compat.alternates import returned_cache
from moacompress.runtime.ready_model import load_for
from moacompress.search.baselines.measured import check_baselines
from moacompress.search.plan_sets import find_asked

if TYPE_CHECKING:
    from moacompress.models.source import SourceModel
    from moacompress.search.result.search_result import SearchResult

logger = logging.getLogger(__name__)

STAGES = ("load", "profile", "search", "export", "eval", "report")
"""Of a run, as the progress numbers them."""
Result = TypeVar("Result")


class Summary(ShownDict):
    """What a run came to, as in `summary.json`."""


def compress(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Profiles, searches, exports and evaluates; steps that are done already are reused.

    Args:
        recipe: names the model, and the budget or the loss; the rest has defaults.
        out: the folder to fill with `profile/ plan.json model/ eval.json summary.json report.html`.
        overwrite: start from scratch: all that a run left in `out` is removed, and nothing else.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.
        progress: is told of the steps.

    Returns:
        The summary, as in `summary.json`; a notebook shows it as the command does.

    Raises:
        RecipeError: no model in the recipe, or neither a budget nor a loss.
        ArtefactError: `out` holds another run, or another process is filling it.
        MoaCompressError: from any of the steps.
    """
    if recipe.model is None:
        raise RecipeError("no model given; name one as MODEL or as `model:` in the recipe")
    if not recipe.budget and recipe.max_loss is None:
        raise RecipeError(
            "no budget given; write --budget 25%, --budget memory=6GiB@8k or `budget: 25%` in the recipe, or --max-loss 1% to "
            "have it found"
        )
    out = Path(out)
    check_writable(out)
    check_recipe(recipe)
    with no_empty_folder(out), own_folder(out):
        return fill(recipe, out, progress or Progress(), from_scratch=overwrite, trust_remote_code=trust_remote_code)


def estimate(
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Estimate | RunCounts:
    """Estimates what `compress` would take, after the same checks, with the same arguments; nothing is written.

    Of a folder that has a config and no weights, what can be counted is counted, and nothing is timed. Without `out` no folder
    is looked at.

    Raises:
        RecipeError: no model in the recipe.
        MoaCompressError: as `compress`, where it would fail before the first step.
    """
    if recipe.model is None:
        raise RecipeError("no model given; name one as MODEL or as `model:` in the recipe")
    kept = None
    if out is not None:
        check_writable(Path(out))
        _check_place(Path(out), recipe, overwrite)
        kept = None if overwrite else Path(out) / PROFILE_FOLDER
    check_recipe(recipe)
    if is_described(recipe.model):
        counts = read_counts(recipe.model, trust_remote_code)
        check_with_shape(recipe, counts.shape, counts.context)
        return count_run(recipe, counts)
    source = load_for(recipe, recipe.model, trust_remote_code=trust_remote_code)
    check_with_model(recipe, source, kept)
    return estimate_run(recipe, source, progress)


def fill(
    recipe: Recipe, out: Path, progress: Progress, from_scratch: bool = False, *, trust_remote_code: bool = False
) -> Summary:
    """Does what `compress` does, in a folder that this process owns.

    `from_scratch` removes all that a run left there, and does not resume a study in the recipe's own storage either.

    Raises:
        ArtefactError: `out` holds another run.
        MoaCompressError: from any of the steps.
    """
    from moacompress.evaluation.runner import evaluate
    from moacompress.report.evaluation_tables import headline, kept_rows

    progress.plan(dict.fromkeys(STAGES))
    found, clock = _produce(recipe, out, progress, from_scratch, trust_remote_code)
    plan: Plan = found.plan
    evaluation = recipe.evaluation
    scores = clock.run(
        "eval",
        lambda: evaluate(
            out / MODEL_FOLDER,
            against=COMPARED,
            dense=recipe.model if plan.shares else None,
            tasks=evaluation.tasks,
            sources=answered_sources(recipe.calibration.sources),
            lengths=evaluation.lengths,
            prompts=evaluation.prompts,
            text=recipe.calibration.text,
            allow_overlap=True,  # the run's own text, dealt to pools; what repeats in it is marked
            seed=recipe.seed,
            device=recipe.device,
            out=out / EVALUATION_FILE,
            trust_remote_code=trust_remote_code,
            progress=progress,
        ),
    )
    length, measured_at = asked_length(recipe), measured_length(recipe)
    measured = clock.run(
        "eval",
        lambda: measured_kv_bytes(out / MODEL_FOLDER, measured_at, recipe.device, trust_remote_code=trust_remote_code),
    )
    fields = {
        "model": shared_name(plan.provenance["source"]),
        "plan": plan.key(),
        "budget": list(plan.budget["asked"]),
        **({} if recipe.max_loss is None else {"max_loss": recipe.max_loss}),
        "reference_length": length,
        "kv_bytes": {
            "dense": plan.model.dense_kv_bytes(length),
            "planned": plan.kv_bytes(length),
            "measured": measured if measured_at == length else None,
            "measured_at": {"length": measured_at, "planned": plan.kv_bytes(measured_at), "measured": measured},
        },
        "kv_share": plan.kv_share(length),
        "dtype": plan.model.dtype,
        "weights": checkpoint_weight_bytes(out / MODEL_FOLDER),
        **({} if (memory := plan.budget.get("memory")) is None else {"memory": memory}),
        **({} if (rounding := plan.quality.get("rounded_weights")) is None else {"rounded_weights": rounding}),
        "seconds": clock.seconds,
        "kept": kept_rows(scores),
        "not_measured": scores["not_measured"],
        "quality": quality_table(scores),
        "harm": plan.quality.get("measured_harm", {}),
        "best_baseline": plan.quality.get("best_baseline"),
        "measured_plans": found.measured_plans,
        **({} if found.classes is None else {"classes": found.classes}),
        "versions": {"moacompress": own_version()}
        | {name: version(name) for name in ("torch", "transformers", "optuna")},
    }
    write_json(out / SUMMARY_FILE, fields)
    progress.stage("report")
    state_measured(out / MODEL_FOLDER, headline(scores))
    _write_page(out)
    return Summary(fields)


def _write_page(out: Path) -> None:
    """Writes the page of a run; without the libraries that draw it one line says how to get it."""
    from moacompress.report.page.findings import Findings
    from moacompress.report.page.report_page import write_page

    try:
        write_page(Findings.load(find_running_plan(out)), out / REPORT_FILE)
    except (MoaCompressError, LookupError, TypeError, ValueError) as error:  # a page must not cost a run that is done
        logger.warning("no %s: %s", REPORT_FILE, one_line(error))


def _begin(recipe: Recipe, out: Path, from_scratch: bool, trust_remote_code: bool) -> SourceModel:
    """Makes `out` this run's folder once nothing is left that can be wrong with the request, and returns the model.

    Raises:
        ArtefactError: `out` holds another run, or something that no run left.
        MoaCompressError: from the checks.
    """
    assert recipe.model is not None
    _check_place(out, recipe, from_scratch)
    source = load_for(recipe, recipe.model, trust_remote_code=trust_remote_code)
    check_with_model(recipe, source, None if from_scratch else out / PROFILE_FOLDER)
    if from_scratch:
        clear_run(out, inputs_of(recipe))
    _claim(out, recipe)
    return source


def _produce(
    recipe: Recipe, out: Path, progress: Progress, from_scratch: bool, trust_remote_code: bool
) -> tuple[SearchResult, _Clock]:
    """Profiles, searches and exports; the dense model is gone from memory when it returns."""
    from moacompress.calibration.profile.profiler import profile

    progress.stage("load")
    source = _begin(recipe, out, from_scratch, trust_remote_code)
    clock = _Clock(out / SECONDS_FILE, progress)
    if not clock.seconds:  # a run that is taken up has said so before
        expected = estimate_run(recipe, source, progress)
        progress.plan({name: expected.facts["seconds"].get(name, 0.0) for name in STAGES}, in_seconds=True)
        progress.say(f"This takes {expected.line()}")
    profiled = clock.run("profile", lambda: profile(source, out / PROFILE_FOLDER, recipe, progress=progress))
    plan_file, model = out / PLAN_FILE, out / MODEL_FOLDER
    found = clock.run(
        "search",
        lambda: find_asked(
            profiled, recipe=recipe, out=plan_file, overwrite=from_scratch, model=source, progress=progress
        ),
    )
    earlier = exported_plan(model)
    stale = earlier is not None and _is_earlier(earlier, found.plan)
    if stale:
        remove([out / SUMMARY_FILE, out / EVALUATION_FILE])
    repair = profiled if found.plan.quality.get("assumed_repaired") else None
    if stale or not check_reusable(model, found.plan, repair):
        clock.run(
            "export",
            lambda: export(
                source,
                found.plan,
                model,
                weights=recipe.weights,
                head_weights=recipe.head_weights,
                repair=repair,
                device=recipe.device,
                overwrite=stale,
                trust_remote_code=trust_remote_code,
                progress=progress,
            ),
        )
    return found, clock


def _is_earlier(plan: Plan, other: Plan) -> bool:
    """Whether a plan is another one of the same search, which its timeout stopped and which then resumed.

    The smallest budget for a loss is found by a search of every budget that is tried.
    """
    ours, theirs = (unrepaired(one).to_dict() for one in (plan, other))
    return ours != theirs and _search_of(plan) == _search_of(other)


def _search_of(plan: Plan) -> tuple[str | None, str | None]:
    loss = plan.budget.get("max_loss")
    return loss, plan.provenance.get("search" if loss is None else "profile")


def measured_kv_bytes(folder: Path, length: int, device: str = "cpu", *, trust_remote_code: bool = False) -> int:
    """Returns the bytes of memory that a checkpoint's cache holds after a real `generate` on a prompt of `length` tokens.

    One token is generated, which is not fed back. At lengths before and after, a window that straddles a block can take one
    more block per KV head.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import moacompress.runtime.hf.loading  # noqa: F401  (in case the entry point is switched off)

    placed = checked_placement(device)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **placed)
    if not placed:
        model.to(device)
    prompt = torch.full((1, length), 3, device=input_device(model))
    out: Any = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        **GREEDY,
        return_dict_in_generate=True,
    )
    return int(returned_cache(out).kv_bytes())


def quality_table(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns `{task@length: {dense, uniform, plan, ..., nll: {...}, prompts, kind}}`: exact match and NLL by model.

    The order is that of the evaluation: the kinds that a claim rests on first.
    """
    table: dict[str, dict[str, Any]] = {}
    for row in evaluation["results"]:
        if row["metric"] not in ("exact_match", "nll"):
            continue
        kind = evaluation["kinds"][row["task"]]
        entry = table.setdefault(f"{row['task']}@{row['length']}", {"kind": kind, "prompts": row["prompts"], "nll": {}})
        held = entry if row["metric"] == "exact_match" else entry["nll"]
        held[row["model"]] = row["value"]
    return table


def inputs_of(recipe: Recipe) -> list[str]:
    """Returns what a run reads, where these are files or folders."""
    calibration = recipe.calibration
    paths = [source.path for source in calibration.sources]
    named = [recipe.model, calibration.text, *paths]
    return [name for name in named if name and Path(name).exists()]


def clear_run(out: Path, inputs: Iterable[str | Path]) -> None:
    """Removes all that a run left in a folder that this process owns, and nothing else; the next run reads the `inputs`.

    Raises:
        ArtefactError: a folder has the name of one of a run's, and none left it; one of the inputs would go too; or another
            process is at work on something in `out`.
    """
    profile = out / PROFILE_FOLDER
    going = refuse_foreign(out, inputs)
    with ExitStack() as owned:
        for name in (PLAN_FILE, EVALUATION_FILE, BENCH_FILE):
            owned.enter_context(own_file(out / name))
        if profile.exists():
            owned.enter_context(own_folder(profile))
            clear_profile(profile)
        for path in going:
            sweep_files(path)
            sweep_folders(path)
        remove([path for path in going if path.parent != profile])
    with suppress(OSError):  # there are other files in it
        profile.rmdir()


def refuse_foreign(out: Path, inputs: Iterable[str | Path]) -> list[Path]:
    """Returns all that a run leaves in a folder, where it may be removed; the next run reads the `inputs`.

    Raises:
        ArtefactError: a folder has the name of one of a run's, and none left it; or one of the inputs would go too.
    """
    profile = out / PROFILE_FOLDER
    going = [*of_compress(out), *(of_demo(out) if (out / DEMO_FILE).exists() else ())]
    for folder, is_ours in ((profile, is_profile), (out / MODEL_FOLDER, is_compressed)):
        # not even with --overwrite: a mistyped folder must not cost somebody's files
        if holds_something(folder) and not is_ours(folder):
            raise ArtefactError(f"{folder} exists already and no run left it; choose another folder for the run")
    check_baselines(out / PLAN_FILE)
    held = [path for path in going if path.exists() and not is_within(path, profile) and path != out / MODEL_FOLDER]
    if held and not (_is_begun(out / RECIPE_FILE) or (out / DEMO_FILE).exists()):
        raise ArtefactError(f"{held[0]} exists already and no run left it; choose another folder for the run")
    for name in inputs:
        for path in going:
            if is_within(name, path):
                raise ArtefactError(f"{name} would be removed with {path}; choose another folder for the run")
    return going


def _claim(out: Path, recipe: Recipe) -> None:
    """Makes `out` this run's folder, or refuses."""
    for name in (RECIPE_FILE, SECONDS_FILE, SUMMARY_FILE):
        sweep_files(out / name)
    sweep_folders(out / MODEL_FOLDER)
    if not _is_of(out, recipe):
        _refuse_other(out, recipe)
        remove([out / SECONDS_FILE])
        write_json(out / RECIPE_FILE, recipe.resolved())


def _check_place(out: Path, recipe: Recipe, from_scratch: bool) -> None:
    """Refuses a folder that this run may not fill, or whose files it may not replace; nothing is changed."""
    if from_scratch:
        refuse_foreign(out, inputs_of(recipe))
    else:
        _refuse_other(out, recipe)


def _is_of(out: Path, recipe: Recipe) -> bool:
    """Whether a folder is that of this very run; a key that the version which wrote its recipe did not know has its default.

    One whose recipe cannot be read is of another.
    """
    mark = out / RECIPE_FILE
    with suppress(RecipeError):
        # as it was written: without the password of the search's storage
        return mark.exists() and Recipe.from_dict(read_json(mark, "recipe")).resolved() == recipe.resolved()
    return False


def _refuse_other(out: Path, recipe: Recipe) -> None:
    """Refuses a folder that holds another run; one that failed before its first step left nothing that is missed.

    Raises:
        ArtefactError: it does.
    """
    if _is_of(out, recipe):
        return
    mark = out / RECIPE_FILE
    empty = (mark, out / SECONDS_FILE) if _is_begun(mark) else ()
    refuse_held(out, [path for path in of_compress(out) if path not in empty])


def _is_begun(mark: Path) -> bool:
    """Whether a file is the recipe that a run leaves in its folder."""
    found = read_json(mark, "recipe") if mark.exists() else None
    return isinstance(found, dict) and {"model", "budget", "calibration"} <= found.keys()


def refuse_held(out: Path, paths: Iterable[Path]) -> None:
    """Refuses a folder that holds something of another run.

    Raises:
        ArtefactError: one of the paths is there. The manifest alone is no profile yet: `profile` says whether it may make one.
    """
    for path in paths:
        if path.exists() and path.name != MANIFEST_FILE:
            raise ArtefactError(
                f"{out} holds another run ({path.relative_to(out)}); choose another folder or pass --overwrite"
            )


class _Clock:
    """Begins each step's stage, and keeps its seconds on disk, so that a resumed run reports what the work took in all."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path, self._progress = path, progress
        found = read_json(path, "seconds") if path.exists() else {}
        if not isinstance(found, dict) or not all(isinstance(spent, int | float) for spent in found.values()):
            raise ArtefactError(f"{path} does not say what steps took; move it away, and they count from now on")
        self.seconds: dict[str, float] = found

    def run(self, step: str, work: Callable[[], Result]) -> Result:
        self._progress.stage(step)
        begun = time.perf_counter()
        before = self.seconds.get(step, 0.0)
        try:
            return work()
        finally:
            self.seconds[step] = round(before + time.perf_counter() - begun, 1)
            write_json(self._path, self.seconds)

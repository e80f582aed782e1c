"""A whole run: profile, search, export, evaluate, report. Each step leaves one artefact; the same command resumes a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.artefact_names import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    PLAN_FILE,
    PROFILE_FOLDER,
    REPORT_FILE,
    SECONDS_FILE,
    SUMMARY_FILE,
)
from moacompress.core.errors import MoaCompressError, RecipeError, one_line
from moacompress.core.files import remove, write_json
from moacompress.core.lock_holders import own_folder
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
from moacompress.models.stored_plan import find_running_plan
from moacompress.models.weight_bytes import checkpoint_weight_bytes
from moacompress.recipe import Recipe, shared_name
from moacompress.rules.plan import Plan
from moacompress.run_checks import check_recipe, check_with_model, check_with_shape
from moacompress.run_counts import RunCounts, count_run, read_counts
from moacompress.run_estimate import COMPARED, asked_length, estimate_run, measured_length
from moacompress.run_folder import StepClock, begin_run, check_place
from moacompress.runtime.compat.alternates import returned_cache
from moacompress.runtime.ready_model import load_for
from moacompress.search.plan_sets import find_asked

if TYPE_CHECKING:
    from moacompress.models.source import SourceModel
    from moacompress.search.result.search_result import SearchResult

logger = logging.getLogger(__name__)

STAGES = ("load", "profile", "search", "export", "eval", "report")
"""Of a run, as the progress numbers them."""


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
        check_place(Path(out), recipe, overwrite)
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
    check_place(out, recipe, from_scratch)
    source = load_for(recipe, recipe.model, trust_remote_code=trust_remote_code)
    check_with_model(recipe, source, None if from_scratch else out / PROFILE_FOLDER)
    begin_run(out, recipe, from_scratch)
    return source


def _produce(
    recipe: Recipe, out: Path, progress: Progress, from_scratch: bool, trust_remote_code: bool
) -> tuple[SearchResult, StepClock]:
    """Profiles, searches and exports; the dense model is gone from memory when it returns."""
    from moacompress.calibration.profile.profiler import profile

    progress.stage("load")
    source = _begin(recipe, out, from_scratch, trust_remote_code)
    clock = StepClock(out / SECONDS_FILE, progress)
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

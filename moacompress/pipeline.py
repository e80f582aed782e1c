"""The whole way: profile, search, export, evaluate. Each step leaves one artefact; the same command goes on after a stop."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moacompress.core.errors import ArtefactError, RecipeError
from moacompress.core.files import read_json, write_json
from moacompress.core.progress import Progress
from moacompress.exporter.exporting import check_reusable, export
from moacompress.recipe import Recipe, shared_name
from moacompress.rules.budget import Budget, reference_length
from moacompress.rules.plan import Plan

if TYPE_CHECKING:
    from moacompress.search.search_result import SearchResult

Result = TypeVar("Result")
ARTEFACTS = (
    "profile",
    "plan.json",
    "plan.study.journal",
    "plan.rounds",
    "plan.explain.json",
    "model",
    "eval.json",
    "eval.scores.jsonl",
    "summary.json",
)
"""What a run leaves in its folder, besides `recipe.json` and `seconds.json`."""


def compress(
    recipe: Recipe, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Profiles, searches, exports and evaluates; steps that are done already are reused.

    Args:
        recipe: names the model and the budget; the rest has defaults.
        out: the folder to fill with `profile/ plan.json model/ eval.json summary.json`.
        overwrite: start anew where `out` holds another run.
        progress: is told of the steps.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        RecipeError: no model or no budget in the recipe.
        ArtefactError: `out` holds another run.
        MoaCompressError: from any of the steps.
    """
    from moacompress.evaluation.runner import evaluate

    if recipe.model is None:
        raise RecipeError("no model given; name one as MODEL or as `model:` in the recipe")
    if not recipe.budget:
        raise RecipeError("no budget given; write --budget 25% or `budget: 25%` in the recipe")
    out, progress = Path(out), progress or Progress()
    _claim(out, recipe, overwrite)
    clock = _Clock(out / "seconds.json")
    found = _produce(recipe, out, clock, progress)
    plan: Plan = found.plan
    evaluation = recipe.evaluation
    scores = clock.run(
        "eval",
        lambda: evaluate(
            out / "model",
            tasks=evaluation.tasks,
            lengths=evaluation.lengths,
            prompts=evaluation.prompts,
            text=recipe.calibration.text,
            seed=recipe.seed,
            device=recipe.device,
            out=out / "eval.json",
            progress=progress,
        ),
    )
    length = reference_length([Budget.parse(text) for text in recipe.budget], recipe.calibration.lengths)
    summary = {
        "model": shared_name(plan.provenance["source"]),
        "budget": list(recipe.budget),
        "reference_length": length,
        "kv_bytes": {
            "dense": plan.model.dense_kv_bytes(length),
            "planned": plan.kv_bytes(length),
            "measured": measured_kv_bytes(out / "model", length, recipe.device),
        },
        "kv_share": plan.kv_share(length),
        "seconds": clock.seconds,
        "quality": quality_table(scores["results"]),
        "harm": plan.quality.get("measured_harm", {}),
        "measured_plans": found.measured_plans,
        "versions": {name: version(name) for name in ("moacompress", "torch", "transformers", "optuna")},
    }
    write_json(out / "summary.json", summary)
    return summary


def _produce(recipe: Recipe, out: Path, clock: _Clock, progress: Progress) -> SearchResult:
    """Profiles, searches and exports; the dense model is gone from memory when it returns."""
    from moacompress.calibration.profiler import profile
    from moacompress.runtime.ready_model import load_for
    from moacompress.search.study import find_plan

    assert recipe.model is not None
    source = load_for(recipe, recipe.model)
    profiled = clock.run("profile", lambda: profile(source, out / "profile", recipe, progress=progress))
    plan_file = out / "plan.json"
    found = clock.run(
        "search",
        lambda: find_plan(profiled, recipe.budget, recipe=recipe, out=plan_file, model=source, progress=progress),
    )
    if not check_reusable(out / "model", found.plan):
        clock.run("export", lambda: export(source, found.plan, out / "model", progress=progress))
    return found


def measured_kv_bytes(folder: Path, length: int, device: str = "cpu") -> int:
    """Returns the bytes of memory that the cache holds after a real `generate` on a prompt of `length` tokens.

    One token is generated, which is not fed back. At lengths before and after, a window that straddles a block can take one
    more block per KV head.

    Args:
        folder: a compressed checkpoint.
        length: tokens in the cache at the end.
        device: torch device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import moacompress.runtime.loading  # noqa: F401  (in case the entry point is switched off)

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.to(device)
    prompt = torch.full((1, length), 3, device=device)
    out: Any = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
    )
    return int(out.cache.kv_bytes())


def quality_table(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns `{task@length: {dense, uniform, plan, nll: {...}, prompts}}` from an evaluation's rows: exact match, and NLL."""
    table: dict[str, dict[str, Any]] = {}
    for row in results:
        if row["metric"] not in ("exact_match", "nll"):
            continue
        entry = table.setdefault(f"{row['task']}@{row['length']}", {"prompts": row["prompts"], "nll": {}})
        held = entry if row["metric"] == "exact_match" else entry["nll"]
        held[row["model"]] = row["value"]
    return table


def _claim(out: Path, recipe: Recipe, overwrite: bool) -> None:
    """Makes `out` this run's folder, or refuses."""
    mark = out / "recipe.json"
    wanted = recipe.resolved()
    if mark.exists() and read_json(mark, "recipe") == wanted:
        return
    if out.exists() and any(out.iterdir()) and not overwrite:
        held = [name for name in (*ARTEFACTS, mark.name) if (out / name).exists()]
        if held or not out.is_dir():
            raise ArtefactError(f"{out} holds another run ({held[0]}); choose another folder or pass --overwrite")
    if overwrite:
        for name in (*ARTEFACTS, "seconds.json"):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_json(mark, wanted)


class _Clock:
    """Seconds of each step, kept on disk so that a run that was stopped reports what the work took in all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path, "seconds") if path.exists() else {}

    def run(self, step: str, work: Callable[[], Result]) -> Result:
        begun = time.perf_counter()
        before = self.seconds.get(step, 0.0)
        try:
            return work()
        finally:
            self.seconds[step] = round(before + time.perf_counter() - begun, 1)
            write_json(self._path, self.seconds)

"""Every recipe that is shipped loads, names its model, resolves to the settings on record, and runs on a tiny model.

`MOACOMPRESS_WRITE_GOLDEN=1 pytest tests/test_recipes.py` records them again, for a change that is meant to change them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import moacompress
from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget
from tests.conftest import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
NAMES = [str(file.relative_to(FOLDER)) for file in FILES]
RECORDS = FOLDER.parent / "tests" / "golden" / "recipes"
"""One file for each version: what a recipe that sets nothing resolves to, and what each recipe changes of it."""
SECTIONS = ("calibration", "profile", "search", "evaluation", "heal")


def settings(recipe: Recipe) -> dict[str, Any]:
    """Returns every setting of a recipe by its key, such as `search.trials`, as JSON has it."""
    whole = json.loads(json.dumps(recipe.resolved()))
    found = {key: value for key, value in whole.items() if key not in SECTIONS}
    return found | {f"{section}.{key}": value for section in SECTIONS for key, value in whole[section].items()}


def recipe_of(given: dict[str, Any]) -> Recipe:
    """Returns the recipe with these settings; the inverse of `settings`."""
    whole: dict[str, Any] = {key: value for key, value in given.items() if "." not in key}
    for section in SECTIONS:
        whole[section] = {key.partition(".")[2]: value for key, value in given.items() if key.startswith(f"{section}.")}
    return Recipe.from_dict(whole)


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that are not the same, each with its value then and now."""
    missing = "no such key"
    both = {key: (then.get(key, missing), now.get(key, missing)) for key in sorted({**then, **now})}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def on_record(file: Path) -> dict[str, dict[str, Any]]:
    """Returns all settings of every recipe in a record; "" is the recipe that sets nothing."""
    held: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8"))
    return {name: held[""] | changed for name, changed in held.items()}


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, Any]]:
    """What this version has on record."""
    file = RECORDS / f"{moacompress.__version__}.json"
    if os.environ.get("MOACOMPRESS_WRITE_GOLDEN") == "1":
        default = settings(Recipe())
        found = {name: settings(Recipe.load(path)) for name, path in zip(NAMES, FILES, strict=True)}
        changed = {
            name: {key: now for key, (_, now) in differences(default, own).items()} for name, own in found.items()
        }
        rows = [f"{json.dumps(name)}: {json.dumps(own)}" for name, own in {"": default, **changed}.items()]
        file.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
    return on_record(file)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_recipe(file: Path) -> None:
    from moacompress.evaluation.tasks.registry import find_task

    recipe = Recipe.load(file)
    if file.parent.name != "effort":  # these are of any model and any budget
        assert recipe.model
        assert [Budget.parse(text) for text in recipe.budget]
    for task in recipe.evaluation.tasks:
        find_task(task)
    assert recipe.calibration.samples >= len(recipe.calibration.lengths)
    assert file.read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["", *NAMES])
def test_settings_are_those_on_record(name: str, record: dict[str, dict[str, Any]]) -> None:
    """A default that changed, or a recipe, is named here, with its value on record and now."""
    assert differences(record.get(name, {}), settings(Recipe.load(FOLDER / name) if name else Recipe())) == {}
    assert set(record) == {"", *NAMES}


@pytest.mark.parametrize("file", sorted(RECORDS.glob("*.json")), ids=lambda file: file.stem)
def test_resolved_recipes_of_every_version_mean_what_they_meant(file: Path) -> None:
    """Artefacts of that version carry these settings, and say today what they said then, whatever the defaults are."""
    for name, then in on_record(file).items():
        now = settings(recipe_of(then))
        assert differences(then, {key: now.get(key) for key in then}) == {}, name


LENGTHS, LONGER = [500, 600], 700
"""Where recipes are profiled on tiny models, characters; and where they are evaluated, and a budget may be asked for."""
COUNTS = {"text_samples": 2, "validation_samples": 2, "answer_tokens": 4, "longer_samples": 1}
FAMILIES = {
    "effort": "llama",
    "gemma3-270m": "gemma3_text",
    "llama-3.1-8b": "llama",
    "mistral-7b": "mistral",
    "qwen2.5-coder-0.5b": "qwen2",
    "qwen2.5-coder-1.5b": "qwen2",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3-8b": "qwen3",
    "smollm2-135m": "llama",
}
"""Of tiny models, for each folder of recipes."""
SMALL = ("gemma3-270m", "smollm2-135m")
"""Folders of recipes that `make test` runs; those of large models are counted from configs in `test_run_counts`."""


def cut(recipe: Recipe) -> Recipe:
    """Returns a recipe of the same settings with few and short samples, one trial, and one prompt of each task."""
    smaller = {name: min(value, getattr(recipe.calibration, name)) for name, value in COUNTS.items()}
    return recipe.override(
        **{f"calibration__{name}": value for name, value in smaller.items()},
        calibration__samples=len(recipe.calibration.sources),
        calibration__lengths=LENGTHS[: len(recipe.calibration.lengths)],
        profile__gate_samples=2,
        search__trials=1,
        budget=[re.sub("@.*", f"@{LONGER}", text) for text in recipe.budget],
        evaluation__lengths=[LONGER],
        evaluation__prompts=1,
        device="cpu",
    )


def of_tiny(file: Path, tiny_of: Callable[[str], Path], prose: Path) -> Recipe:
    """Returns a recipe cut, and of a tiny model of its family."""
    recipe = cut(Recipe.load(file))
    model = tiny_of(FAMILIES[file.parent.name])
    return recipe.override(model=str(model), calibration__text=str(prose), budget=recipe.budget or ["25%"])


def first_of_their_shape() -> list[str]:
    """Returns a recipe of each shape, of those of the small models: what differs in budget, counts and evaluation has one."""
    found: dict[str, str] = {}
    for name, file in zip(NAMES, FILES, strict=True):
        if file.parent.name in SMALL:
            made = settings(cut(Recipe.load(file))) | {"budget": None, "evaluation.tasks": None}
            found.setdefault(json.dumps(made, sort_keys=True), name)
    return list(found.values())


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Path]:
    """Returns a function that makes the folder of a tiny model of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(made[family])
            tiny_tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


def check_plan(recipe: Recipe, out: Path) -> None:
    """Checks what a run left against its recipe."""
    from moacompress.rules.plan import Plan
    from moacompress.search.study import find_plan

    plan = Plan.load(out / "model" / "plan.json")
    (budget,) = map(Budget.parse, recipe.budget)
    assert budget.share is not None
    for length in [budget.length] if budget.length else recipe.calibration.lengths:
        assert plan.kv_share(length) <= budget.share
    assert plan.provenance["recipe"]["search"] == recipe.resolved()["search"]
    assert (out / "profile" / "gates.safetensors").is_file() == recipe.profile.gates
    if recipe.profile.anchors:  # what such a profile is for
        shared = find_plan(out / "profile", recipe=recipe.override(search__share="1"))
        assert sum(share is not None for share in shared.plan.shares) == 1


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.heavy] if n else []) for n, name in enumerate(first_of_their_shape())],
)
def test_a_recipe_makes_a_checkpoint(name: str, tiny_of: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    """Profile, search and export; and of every task of the evaluation a prompt."""
    from moacompress.calibration.profile.profiler import profile
    from moacompress.exporter.exporting import export
    from moacompress.run_checks import check_recipe, check_with_model
    from moacompress.runtime.ready_model import load_for
    from moacompress.search.study import find_plan

    recipe = of_tiny(FOLDER / name, tiny_of, prose)
    source = load_for(recipe, str(recipe.model))
    check_recipe(recipe)
    check_with_model(recipe, source)
    profiled = profile(source, tmp_path / "profile", recipe)
    found = find_plan(profiled, recipe=recipe, out=tmp_path / "plan.json", model=source)
    export(source, found.plan, tmp_path / "model")
    check_plan(recipe, tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_recipe_runs(file: Path, tiny_of: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    from moacompress.pipeline import compress

    recipe = of_tiny(file, tiny_of, prose)
    summary = compress(recipe, tmp_path / "out")
    assert len(summary["quality"]) == len(recipe.evaluation.tasks)
    check_plan(recipe, tmp_path / "out")


PLANS = sorted((FOLDER.parent / "docs" / "plans").glob("*.json"))


@pytest.mark.parametrize("file", PLANS, ids=[file.name for file in PLANS])
def test_published_plan(file: Path) -> None:
    from moacompress.rules.plan import Plan

    plan = Plan.load(file)
    budget = Budget.parse(*plan.budget["asked"])
    assert budget.share is not None
    for length, taken in plan.budget["bytes"].items():
        assert plan.kv_bytes(int(length)) == taken["plan"]
        assert taken["plan"] <= budget.share * taken["dense"] or budget.length not in (None, int(length))
    assert budget.length is None or str(budget.length) in plan.budget["bytes"]
    assert not Path(plan.provenance["source"]).is_absolute()

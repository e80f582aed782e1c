"""How much work a run takes where no recipe says so: quick, standard or thorough."""

from __future__ import annotations

from importlib import resources
from typing import Literal, get_args

from moacompress.core.errors import UsageError
from moacompress.recipe import Recipe

Effort = Literal["quick", "standard", "thorough"]
FOLDER = "effort"


def effort_recipe(effort: Effort, *, prose: bool) -> Recipe:
    """Returns the recipe of an effort; without `prose` (long texts) what needs some is left out.

    Raises:
        UsageError: there is no such effort.
    """
    import yaml

    if effort not in get_args(Effort):
        raise UsageError(f"no effort is called {effort!r}; there are {', '.join(get_args(Effort))}")
    data = yaml.safe_load(resources.files("moacompress.recipes").joinpath(FOLDER, f"{effort}.yaml").read_text("utf-8"))
    if not prose:
        from moacompress.evaluation.tasks.registry import find_task

        calibration, evaluation = data["calibration"], data["evaluation"]
        calibration["sources"] = [each for each in calibration["sources"] if each.get("haystack") != "prose"]
        calibration["text_samples"] = 0
        evaluation["tasks"] = [name for name in evaluation["tasks"] if find_task(name).needs != "prose"]
    return Recipe.from_dict(data, f"effort {effort}")

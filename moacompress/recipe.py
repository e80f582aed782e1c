"""Recipes: every choice of a run in one file. `compress --recipe` reads one, every artefact carries its resolved form.

A recipe is YAML (or JSON). Unknown keys are refused with the nearest known one; command-line flags win over the recipe,
which wins over the defaults here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moacompress.core.errors import MoaCompressError, RecipeError, did_you_mean
from moacompress.core.urls import without_password
from moacompress.recipe_sections import (
    CalibrationRecipe,
    EvaluationRecipe,
    HealRecipe,
    ProfileRecipe,
    SearchRecipe,
    Section,
    file_name,
)
from moacompress.rules.budget import Budget
from moacompress.rules.formats import dtype_name
from moacompress.rules.loss import Loss
from moacompress.rules.untrusted import MAX_DEPTH, remaining_budget

MAX_BYTES = 1 << 20
"""Of a recipe's file, and of what it stands for: numbers and characters."""


def _texts(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    return [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in items]


def _loss(value: Any) -> Any:
    if value is None or value == "":  # a flag cannot say None
        return None
    try:
        return Loss.parse(str(value)).text
    except MoaCompressError as error:
        raise ValueError(str(error)) from error


def _dtype(value: Any) -> Any:
    return dtype_name(value) if isinstance(value, str) else value


class Recipe(Section):
    """A whole run."""

    model: str | None = Field(None, description="hub id, folder or .gguf file")
    budget: Annotated[
        tuple[str, ...], BeforeValidator(_texts, json_schema_input_type=str | float | list[str | float])
    ] = Field((), description="budgets that must all hold: 25%, 0.25, 25%@8k, 512MiB@32k or memory=6GiB@8k")
    max_loss: Annotated[str | None, BeforeValidator(_loss, json_schema_input_type=str | float | None)] = Field(
        None,
        description="instead of a budget: find the smallest budget whose plan raises the perplexity of the dense model's own"
        " answers by at most this, such as 1%",
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_dtype)] = Field(
        "auto", description="compute dtype, auto for the checkpoint's own; KV bytes are counted in it"
    )
    weights: Literal["keep", "dense", "int8", "int4"] = Field(
        "keep",
        description="weights of linear layers: keep (as stored, including the quantized blocks of a .gguf file), dense (all "
        "floats), int8 or int4 (rounded)",
    )
    head_weights: Literal["int8", "int4"] | None = Field(
        None,
        description="format of the embedding and the output layer if `weights` rounds; by default they are not rounded",
    )
    device: str = Field(
        "cpu",
        description="torch device, such as cpu or cuda; profile, search, export, eval and compress also take a device map: "
        "auto, balanced, sequential, or a JSON file with one",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed for everything random")
    calibration: CalibrationRecipe = CalibrationRecipe()
    profile: ProfileRecipe = ProfileRecipe()
    search: SearchRecipe = SearchRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    heal: HealRecipe = HealRecipe()

    @model_validator(mode="after")
    def _head(self) -> Recipe:
        if self.head_weights is not None and self.weights not in ("int8", "int4"):
            raise ValueError(
                f"head_weights is {self.head_weights} but weights is {self.weights}; head_weights needs weights int8 or int4"
            )
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Recipe:
        if self.budget and self.max_loss is not None:
            raise ValueError(
                f"budget is {', '.join(self.budget)} and max_loss is {self.max_loss}; max_loss finds the budget itself; "
                "give one of them"
            )
        return self

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                Budget.parse(text)
            except MoaCompressError as error:
                raise ValueError(str(error)) from error
        return value

    @staticmethod
    def from_dict(data: Any, where: str = "recipe") -> Recipe:
        """Reads a recipe.

        Raises:
            RecipeError: names the key, what is wrong, and for an unknown key the nearest known one.
        """
        if not isinstance(data, dict):
            raise RecipeError(f"{where} must be a mapping of keys to values, not {type(data).__name__}")
        return Recipe.model_validate(data, context=where)

    @model_validator(mode="wrap")
    @classmethod
    def _our_error(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe], info: ValidationInfo) -> Recipe:
        try:
            return handler(data)
        except ValidationError as error:
            raise RecipeError(f"{info.context or 'recipe'}: {_first_problem(error)}") from error

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Reads a YAML or JSON recipe file.

        Raises:
            RecipeError: unreadable, not YAML, or not a recipe.
        """
        import yaml

        path = Path(path)
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise RecipeError(f"recipe {path} has more than {MAX_BYTES >> 20} MiB")
            data = yaml.safe_load(text.decode("utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}") from error
        except (ValueError, yaml.YAMLError, RecursionError) as error:  # a date that there is not is a ValueError
            raise RecipeError(f"recipe {path} is not valid YAML: {error}") from error
        if (
            remaining_budget(data, MAX_BYTES, finite=False) < 0
        ):  # an alias of YAML stands for all of what it names, time and again
            raise RecipeError(
                f"recipe {path} must be at most {MAX_DEPTH} deep, and {MAX_BYTES:,} numbers and characters, what an alias "
                "stands for counted each time"
            )
        return Recipe.from_dict(data, f"recipe {path}")

    def override(self, **flags: Any) -> Recipe:
        """Returns the recipe with flags on top. A budget or a loss that is given alone replaces the other one.

        Args:
            **flags: dotted keys with `__` for the dot (`search__trials`); None is not given.

        Raises:
            RecipeError: as `from_dict`.
        """
        data = self.model_dump()
        given = {key: value for key, value in flags.items() if value is not None}
        if "budget" in given and "max_loss" not in given:
            data["max_loss"] = None
        elif "max_loss" in given and "budget" not in given:
            data["budget"] = ()
        for key, value in given.items():
            *sections, name = key.split("__")
            target = data
            for section in sections:
                target = target.setdefault(section, {})
                if not isinstance(target, dict):
                    raise RecipeError(f"options: {section} is a value, not a section; it has no key {name!r}")
            target[name] = value
        return Recipe.from_dict(data, "options")

    def resolved(self) -> dict[str, Any]:
        """Returns every choice, defaults included, as JSON values; without the password of the search's storage."""
        data = self.model_dump(mode="json")
        storage = data["search"]["storage"]
        data["search"]["storage"] = None if storage is None else without_password(storage)
        return data

    def of_profile(self, profiled: Recipe) -> Recipe:
        """Returns the recipe of a search as it was run: with the calibration and the rules of what had been profiled."""
        return self.model_copy(update={"calibration": profiled.calibration, "profile": profiled.profile})

    def shared(self, source: str) -> dict[str, Any]:
        """Returns `resolved` as it goes into plans and checkpoints, which leave the machine.

        Of folders and files there are only the names, so whoever runs it again says where they are; the model's weights and
        the samples are known by the fingerprints beside it. The search's storage, a place and maybe a password, is left out.

        Args:
            source: the model that the run was of, as `SourceModel.source` has it.
        """
        data = self.resolved()
        data["model"] = shared_name(source)
        calibration = data["calibration"]
        calibration["text"] = file_name(calibration["text"])
        for part in calibration["sources"]:
            part["path"] = file_name(part["path"])
            dataset = part["dataset"]
            if dataset is not None:  # a hub id, or a folder, which may look like one
                part["dataset"] = file_name(dataset) if Path(dataset).exists() else shared_name(dataset)
        data["search"]["storage"] = None
        return data


def shared_name(place: str) -> str:
    """Returns the last part of an absolute path; anything else, such as a hub id, as it is."""
    return os.path.basename(os.path.abspath(place)) if Path(place).is_absolute() else place


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}{_nearest_key(problem['loc'])}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _nearest_key(location: tuple[int | str, ...]) -> str:
    section: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next(iter(getattr(annotation, "__args__", ())), annotation)
    known = list(section.model_fields)
    return "; " + did_you_mean(str(location[-1]), known, f"known keys are {', '.join(known)}")

"""Recipes: every choice of a run in one file. `compress --recipe` reads one, every artefact carries its resolved form.

A recipe is YAML (or JSON). Unknown keys are refused with the nearest known one; command-line flags win over the recipe,
which wins over the defaults here.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moacompress.core.errors import MoaCompressError, RecipeError, did_you_mean
from moacompress.core.urls import without_password
from moacompress.rules.asked_shares import AskedShares
from moacompress.rules.budget import Budget, parse_length
from moacompress.rules.formats import CODED, NATIVE, all_formats, dtype_name, find_format, is_format
from moacompress.rules.loss import Loss
from moacompress.rules.rule import MIN_WINDOWS, SINKS

logger = logging.getLogger(__name__)

AUTO = "auto"
"""Of weights: a search chooses their formats."""
CONSENT = "trust_remote_code"
"""Key of recipes that earlier versions wrote, which says nothing any more."""
ALLOWED_BY = "--trust-remote-code of the command that runs it, or that argument of the function"

Estimator = Literal["robust", "fisher", "sample", "moa", "mass", "gold-fisher", "gold-sample"]
Solver = Literal["lagrange", "milp"]
Generator = Literal["needle", "multi-needle", "key-value", "records", "recall"]
HealObjective = Literal["kl", "echoatt"]
INFLUENCE = "influence"
"""What gates are fitted to by default."""
TrainedPart = Literal["full", "lora", "reuse", "gates"]


def _lengths(value: Any) -> Any:
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        return tuple(sorted({parse_length(str(item)) for item in items}))
    except MoaCompressError as error:
        raise ValueError(str(error)) from error


def _texts(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    return [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in items]


def _names(value: Any) -> Any:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item.strip() for item in items):
        raise ValueError("must be names, such as o_proj,down_proj")
    return tuple(sorted({item.strip() for item in items}))


def _formats(value: Any) -> Any:
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    names = [str(item).strip() for item in items]
    for name in names:
        if not is_format(name):
            known = all_formats()
            hint = did_you_mean(name, known, f"known are {', '.join(known)}")
            raise ValueError(f"unknown format {name!r}; {hint}")
    return tuple(sorted({*names} - {NATIVE}, key=lambda name: find_format(name).code))


def _share(value: Any) -> Any:
    try:
        return AskedShares.parse("off" if value is False else value).text  # YAML reads off as False
    except MoaCompressError as error:
        raise ValueError(str(error)) from error


def _loss(value: Any) -> Any:
    if value is None or value == "":  # a flag cannot say None
        return None
    try:
        return Loss.parse(str(value)).text
    except MoaCompressError as error:
        raise ValueError(str(error)) from error


def _dtype(value: Any) -> Any:
    return dtype_name(value) if isinstance(value, str) else value


Formats = Annotated[tuple[str, ...], BeforeValidator(_formats, json_schema_input_type=str | list[str])]
"""Names of formats beside the native one, which is always on offer."""
Lengths = Annotated[tuple[int, ...], BeforeValidator(_lengths, json_schema_input_type=str | int | list[str | int])]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    ALWAYS_HASHED: ClassVar[frozenset[str]] = frozenset()
    """Keys that fingerprints have whatever their value. A key that is new is not added here; see `hashed`."""

    def hashed(self) -> dict[str, Any]:
        """Returns the choices that go into a fingerprint, as JSON values.

        Of keys that are not in `ALWAYS_HASHED` those are left out that have their default: so a key that is new does not make
        another fingerprint of what was asked for before there was one.
        """
        chosen = {
            name
            for name, field in type(self).model_fields.items()
            if name in self.ALWAYS_HASHED or getattr(self, name) != field.get_default(call_default_factory=True)
        }
        return self.model_dump(mode="json", include=chosen)


class SourceRecipe(_Section):
    """One source of calibration samples: exactly one of `generator`, `path`, `dataset`."""

    ALWAYS_HASHED = frozenset(
        {"generator", "path", "dataset", "config", "split", "haystack", "values", "weight"},
    )
    generator: Generator | None = Field(None, description="synthetic task with known long-range dependency")
    path: str | None = Field(None, description="local .jsonl, .json, .parquet or .txt file")
    dataset: str | None = Field(None, description="hub id of a `datasets` set")
    config: str | None = Field(None, description="configuration name of the hub set")
    split: str = Field("train", description="split of the hub set")
    haystack: Literal["noise", "prose"] = Field("noise", description="filler of a generator; prose needs `text`")
    values: Literal["numbers", "uuids", "codes"] = Field(
        "numbers", description="what needles, key-value pairs and records hide"
    )
    weight: float = Field(1.0, gt=0, le=1000, description="share of the samples, relative to the other sources")

    @model_validator(mode="after")
    def _one_kind(self) -> SourceRecipe:
        if sum(kind is not None for kind in (self.generator, self.path, self.dataset)) != 1:
            raise ValueError("a source names exactly one of generator, path, dataset")
        if self.values != "numbers" and self.generator not in ("needle", "multi-needle", "key-value", "records"):
            raise ValueError(f"only needles, key-value pairs and records have values; {self._name} has none to choose")
        return self

    @property
    def _name(self) -> str:
        return str(self.generator or self.path or self.dataset)


class CalibrationRecipe(_Section):
    """What the heads are profiled on."""

    ALWAYS_HASHED = frozenset(
        {
            "sources",
            "text",
            "lengths",
            "samples",
            "text_samples",
            "validation_samples",
            "longer_samples",
            "answer_tokens",
        }
    )
    sources: tuple[SourceRecipe, ...] = Field(
        (
            SourceRecipe(generator="needle"),
            SourceRecipe(generator="multi-needle"),
            SourceRecipe(generator="key-value", weight=0.5),
        ),
        min_length=1,
    )
    text: str | None = Field(None, description="file or folder of long prose, the haystack of `prose` sources")
    lengths: Lengths = Field((512, 1024), min_length=1, max_length=8, description="profiled lengths, tokens")
    samples: int = Field(96, ge=1, le=100_000, description="calibration samples, over all lengths")
    text_samples: int = Field(0, ge=0, le=100_000, description="samples of plain text from `text` beside them")
    validation_samples: int = Field(12, ge=1, le=10_000, description="samples on which plans are measured")
    longer_samples: int = Field(
        2, ge=0, le=10_000, description="of generators, twice as long as the longest, beside the validation samples"
    )
    answer_tokens: int = Field(32, ge=1, le=4096, description="longest answer of the dense model, tokens")

    def hashed(self) -> dict[str, Any]:
        """Returns the settings that count for the fingerprint, those of the sources likewise."""
        return {**super().hashed(), "sources": [part.hashed() for part in self.sources]}


class ProfileRecipe(_Section):
    """How influence is estimated."""

    draws: int = Field(2, ge=1, le=64, description="random logit cotangents a sample")
    estimator: Estimator = Field("robust", description="statistic that the search goes by")
    baselines: bool = Field(False, description="also record the statistics of moa, mass and the gold label")
    heads: bool = Field(False, description="also record distances, sink mass and entropy of every KV head")
    anchors: int = Field(0, ge=0, le=64, description="earlier layers whose attention every layer is tried with")
    gates: bool = Field(
        False, description="train a gate for every KV head, which scores tokens, and profile rules that keep its choice"
    )
    scorer: str = Field(
        INFLUENCE,
        min_length=1,
        max_length=64,
        description="what gates are fitted to: influence, value-norm, keydiff, expected-attention, or an installed one",
    )
    gate_samples: int = Field(
        24,
        ge=2,
        le=100_000,
        description="samples of the shortest length that gates are trained on, and nothing else is",
    )
    formats: Formats = Field(CODED, description="formats of keys and values that are profiled")
    min_window: int = Field(32, description="smallest window of any KV head, tokens")
    sinks: tuple[int, ...] = Field(SINKS, min_length=1, description="sink sizes on offer, tokens")

    @model_validator(mode="after")
    def _recorded(self) -> ProfileRecipe:
        if self.estimator not in ("robust", "fisher", "sample"):
            object.__setattr__(self, "baselines", True)  # what the search goes by must be there
        return self

    @field_validator("min_window")
    @classmethod
    def _min_window(cls, value: int) -> int:
        if value not in MIN_WINDOWS:
            raise ValueError(f"min_window is one of {', '.join(map(str, MIN_WINDOWS))}")
        return value

    @field_validator("sinks")
    @classmethod
    def _sinks(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not set(value) <= set(SINKS):
            raise ValueError(f"sinks are some of {', '.join(map(str, SINKS))}")
        return tuple(sorted(set(value)))


class SearchRecipe(_Section):
    """How the plan is found."""

    trials: int = Field(16, ge=1, le=100_000, description="measured trials, the pure surrogate's (trial 0) included")
    timeout: float | None = Field(None, gt=0, description="seconds that a search may take, all of it")
    text_weight: float = Field(0.25, ge=0, le=1000, description="weight of plain text beside answers, if profiled")
    formats: Formats | None = Field(
        None, description="formats of keys and values on offer beside native; by default all that are profiled"
    )
    gates: bool = Field(True, description="offer rules that keep tokens which a gate chooses, where they are profiled")
    solver: Solver = Field("lagrange", description="solver inside each trial")
    share: Annotated[str, BeforeValidator(_share, json_schema_input_type=str | bool | int)] = Field(
        "off",
        description="layers that copy the attention of an earlier one: off, auto, a number, or layers=12:11,18:17",
    )
    segments: bool = Field(False, description="layers that share follow their anchor at once, with none between")
    assume_repaired: bool = Field(
        False, description="predict and measure copied attention after the repair of an export with --repair"
    )
    assume_healed: float = Field(
        1.0, gt=0, le=1, description="share of the KL of copied attention that healing is assumed to leave"
    )
    classes: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="most different rules of a plan, for servers that free memory by class of KV heads",
    )
    ablations: int = Field(12, ge=0, le=10_000, description="single KV heads measured to calibrate the surrogate")
    alternatives: bool = Field(
        True, description="measure baselines beside the found plan, and what a limit of classes costs"
    )
    rounds: int = Field(3, ge=0, le=100, description="times that the best plan is profiled around and improved")
    round_samples: int = Field(16, ge=1, le=100_000, description="calibration samples of a round")
    round_trials: int = Field(4, ge=1, le=1_000, description="plans that a round measures")
    moves: int = Field(10, ge=0, le=10_000, description="KV heads measured with more, and with less, at the end")
    floors: dict[int, float] = Field({}, description="smallest share of its KV bytes that a layer keeps, by layer")
    cost_table: str | None = Field(
        None,
        description="file of `bench --cost-table`, which budgets of latency go by, and which predicts a step's time",
    )
    storage: str | None = Field(None, description="Optuna storage: sqlite:///FILE, a journal file, or a database URL")

    @field_validator("floors")
    @classmethod
    def _floors(cls, value: dict[int, float]) -> dict[int, float]:
        for layer, share in value.items():
            if layer < 0 or not 0 < share <= 1:
                raise ValueError(f"floor {share:g} of layer {layer} is not a share in (0, 1] of a layer from 0 up")
        return value


class EvaluationRecipe(_Section):
    """What is measured at the end."""

    tasks: tuple[str, ...] = Field(("needle-noise",), min_length=1)
    lengths: Lengths = Field((1024,), min_length=1, max_length=16)
    prompts: int = Field(20, ge=1, le=100_000, description="prompts of each task and length")


class HealRecipe(_Section):
    """How the weights of a compressed model are distilled from the dense model."""

    ALWAYS_HASHED = frozenset(
        {
            "objective",
            "train",
            "samples",
            "text_share",
            "lengths",
            "steps",
            "batch",
            "lr",
            "rank",
            "hidden_weight",
            "soft_weight",
            "hard_weight",
            "first_stage",
            "evaluations",
            "patience",
            "held_out",
        }
    )
    objective: HealObjective = Field("kl", description="what is lowered: KL to dense, or the two stages of EchoAtt")
    train: TrainedPart = Field(
        "lora",
        description="all weights, LoRA of all linear layers, layers that reuse attention, or the gates that choose tokens",
    )
    samples: int = Field(96, ge=1, le=1_000_000, description="training samples, those of the profile first")
    text_share: float = Field(0.25, ge=0, le=1, description="share of plain text in them, where there is prose")
    lengths: Lengths | None = Field(
        None, min_length=1, max_length=8, description="of training samples, tokens; by default the profile's"
    )
    steps: int = Field(100, ge=1, le=10_000_000, description="optimizer steps")
    max_minutes: float | None = Field(None, gt=0, description="minutes of training after which it ends")
    batch: int = Field(8192, ge=1, le=2**30, description="tokens of an optimizer step")
    lr: float | None = Field(None, gt=0, le=1, description="largest learning rate; by default what suits `train`")
    rank: int = Field(16, ge=1, le=4096, description="of LoRA")
    modules: Annotated[tuple[str, ...], BeforeValidator(_names, json_schema_input_type=str | list[str])] | None = Field(
        None, min_length=1, description="linear layers that LoRA is trained in, such as o_proj; by default all"
    )
    hidden_weight: float = Field(1.0, ge=0, description="of the states of layers, in EchoAtt's first stage")
    soft_weight: float = Field(1.0, ge=0, description="of KL to dense, likewise")
    hard_weight: float = Field(1.0, ge=0, description="of the answers' own tokens, likewise")
    first_stage: float = Field(0.7, ge=0, le=1, description="share of the steps that EchoAtt's first stage takes")
    evaluations: int = Field(8, ge=1, le=10_000, description="times that held-out KL is measured on the way")
    patience: int = Field(3, ge=1, le=10_000, description="evaluations in a row without a new best that end it")
    held_out: int | None = Field(None, ge=1, description="validation samples that it is measured on; by default all")
    checkpointing: bool | None = Field(
        None, description="compute layers twice and keep less; by default for samples beyond 1,536 tokens"
    )


class Recipe(_Section):
    """A whole run."""

    model: str | None = Field(None, description="hub id, folder or .gguf file")
    budget: Annotated[
        tuple[str, ...], BeforeValidator(_texts, json_schema_input_type=str | float | list[str | float])
    ] = Field((), description="budgets that must all hold")
    max_loss: Annotated[str | None, BeforeValidator(_loss, json_schema_input_type=str | float | None)] = Field(
        None, description="instead of a budget: most rise of the perplexity of dense's own answers, such as 1%"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_dtype)] = Field(
        "auto", description="what the model computes in; bytes are counted at the checkpoint's own"
    )
    weights: Literal["keep", "dense", "int8", "int4", "auto"] = Field(
        "keep",
        description="of the linear layers: as they are, with a .gguf file's blocks; all floats; rounded to blocks; or auto, "
        "as the search chooses for each within a budget of memory",
    )
    head_weights: Literal["int8", "int4"] | None = Field(
        None, description="what embedding and output layer are rounded to where `weights` rounds; by default not"
    )
    device: str = "cpu"
    seed: int = Field(0, ge=0, le=2**31 - 1)
    calibration: CalibrationRecipe = CalibrationRecipe()
    profile: ProfileRecipe = ProfileRecipe()
    search: SearchRecipe = SearchRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    heal: HealRecipe = HealRecipe()

    @model_validator(mode="before")
    @classmethod
    def _without_consent(cls, data: Any) -> Any:
        """Drops what earlier versions wrote: whether code may run is said by whoever runs it, never by a file."""
        if not isinstance(data, dict) or CONSENT not in data:
            return data
        if data[CONSENT] is not False:
            logger.warning(
                "%s is ignored: no recipe or profile can allow a model's own code, only %s", CONSENT, ALLOWED_BY
            )
        return {key: value for key, value in data.items() if key != CONSENT}

    @model_validator(mode="after")
    def _head(self) -> Recipe:
        if self.head_weights is not None and self.weights not in ("int8", "int4", AUTO):
            raise ValueError(
                f"head_weights is {self.head_weights} but weights is {self.weights}; they are rounded with int8, int4 or auto "
                "alone"
            )
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Recipe:
        if self.budget and self.max_loss is not None:
            raise ValueError(
                f"budget is {', '.join(self.budget)} and max_loss is {self.max_loss}; a loss finds the budget itself, so give "
                "one of them"
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
            if path.stat().st_size > 2**20:
                raise RecipeError(f"recipe {path} has more than 1 MiB")
            data = yaml.safe_load(path.read_text("utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}") from error
        except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise RecipeError(f"recipe {path} is not valid YAML: {error}") from error
        return Recipe.from_dict(data, f"recipe {path}")

    def override(self, **flags: Any) -> Recipe:
        """Returns the recipe with flags on top.

        Args:
            **flags: dotted keys with `__` for the dot (`search__trials`); None is not given.

        Raises:
            RecipeError: as `from_dict`.
        """
        data = self.model_dump()
        for key, value in flags.items():
            if value is None:
                continue
            *sections, name = key.split("__")
            target = data
            for section in sections:
                target = target[section]
            target[name] = value
        return Recipe.from_dict(data, "options")

    def resolved(self) -> dict[str, Any]:
        """Returns every choice, defaults included, as JSON values; without the password of the search's storage."""
        data = self.model_dump(mode="json")
        storage = data["search"]["storage"]
        data["search"]["storage"] = None if storage is None else without_password(storage)
        return data

    def of_any_machine(self) -> Recipe:
        """Returns the recipe as profiles keep it: without the cost table, which is of one machine; a search names its own."""
        search = self.search.model_copy(update={"cost_table": None})
        return self.model_copy(update={"search": search})

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
        calibration["text"] = _file_name(calibration["text"])
        for part in calibration["sources"]:
            part["path"] = _file_name(part["path"])
            dataset = part["dataset"]
            if dataset is not None:  # a hub id, or a folder, which may look like one
                part["dataset"] = _file_name(dataset) if Path(dataset).exists() else shared_name(dataset)
        data["search"]["storage"] = None
        data["search"]["cost_table"] = _file_name(data["search"]["cost_table"])
        return data


def shared_name(place: str) -> str:
    """Returns the last part of an absolute path; anything else, such as a hub id, as it is."""
    return os.path.basename(os.path.abspath(place)) if Path(place).is_absolute() else place


def _file_name(path: str | None) -> str | None:
    return None if path is None else os.path.basename(os.path.abspath(path))


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

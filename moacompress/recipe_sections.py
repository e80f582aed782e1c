"""The sections of a recipe: what is profiled, how it is searched, what is measured at the end, and how weights are healed."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from moacompress.core.errors import MoaCompressError, did_you_mean
from moacompress.rules.asked_shares import AskedShares
from moacompress.rules.budget import parse_length
from moacompress.rules.formats import CODED, NATIVE, all_formats, is_format
from moacompress.rules.rule import MIN_WINDOWS

Generator = Literal["needle", "multi-needle", "key-value", "records", "recall", "source-code"]
HealObjective = Literal["kl", "echoatt"]
INFLUENCE = "influence"
"""What gates are fitted to by default."""
TrainedPart = Literal["full", "lora", "reuse", "gates"]


def _items(value: Any, what: str, kinds: type | tuple[type, ...] = str) -> list[Any]:
    """Returns the items of a list, of a text with commas, or of a single value; texts without blanks around them."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    # a file of some bytes can say a list of lists without end, of which no text is made
    if not all(isinstance(item, kinds) for item in items):
        raise ValueError(f"must be {what}")
    return [item.strip() if isinstance(item, str) else item for item in items]


def _lengths(value: Any) -> Any:
    items = _items(value, "lengths, such as 1k,4k", (str, int))
    try:
        return tuple(sorted({parse_length(str(item)) for item in items}))
    except MoaCompressError as error:
        raise ValueError(str(error)) from error


def _names(value: Any) -> Any:
    items = _items(value, "names, such as o_proj,down_proj")
    if not all(items):
        raise ValueError("must be names, such as o_proj,down_proj")
    return tuple(sorted({*items}))


def _tasks(value: Any) -> Any:
    names = tuple(filter(None, _items(value, "names of tasks, such as needle-noise,key-value")))
    if not names:
        raise ValueError("no tasks given; name some, such as needle-noise,key-value")
    return names


def _formats(value: Any) -> Any:
    names = _items(value, "names of formats, such as int8,int4")
    for name in names:
        if not is_format(name):
            known = all_formats()
            hint = did_you_mean(name, known, f"known are {', '.join(known)}")
            raise ValueError(f"unknown format {name!r}; {hint}")
    return tuple(name for name in all_formats() if name in names and name != NATIVE)


def _share(value: Any) -> Any:
    try:
        return AskedShares.parse("off" if value is False else value).text  # YAML reads off as False
    except MoaCompressError as error:
        raise ValueError(str(error)) from error


Formats = Annotated[tuple[str, ...], BeforeValidator(_formats, json_schema_input_type=str | list[str])]
"""Names of formats beside the native one, which is always on offer."""
Lengths = Annotated[tuple[int, ...], BeforeValidator(_lengths, json_schema_input_type=str | int | list[str | int])]


class Section(BaseModel):
    """A part of a recipe, whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

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


def file_name(path: str | None) -> str | None:
    """Returns the last part of a path, however it is spelled."""
    return None if path is None else os.path.basename(os.path.abspath(path))


class SourceRecipe(Section):
    """One source of calibration samples: exactly one of `generator`, `path`, `dataset`."""

    ALWAYS_HASHED = frozenset(
        {"generator", "path", "dataset", "config", "split", "haystack", "values", "weight"},
    )
    generator: Generator | None = Field(
        None, description="synthetic task with a known long-range dependency, or source-code: text of Python's library"
    )
    path: str | None = Field(None, description="local .jsonl, .json, .csv, .parquet or .txt file")
    dataset: str | None = Field(None, description="hub id of a dataset")
    config: str | None = Field(None, description="configuration name of the hub dataset")
    split: str = Field("train", description="split of the hub dataset")
    haystack: Literal["noise", "prose"] = Field("noise", description="filler text of a generator; prose needs `text`")
    values: Literal["numbers", "uuids", "codes"] = Field(
        "numbers", description="values hidden in needles, key-value pairs and records"
    )
    weight: float = Field(1.0, gt=0, le=1000, description="share of the samples relative to the other sources")

    @model_validator(mode="after")
    def _one_kind(self) -> SourceRecipe:
        if sum(kind is not None for kind in (self.generator, self.path, self.dataset)) != 1:
            raise ValueError("a source names exactly one of generator, path, dataset")
        if self.values != "numbers" and self.generator not in ("needle", "multi-needle", "key-value", "records"):
            raise ValueError(f"only needles, key-value pairs and records have values; {self} has none to choose")
        return self

    def __str__(self) -> str:
        """Returns what it is read from, without its settings."""
        return str(self.generator or self.path or self.dataset)


class CalibrationRecipe(Section):
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
        description="sources of calibration samples: generators, data files and hub datasets, each with a weight",
    )
    text: str | None = Field(
        None, description="file or folder of long prose: the haystack of `prose` sources, and plain-text samples"
    )
    lengths: Lengths = Field(
        (512, 1024), min_length=1, max_length=8, description="lengths in tokens to profile, such as 1k,4k"
    )
    samples: int = Field(96, ge=1, le=100_000, description="number of calibration samples over all lengths")
    text_samples: int = Field(0, ge=0, le=100_000, description="number of additional plain-text samples from `text`")
    validation_samples: int = Field(12, ge=1, le=10_000, description="number of samples that plans are measured on")
    longer_samples: int = Field(
        2,
        ge=0,
        le=10_000,
        description="number of additional validation samples from generators, at twice the longest length",
    )
    answer_tokens: int = Field(32, ge=1, le=4096, description="maximum tokens of the dense model's answers")

    def hashed(self) -> dict[str, Any]:
        """Returns the settings that count for the fingerprint; of files the names alone, as their contents are hashed too."""
        sources = [{**part.hashed(), "path": file_name(part.path)} for part in self.sources]
        return {**super().hashed(), "text": file_name(self.text), "sources": sources}


class ProfileRecipe(Section):
    """How influence is estimated."""

    draws: int = Field(2, ge=1, le=64, description="random logit cotangents per sample")
    baselines: bool = Field(False, description="also record the statistics of moa and mass, estimators of others")
    heads: bool = Field(False, description="also record attention distance, sink mass and entropy of every KV head")
    anchors: int = Field(
        0, ge=0, le=64, description="number of earlier layers whose attention each layer is tried with"
    )
    gates: bool = Field(
        False,
        description="train a gate per KV head that scores tokens, and profile rules that keep the tokens it selects",
    )
    scorer: str = Field(
        INFLUENCE,
        min_length=1,
        max_length=64,
        description="score that gates are fitted to: influence, value-norm, keydiff, expected-attention, or an installed one",
    )
    gate_samples: int = Field(
        24,
        ge=2,
        le=100_000,
        description="number of extra samples, of the shortest length, that gates are trained on",
    )
    formats: Formats = Field(CODED, description="formats of keys and values to profile")
    centres: bool = Field(True, description="keep the keys of each KV head in codes less their mean")
    min_window: int = Field(32, description="smallest window of a KV head, tokens")

    @field_validator("min_window")
    @classmethod
    def _min_window(cls, value: int) -> int:
        if value not in MIN_WINDOWS:
            raise ValueError(f"min_window is one of {', '.join(map(str, MIN_WINDOWS))}")
        return value


class SearchRecipe(Section):
    """How the plan is found."""

    trials: int = Field(
        4, ge=1, le=100_000, description="number of measured trials, including trial 0, the surrogate's own plan"
    )
    timeout: float | None = Field(
        None,
        gt=0,
        description="time limit of a search in seconds, including loading; it stops at most one sample's measurement "
        "later",
    )
    formats: Formats | None = Field(
        None,
        description="formats of keys and values to choose from besides native, such as int8,int4; native for spans only; by "
        "default all that were profiled",
    )
    gates: bool = Field(True, description="allow rules that keep the tokens a gate selects, if they were profiled")
    share: Annotated[str, BeforeValidator(_share, json_schema_input_type=str | bool | int)] = Field(
        "off",
        description="layers that reuse the attention of an earlier one (their anchor) and cache only values: off, a number of "
        "layers, layers=12:11,18:17 (layer:anchor), or auto (some trials share and measured KL decides); needs a profile "
        "with anchors",
    )
    assume_repaired: bool = Field(
        False,
        description="predict and measure shared attention as it is after a repair of the shared layers; export with --repair",
    )
    classes: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="maximum number of different rules in a plan; KV heads with the same rule form a class. For servers that"
        " free memory per class, such as vLLM with 18; by default unlimited",
    )
    alternatives: bool = Field(True, description="also measure baselines, and the cost of a limit on classes")
    floors: dict[int, float] = Field({}, description="minimum share of its KV bytes that a layer keeps, per layer")
    storage: str | None = Field(
        None,
        description="study storage: a file ending in .journal, or a URL of SQLite or PostgreSQL; run the same command "
        "in other processes or on other machines to share the work",
    )

    @field_validator("floors")
    @classmethod
    def _floors(cls, value: dict[int, float]) -> dict[int, float]:
        for layer, share in value.items():
            if layer < 0 or not 0 < share <= 1:
                raise ValueError(f"floor {share:g} of layer {layer} is not a share in (0, 1] of a layer from 0 up")
        return value


class EvaluationRecipe(Section):
    """What is measured at the end."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(_tasks, json_schema_input_type=str | list[str])] = Field(
        ("code-question", "second-question", "needle-noise"), min_length=1, description="evaluation tasks"
    )
    lengths: Lengths = Field(
        (1024,), min_length=1, max_length=16, description="prompt lengths in tokens, such as 1k,4k"
    )
    prompts: int = Field(20, ge=1, le=100_000, description="number of prompts per task and length")


class HealRecipe(Section):
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
            "evaluations",
            "patience",
            "held_out",
        }
    )
    objective: HealObjective = Field(
        "kl",
        description="training loss: kl (KL to dense), or echoatt (EchoAtt's two stages: first hidden states, KL and tokens,"
        " then tokens alone)",
    )
    train: TrainedPart = Field(
        "lora",
        description="what is trained: full (all weights), lora (LoRA on linear layers, merged at the end), reuse (layers "
        "that reuse attention), or gates (only the gates that select tokens)",
    )
    samples: int = Field(
        96, ge=1, le=1_000_000, description="number of training samples; those of the profile come first"
    )
    text_share: float = Field(0.25, ge=0, le=1, description="share of plain text among them, if there is prose")
    lengths: Lengths | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="lengths of training samples in tokens; by default those of the profile",
    )
    steps: int = Field(100, ge=1, le=10_000_000, description="number of optimizer steps")
    max_minutes: float | None = Field(None, gt=0, description="time limit of the training in minutes")
    batch: int = Field(8192, ge=1, le=2**30, description="tokens per optimizer step")
    lr: float | None = Field(None, gt=0, le=1, description="peak learning rate; the default depends on `train`")
    rank: int = Field(16, ge=1, le=4096, description="LoRA rank")
    modules: Annotated[tuple[str, ...], BeforeValidator(_names, json_schema_input_type=str | list[str])] | None = Field(
        None,
        min_length=1,
        description="linear layers that get LoRA, such as o_proj,down_proj; by default all",
    )
    evaluations: int = Field(
        8, ge=1, le=10_000, description="number of times that held-out KL is measured during training"
    )
    patience: int = Field(3, ge=1, le=10_000, description="stop after this many evaluations without a new best")
    held_out: int | None = Field(None, ge=1, description="number of validation samples for held-out KL; by default all")

"""Options that several commands share, with one wording, and how their texts are read."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from moacompress.cli.recipe_options import recipe_option
from moacompress.core.errors import UsageError, did_you_mean
from moacompress.recipe_sections import Generator

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file.", show_default=False)
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="Recipe (YAML). Options override it.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start from scratch: remove what an earlier run left there.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the modelling code that comes with the model, for this run only."),
]
TensorParallel = Annotated[
    bool,
    typer.Option(
        "--tensor-parallel",
        help="Split every layer across the processes of torchrun. Without it, each process holds a whole model and they share "
        "the work.",
    ),
]
Budgets = Annotated[
    list[str] | None,
    recipe_option("budget", metavar="BUDGET", more="Repeatable.", collected=False),
]
MaxLossOption = Annotated[str | None, recipe_option("max_loss", metavar="LOSS", collected=False)]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="M@L",
        help="Limit on weights plus the KV cache at L tokens, such as 6GiB@8k. Short for --budget memory=6GiB@8k.",
    ),
]
BatchOption = Annotated[
    str | None, typer.Option("--batch", metavar="LIST", help="Concurrent requests, such as 1,8.", show_default=False)
]
LengthsOption = Annotated[str | None, recipe_option("calibration.lengths", metavar="LIST", states_default=False)]
FormatsOption = Annotated[str | None, recipe_option("search.formats", metavar="LIST")]
ScorerOption = Annotated[str | None, recipe_option("profile.scorer", metavar="NAME")]
GatesOption = Annotated[bool | None, recipe_option("profile.gates")]
ClassesOption = Annotated[int | None, recipe_option("search.classes", metavar="N")]
WeightsOption = Annotated[str | None, recipe_option("weights")]
HeadWeightsOption = Annotated[str | None, recipe_option("head_weights")]
Sources = Annotated[
    list[str] | None,
    recipe_option(
        "calibration.sources",
        "--source",
        metavar="NAME",
        more="Repeatable.",
        read=lambda given: read_sources(given),
        states_default=False,
    ),
]
Samples = Annotated[int | None, recipe_option("calibration.samples", states_default=False)]
TextSamples = Annotated[int | None, recipe_option("calibration.text_samples", states_default=False)]
ValidationSamples = Annotated[int | None, recipe_option("calibration.validation_samples", states_default=False)]
AllowOverlap = Annotated[
    bool,
    typer.Option(
        "--allow-overlap",
        help="Accept text that overlaps calibration by more than 1% (13-word sequences); the results are marked.",
    ),
]
Text = Annotated[str | None, recipe_option("calibration.text", metavar="PATH")]


def dry_run_option(text: str) -> Any:
    """Returns the option `--dry-run` of a command that times the model to estimate what it takes, with its help."""
    return typer.Option("--dry-run", help=text, callback=_wait_asleep)


Devices = Annotated[
    int | None,
    typer.Option(
        "--devices", metavar="N", min=1, help="With --dry-run: also estimate for N devices as fast as this one."
    ),
]


def _wait_asleep(dry_run: bool) -> bool:
    """Has OpenMP's threads sleep while they wait for one another; OpenMP reads this once, when torch is loaded.

    Spinning threads use processor time on a busy machine, which would be counted as work.
    """
    if dry_run and "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return dry_run


def split_list(text: str | None) -> tuple[str, ...] | None:
    """Returns the items of a list such as `dense,uniform`, or None if it was not given."""
    if text is None:
        return None
    return tuple(item.strip() for item in text.split(",") if item.strip())


def batch_sizes(text: str) -> tuple[int, ...]:
    """Returns numbers of rows such as `1,8`, without repeats, the smallest first.

    Raises:
        UsageError: one that is no number above 0.
    """
    items = split_list(text) or ()
    for item in items:
        if not item.isdecimal():
            raise UsageError(f"batch {item!r} is not a number of rows; give numbers such as 1,8")
        if not int(item):
            raise UsageError("batch is 0; it must be at least 1")
    return tuple(sorted({int(item) for item in items}))


def required_model(given: str | None, recipe_model: str | None) -> str:
    """Returns MODEL, from the command line or from the recipe.

    Raises:
        UsageError: neither names one.
    """
    model = given or recipe_model
    if not model:
        raise UsageError(
            "no model given; name one as MODEL (hub id, folder or .gguf file) or as `model:` in the recipe"
        )
    return model


def with_memory(budgets: list[str] | None, memory: str | None) -> list[str] | None:
    """Returns budgets with those of `--memory` behind them; None where neither is given."""
    from moacompress.rules.budget import MEMORY

    if memory is None:
        return budgets
    return [*(budgets or ()), ",".join(f"{MEMORY}{part.strip()}" for part in memory.split(","))]


def read_sources(given: list[str] | None) -> list[dict[str, Any]] | None:
    """Returns the recipe form of `--source`: generators, `generator-prose`, either with `-uuids` or `-codes`, files, hub sets.

    Raises:
        UsageError: a name that is none of them.
    """
    return [_source(name) for name in given] if given else None


def _source(name: str) -> dict[str, Any]:
    generators = get_args(Generator)
    task, values = name, {}
    for kind in ("uuids", "codes"):
        if name.endswith(f"-{kind}"):
            task, values = name.removesuffix(f"-{kind}"), {"values": kind}
    kind, _, haystack = task.rpartition("-")
    if task in generators:
        return {"generator": task, **values}
    if kind in generators and haystack in ("noise", "prose"):
        return {"generator": kind, "haystack": haystack, **values}
    from moacompress.calibration.data.data_rows import rows_named

    rows = rows_named(name)
    if rows is not None:
        return {"path": name} if rows.path else {"dataset": name}
    hint = did_you_mean(name, generators, f"it is a generator ({', '.join(generators)}), a file or a hub id")
    raise UsageError(f"unknown source {name!r}; {hint}")

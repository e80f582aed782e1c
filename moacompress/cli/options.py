"""Options that every command or several commands have, each with one wording, and how their texts are read."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from moacompress.core.errors import UsageError, did_you_mean
from moacompress.recipe import Recipe
from moacompress.recipe_sections import Generator


def _wait_asleep(dry_run: bool) -> bool:
    """Has OpenMP's threads sleep while they wait for one another; OpenMP reads this once, when torch is loaded.

    Spinning threads use processor time on a busy machine, which would be counted as work.
    """
    if dry_run and "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return dry_run


@dataclass(frozen=True)
class Common:
    """Options with one meaning in all commands: `COMMON_ALWAYS` in each of them, the others in those that take them."""

    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Recipe (YAML). Options override it.")
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set any key of the recipe, such as search.trials=1. Repeatable; `moacompress recipe init` writes all keys.",
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything and estimate time and memory; do nothing.", callback=_wait_asleep
        ),
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start from scratch: remove what an earlier run left there.")
    ] = False
    tensor_parallel: Annotated[
        bool,
        typer.Option(
            "--tensor-parallel",
            help="Split every layer across the processes of torchrun. Without it, each process holds a whole model and they "
            "share the work.",
        ),
    ] = False
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run the modelling code that comes with the model, for this run only."
        ),
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout, and nothing else.")] = False
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, show_default=False, help="Log more to stderr; -vv for everything."),
    ] = 0
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Write only errors to stderr.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and show tracebacks.")] = False
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log-file",
            metavar="FILE",
            help="Also append a full log to FILE; under torchrun, process 1 logs to run.1.log for run.log.",
        ),
    ] = None


COMMON_ALWAYS = ("as_json", "verbose", "quiet", "debug", "log_file")
"""Options of `Common` that every command has, and that have an effect whatever else is given."""

BatchOption = Annotated[
    str | None, typer.Option("--batch", metavar="LIST", help="Concurrent requests, such as 1,8.", show_default=False)
]
AllowOverlap = Annotated[
    bool,
    typer.Option(
        "--allow-overlap",
        help="Accept text that overlaps calibration by more than 1% (13-word sequences); the results are marked.",
    ),
]
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file.", show_default=False)
]


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


def required_model(recipe: Recipe) -> str:
    """Returns MODEL, from the command line or from the recipe.

    Raises:
        UsageError: neither names one.
    """
    if not recipe.model:
        raise UsageError(
            "no model given; name one as MODEL (hub id, folder or .gguf file) or as `model:` in the recipe"
        )
    return recipe.model


def read_sources(given: list[str]) -> list[dict[str, Any]]:
    """Returns the recipe form of `--source`: generators, `generator-prose`, either with `-uuids` or `-codes`, files, hub sets.

    Raises:
        UsageError: a name that is none of them.
    """
    return [_source(name) for name in given]


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

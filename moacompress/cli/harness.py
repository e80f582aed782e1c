"""What every verb runs in: common options, logs and bars on stderr, the result on stdout, errors as exit codes."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer
from rich.console import Console, RenderableType

from moacompress.cli.bars import RichProgress
from moacompress.core.errors import MoaCompressError
from moacompress.core.files import finite_json
from moacompress.core.progress import Progress
from moacompress.recipe import Recipe

P = ParamSpec("P")

INTERRUPTED = "interrupted; what was written is kept, and the same command goes on from there"
ANEW = INTERRUPTED + " without --overwrite, with which it starts anew"
WIDTH = 100
"""Columns of the output when it does not go to a terminal."""
QUIET_LIBRARIES = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment that keeps the libraries below from talking; what the user has set wins."""

logger = logging.getLogger("moacompress")


@dataclass(frozen=True)
class Common:
    """The options that every verb has."""

    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout and nothing else.")] = False
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more on stderr; -vv for all.")
    ] = 0
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and show the traceback of an error.")] = False
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None
    device: Annotated[str | None, typer.Option(help="Torch device, such as cpu or cuda.")] = None
    dtype: Annotated[
        str | None, typer.Option(help="To compute in: auto (the checkpoint's), float32, bfloat16, float16.")
    ] = None


@dataclass
class Output:
    """What a verb hands back.

    Attributes:
        data: the JSON object of `--json`.
        show: what a person sees instead.
        exit_code: 0, or 1 when the answer is no.
        said_elsewhere: nothing is printed, as another process of the same run prints it.
    """

    data: Mapping[str, Any]
    show: list[RenderableType] = field(default_factory=list)
    exit_code: int = 0
    said_elsewhere: bool = False


@dataclass(frozen=True)
class VerbRun:
    """One run of a verb: its common options and where it reports."""

    common: Common
    progress: Progress

    def recipe(self, file: Path | None = None, base: Recipe | None = None, **flags: Any) -> Recipe:
        """Returns the recipe of this run: flags win over `file`, which wins over `base`, which wins over the defaults.

        Args:
            file: the file of `--recipe`.
            base: the recipe where neither a file nor a flag says anything.
            **flags: dotted keys as in `Recipe.override`; None is not given.

        Raises:
            RecipeError: from the file or from a flag.
        """
        recipe = Recipe.load(file) if file is not None else base or Recipe()
        flags |= {"seed": self.common.seed, "device": self.common.device, "dtype": self.common.dtype}
        given = {name: value for name, value in flags.items() if value is not None}
        for name, value in given.items():
            logger.info("%s = %s, from the command line", name.replace("__", "."), value)
        return recipe.override(**given)


class Verb:
    """A command made of a function `(run, own options) -> Output`.

    Typer reads its signature: the function's own options and, after them, those of `Common`.
    """

    def __init__(self, function: Callable[Concatenate[VerbRun, P], Output], examples: tuple[str, ...]) -> None:
        self._work: Callable[..., Output] = function
        self.examples = examples
        self.help = inspect.getdoc(function) or ""
        self.epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
        self.__name__ = function.__name__
        self.__annotations__: dict[str, Any] = {}  # Typer asks for it; the signature has all
        self.__signature__ = inspect.Signature([*_own_parameters(function), *_common_parameters()])

    def __call__(self, **arguments: Any) -> None:
        """Runs the verb, prints its result and raises `typer.Exit` unless all is well."""
        common = Common(**{name: arguments.pop(name) for name in _COMMON})
        interrupted = ANEW if arguments.get("overwrite") else INTERRUPTED
        output = _guarded(lambda run: self._work(run, **arguments), common, interrupted)
        if output.said_elsewhere:
            pass
        elif common.as_json:
            print(json.dumps(finite_json(output.data), allow_nan=False), flush=True)
        else:
            console = out_console()
            for part in output.show:
                console.print(part, markup=False, soft_wrap=isinstance(part, str))
        if output.exit_code:
            raise typer.Exit(output.exit_code)


def verb(*examples: str) -> Callable[[Callable[Concatenate[VerbRun, P], Output]], Verb]:
    """Makes a `Verb` of the decorated function; `examples` end its help and can be run as they are."""
    return lambda function: Verb(function, examples)


def out_console() -> Console:
    """Returns the console on stdout: as wide as the terminal, or `WIDTH` columns of plain text."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def error_console() -> Console:
    """Returns the console on stderr."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH, highlight=False)


def say(message: str) -> None:
    """Writes one line to stderr."""
    print("moacompress: " + " ".join(message.split()), file=sys.stderr, flush=True)


_COMMON = tuple(item.name for item in fields(Common))


def _own_parameters(function: Callable[..., Output]) -> list[inspect.Parameter]:
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]


def _common_parameters() -> list[inspect.Parameter]:
    parameters = inspect.signature(Common, eval_str=True).parameters.values()
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]


def _guarded(work: Callable[[VerbRun], Output], common: Common, interrupted: str) -> Output:
    """Runs a verb; whatever it raises becomes one line on stderr and an exit code."""
    console = error_console()
    progress = Progress() if common.quiet else RichProgress(console)
    try:
        # what a library prints must not mix with the result
        with _quiet_libraries(common, console), contextlib.redirect_stdout(sys.stderr):
            return work(VerbRun(common, progress))
    except KeyboardInterrupt:
        progress.done()
        say(interrupted)
        raise typer.Exit(130) from None
    except Exception as error:
        progress.done()
        if common.debug:
            traceback.print_exc()
        if isinstance(error, MoaCompressError):
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        say(f"error: {type(error).__name__}: {error}" + ("" if common.debug else "; run again with --debug"))
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _quiet_libraries(common: Common, console: Console) -> Iterator[None]:
    level = logging.DEBUG if common.debug or common.verbose > 1 else logging.INFO if common.verbose else logging.WARNING
    handler = _ConsoleHandler(console)
    logger.addHandler(handler)
    before = logger.level, logger.propagate
    logger.setLevel(logging.ERROR if common.quiet else level)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            if level > logging.DEBUG:
                for name, value in QUIET_LIBRARIES.items():
                    os.environ.setdefault(name, value)
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _ConsoleHandler(logging.Handler):
    """Writes records through the console that the bars are on, so that they do not tear each other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"moacompress: {record.levelname.lower()}: {record.getMessage()}"
            self._console.print(text, markup=False, soft_wrap=True)
        except Exception:
            self.handleError(record)

"""What every command runs in: common options, logs and bars on stderr, the result on stdout, errors as exit codes."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TextIO

import typer
from rich.console import Console, RenderableType

from moacompress.cli.bars import RichProgress
from moacompress.cli.kernel_line import kernel_line
from moacompress.cli.option_rules import GivenOptions, given_options
from moacompress.cli.options import COMMON_ALWAYS, Common
from moacompress.cli.recipe_options import read_options, read_settings, recipe_parameter
from moacompress.cli.result_stream import for_the_result
from moacompress.core.errors import ArtefactError, MoaCompressError, UsageError, one_line
from moacompress.core.files import finite_json
from moacompress.core.printable import printable
from moacompress.core.progress import Progress
from moacompress.core.ranks import named_rank, rank, splitting, world_size
from moacompress.core.urls import without_password
from moacompress.recipe import Recipe

P = ParamSpec("P")

INTERRUPTED = "interrupted; what was written is kept, and the same command resumes from there"
FROM_SCRATCH = INTERRUPTED + " without --overwrite, with which it starts from scratch"
PROGRAM = "moacompress"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_FILE_ALONE = "file_alone"
"""Attribute of records that only the file of `--log-file` gets: a person is told in another way."""
WIDTH = 100
"""Columns of the output when it does not go to a terminal."""
QUIET_LIBRARIES = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment that keeps the libraries below from talking; what the user has set wins."""

logger = logging.getLogger("moacompress")


@dataclass
class Output:
    """What a command hands back."""

    data: Mapping[str, Any]  # the JSON object of `--json`
    show: list[RenderableType] = field(default_factory=list)  # what a person sees instead
    exit_code: int = 0  # 1 when the answer is no


def readable(text: str) -> str:
    """Returns text with the bytes that are no UTF-8 replaced, which Python hands on as halves of characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(frozen=True)
class CommandRun:
    """One run of a command: its common options, where it reports, and the person who started it."""

    common: Common
    progress: Progress
    out: TextIO = field(default_factory=lambda: sys.stdout)  # which is not `sys.stdout` while a command runs
    device_check: Callable[[str], None] = lambda device: None  # refuses a device that the command cannot use
    given: Mapping[str, Any] = field(default_factory=dict)  # what its options set of a recipe, see `Recipe.override`
    options: GivenOptions = field(default_factory=GivenOptions)  # which of its options the command line names

    @property
    def how(self) -> dict[str, Any]:
        """Arguments with one meaning in all functions that do the work of a command: how it is run and who is told."""
        return {
            "overwrite": self.common.overwrite,
            "trust_remote_code": self.common.trust_remote_code,
            "progress": self.progress,
        }

    def write(self, text: str) -> None:
        """Writes a piece of what the person asked for."""
        self.out.write(printable(text))
        self.out.flush()

    def note(self, text: str) -> None:
        """Writes a remark to stderr."""
        error_console().print(printable(text), style="dim", markup=False, soft_wrap=True)

    def read(self, prompt: str) -> str | None:
        """Returns the next line of the input, without blanks around it; None at its end. A person sees the prompt."""
        if sys.stdin is None:  # it was closed
            return None
        if sys.stdin.isatty():
            self.write(prompt)
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        with contextlib.suppress(io.UnsupportedOperation):  # which it is once something has been read
            if reconfigure is not None:
                reconfigure(errors="replace")
        line = sys.stdin.readline()
        return readable(line).strip() if line else None

    def recipe(self, base: Recipe | None = None, *, file: Path | None = None, **flags: Any) -> Recipe:
        """Returns the recipe of this run: options win over the file, which wins over `base`, which wins over the defaults.

        The file is that of `--recipe` unless another is given. `flags` are what the command sets beside its options, as
        `Recipe.override` takes them.

        Raises:
            RecipeError: from the file or from a flag.
            UsageError: a device that the command cannot use, or an option that has no effect under this recipe.
        """
        file = file or self.common.recipe
        recipe = Recipe.load(file) if file is not None else base or Recipe()
        given = {**self.given, **{name: value for name, value in flags.items() if value is not None}}
        for name, value in given.items():
            logger.info("%s = %s, from the command line", name.replace("__", "."), value)
        recipe = recipe.override(**given)
        self.options.check(recipe)
        self.device_check(recipe.device)
        return recipe


class Command:
    """A command made of a function `(run, own options) -> Output`.

    Typer reads its signature: the function's own options and, after them, those of the recipe and of `Common`.

    Args:
        function: does the work.
        examples: end its help.
        settings: keys of the recipe that it has options for; `CommandRun.recipe` sets them.
        takes: options of `Common` that it takes beside `COMMON_ALWAYS`.
        states_defaults: whether the help says the recipe's defaults; not where the command begins with another recipe.
        computes: whether it runs a model, so that its first line says with which kernels.
        maps: whether the device can be a device map.
        shared: whether the processes of `torchrun` do it together. The first of them prints, and whichever fails first.
    """

    def __init__(
        self,
        function: Callable[Concatenate[CommandRun, P], Output],
        examples: Sequence[str] = (),
        *,
        settings: Sequence[str] = (),
        takes: Sequence[str] = (),
        states_defaults: bool = True,
        computes: bool = False,
        shared: bool = False,
        maps: bool = False,
    ) -> None:
        self._work: Callable[..., Output] = function
        self._computes, self._shared, self._maps = computes, shared, maps
        self.examples = examples
        self.help = inspect.getdoc(function) or ""
        self.epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
        self.__name__ = function.__name__
        self.__annotations__: dict[str, Any] = {}  # Typer asks for it; the signature has all
        of_recipe = [recipe_parameter(key, states_default=states_defaults) for key in settings]
        common = [part for part in _keyword_only(Common) if part.name in (*takes, *COMMON_ALWAYS)]
        self.keys = {part.name: key for part, key in zip(of_recipe, settings, strict=True)}
        self._common = [part.name for part in common]
        self.__signature__ = inspect.Signature([_CONTEXT, *_keyword_only(function)[1:], *of_recipe, *common])

    def __call__(self, context: typer.Context, **arguments: Any) -> None:
        """Runs the command, prints its result and raises `typer.Exit` unless all is well."""
        options = given_options(context, self.keys)
        common = Common(**{name: arguments.pop(name) for name in self._common})
        settings = {name: arguments.pop(name) for name in self.keys}
        try:
            rank()
        except UsageError as error:  # the environment has a rank, or a number of processes, that is none
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        output = _guarded(
            lambda run: self._checked(replace(run, options=options), settings, arguments),
            common,
            first_line=partial(kernel_line, settings.get("device")) if self._computes else None,
        )
        if not rank():
            try:
                _print(output, common.as_json)
            except BrokenPipeError:
                raise  # whoever reads has seen enough
            except (OSError, UnicodeError) as error:
                say(f"error: the result cannot be printed: {one_line(error)}")
                raise typer.Exit(1) from None
        # torchrun ends the others when one fails, even before the first has printed
        if output.exit_code and not rank():
            raise typer.Exit(output.exit_code)

    def _checked(self, run: CommandRun, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> Output:
        """Runs the command, once its options go together, and its device and the other processes of the run are there."""
        run.options.check()
        splits = run.common.tensor_parallel
        if splits and world_size() == 1:
            raise UsageError(
                "--tensor-parallel splits a model over the processes of torchrun, and there is one; start it with torchrun "
                "--nproc-per-node N -m moacompress"
            )
        if world_size() > 1:
            if not (self._shared or splits):
                raise UsageError(
                    f"{self.__name__} runs in one process, and this is one of {world_size()}; start it without torchrun "
                    "(or unset WORLD_SIZE)"
                )
            from moacompress.models.processes import join

            join()
        given = read_settings(run.common.settings or ()) | read_options(self.keys, settings)
        device = given.get("device")
        if device is not None and device != "cpu":
            from moacompress.models.placement import checked_placement

            self._check_map(device)
            checked_placement(device)
        with splitting(splits):
            return self._work(replace(run, device_check=self._check_map, given=given), **arguments)

    def _check_map(self, device: str) -> None:
        """Refuses a device map that the command cannot use.

        Raises:
            UsageError: it is one.
        """
        if device != "cpu" and not self._maps:
            from moacompress.models.placement import is_device_map

            if is_device_map(device):
                raise UsageError(
                    f"{self.__name__} keeps a model on one device, and {device} is a device map; give --device cpu or cuda"
                )


def command(*examples: str, **options: Any) -> Callable[[Callable[Concatenate[CommandRun, P], Output]], Command]:
    """Makes a `Command` of the decorated function; `examples` end its help and can be run as they are."""
    return lambda function: Command(function, examples, **options)


def add_command(app: typer.Typer, name: str, command: Command) -> None:
    """Adds a command to an app, with its help."""
    app.command(name, help=command.help, epilog=command.epilog)(command)


def group(text: str, commands: Mapping[str, Command]) -> typer.Typer:
    """Returns a command that has commands of its own, with its help."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback(help=text)(lambda: None)
    for name, each in commands.items():
        add_command(app, name, each)
    return app


def resumes_with(argv: Sequence[str], overwrite: bool) -> str:
    """Returns what is said after Ctrl-C: the command that resumes, without `--overwrite`, where one started this process."""
    if Path(argv[0]).name not in (PROGRAM, "__main__.py"):
        return FROM_SCRATCH if overwrite else INTERRUPTED
    command = shlex.join([PROGRAM, *(without_password(part) for part in argv[1:] if part != "--overwrite")])
    return f"interrupted; what was written is kept; resume with: {command}"


def error_console() -> Console:
    """Returns the console on stderr."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH, highlight=False, emoji=False)


def say(message: str) -> None:
    """Writes one line to stderr."""
    print("moacompress: " + printable(" ".join(without_password(message).split())), file=sys.stderr, flush=True)


_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


def _print(output: Output, as_json: bool) -> None:
    """Prints the result, as one line of JSON or for people.

    Raises:
        OSError, UnicodeError: standard output takes no more, or not these characters.
    """
    if as_json:
        print(json.dumps(finite_json(output.data), allow_nan=False), flush=True)
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, emoji=False)
    for part in output.show:
        if isinstance(part, str):
            console.print(printable(part), markup=False, soft_wrap=True)
        else:
            console.print(part, markup=False)
    sys.stdout.flush()


def _keyword_only(function: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]


def _guarded(work: Callable[[CommandRun], Output], common: Common, first_line: Callable[[], str] | None) -> Output:
    """Runs a command; whatever it raises becomes one line on stderr and an exit code."""
    console = error_console()
    progress = Progress() if common.quiet or rank() else RichProgress(console, first_line)
    try:
        with _quiet_libraries(common, console), for_the_result() as out:
            try:
                return work(CommandRun(common, progress, out))
            except Exception:
                if common.log_file is not None:
                    logger.exception("failed%s", named_rank(), extra={_FILE_ALONE: True})
                raise
    except KeyboardInterrupt:
        progress.done()
        if not rank():
            say(resumes_with(sys.argv, overwrite=common.overwrite))
        raise typer.Exit(130) from None
    except Exception as error:
        progress.done()
        with _alone_in_saying_why() as is_first:
            if is_first:
                _say_why(error, common.debug)
        raise typer.Exit(error.exit_code if isinstance(error, MoaCompressError) else 1) from None
    finally:
        if world_size() > 1:
            from moacompress.models.processes import leave

            leave()


def _say_why(error: Exception, debug: bool) -> None:
    if debug:
        print(printable(without_password("".join(traceback.format_exception(error)))), file=sys.stderr, end="")
    if isinstance(error, MoaCompressError):
        say(f"error{named_rank()}: {error}")
    else:
        say(f"error{named_rank()}: {type(error).__name__}: {error}" + ("" if debug else "; run again with --debug"))


@contextlib.contextmanager
def _alone_in_saying_why() -> Iterator[bool]:
    """Yields whether this is the process of the run whose message counts; the others end after it was said."""
    if world_size() == 1:
        yield True
        return
    from moacompress.models import processes

    first = processes.fails_first()
    yield first
    if first:
        processes.said_why()
    else:
        processes.await_message()


@contextlib.contextmanager
def _quiet_libraries(common: Common, console: Console) -> Iterator[None]:
    level = logging.DEBUG if common.debug or common.verbose > 1 else logging.INFO if common.verbose else logging.WARNING
    handlers: list[logging.Handler] = [_ConsoleHandler(console)]
    handlers[0].setLevel(logging.CRITICAL if rank() else logging.ERROR if common.quiet else level)
    if common.log_file is not None:
        path = common.log_file  # the second process of a run logs to `run.1.log` for `run.log`
        handlers.append(_log_to(path.with_name(f"{path.stem}.{rank()}{path.suffix}") if rank() else path))
    for handler in handlers:
        logger.addHandler(handler)
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if common.log_file is not None else handlers[0].level)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            if level > logging.DEBUG:
                for name, value in QUIET_LIBRARIES.items():
                    os.environ.setdefault(name, value)
                warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # a disk that is full costs the log, and no result
                handler.close()
        logger.level, logger.propagate = before


def _log_to(path: Path) -> logging.Handler:
    """Returns what writes all records behind what a file holds.

    Raises:
        ArtefactError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise ArtefactError(f"cannot write the log {path}: {error.strerror}") from error
    handler.setFormatter(_Formatter(LOG_FORMAT))
    return handler


class _Formatter(logging.Formatter):
    """Writes no password that a message or a traceback has in a URL."""

    def format(self, record: logging.LogRecord) -> str:
        return without_password(super().format(record))


class _LogFile(logging.FileHandler):
    """A log that says once that it cannot be written, and lets the command go on."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Is called where a record could not be written."""
        if not self._failed:
            self._failed = True
            say(f"warning: the log {self.baseFilename} cannot be written: {sys.exc_info()[1]}")


class _ConsoleHandler(logging.Handler):
    """Writes records through the console that the bars are on, so that they do not tear each other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, _FILE_ALONE):
            return
        try:
            text = f"moacompress: {record.levelname.lower()}: {without_password(record.getMessage())}"
            self._console.print(printable(text), markup=False, soft_wrap=True)
        except Exception:
            self.handleError(record)

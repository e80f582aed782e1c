"""The command line: one file per command, and the harness that all commands run in. No logic of the library lives here.

Nothing here imports torch, transformers, optuna or datasets before a command runs, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import moacompress
from moacompress.cli import (
    bench,
    chat,
    compress,
    convert,
    data,
    demo,
    doctor,
    eval,
    export,
    heal,
    inspect,
    profile,
    recipe,
    report,
    search,
)
from moacompress.cli.harness import add_command, resumes_with, say
from moacompress.cli.result_stream import open_streams

COMMANDS = {
    "profile": profile.profile,
    "search": search.search,
    "export": export.export,
    "heal": heal.heal,
    "compress": compress.compress,
    "eval": eval.evaluate,
    "bench": bench.bench,
    "inspect": inspect.inspect,
    "report": report.report,
    "convert": convert.convert,
    "chat": chat.chat,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}
GROUPS = {"data": data.app, "recipe": recipe.app}
"""Commands that have commands of their own."""

app = typer.Typer(
    name="moacompress",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _name, _command in COMMANDS.items():
    add_command(app, _name, _command)
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"moacompress {moacompress.__version__}")
        raise typer.Exit


@app.callback(
    epilog="\b\nExamples:\n"
    "  moacompress doctor path/to/model\n"
    "  moacompress compress path/to/model --budget 25% -o runs/mine\n"
    "  moacompress inspect runs/mine"
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Per-head KV-cache compression: windows, integer codes and learned eviction, searched under a budget of bytes."""


def main() -> None:
    """Runs the command line."""
    open_streams()
    try:
        app()
    except KeyboardInterrupt:
        say(resumes_with(sys.argv, overwrite=False))
        sys.exit(130)

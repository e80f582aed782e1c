"""Commands run in this process: what they print, what they answer as JSON, and how they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner, Result

from moacompress.cli import app


def invoke(*arguments: Any, **more: Any) -> Result:
    """Runs a command."""
    return CliRunner().invoke(app, [*map(str, arguments)], **more)


def answer(*arguments: Any) -> Any:
    """Runs a command with `--json` and returns its object, which is one line."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def all_commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every command with its name, those of groups too."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def problem(*arguments: Any, exit_code: int = 1) -> str:
    """Runs a command that must fail, and returns the one line that it says."""
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (exit_code, ""), done.output
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("moacompress: error: ")]
    return said

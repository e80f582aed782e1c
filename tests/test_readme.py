"""Commands in the README and in docs parse, Python there names what exists, and links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer
from torch.distributed.run import get_args_parser

import moacompress
from moacompress.cli import app
from tests.doc_commands import BLOCKS, COMMANDS, ROOT

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
TODAY = "".join(path.read_text("utf-8") for path in DOCUMENTS if path.parent.name != "lab")
"""All pages but the notebook's, whose scripts may be gone."""
SOURCES = ("moacompress", "search", "calibration", "benchmarks", "recipes", "tests")
TORCHRUN = {
    name
    for action in get_args_parser()._actions
    for option in action.option_strings
    for name in (option, option.replace("_", "-"))
}
"""Options of `torchrun`."""


def parse(command: str, *arguments: str) -> None:
    """Parses a command line as the program does, and runs nothing."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands[command].make_context(command, list(arguments))


def test_there_are_commands() -> None:
    commands = {command.split()[1] for command in COMMANDS if command.startswith("moacompress ")}
    assert {"doctor", "compress", "inspect", "profile", "search", "export", "eval"} <= commands


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    words = shlex.split(command)
    program, *arguments = itertools.dropwhile(lambda word: re.fullmatch(r"MOACOMPRESS_[A-Z_]+=\w+", word), words)
    if program == "moacompress":
        parse(*arguments)
    elif program == "torchrun":
        start = arguments.index("-m")
        assert arguments[start + 1] == "moacompress"
        assert set(re.findall(r"--[\w-]+", " ".join(arguments[:start]))) <= TORCHRUN
        parse(*arguments[start + 2 :])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments if "=" not in target)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file() or arguments[0] not in TODAY
    elif program == "transformers":
        from transformers.cli.serve import Serve

        options = {word[2:].replace("-", "_") for word in arguments if word.startswith("--")}
        assert arguments[0] == "serve"
        assert options <= set(inspect.signature(Serve.__init__).parameters)
    else:
        assert Path(program).name in ("pip", "python", "python3.11", "optuna-dashboard")


def test_every_verb_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)", (ROOT / "docs" / "environment.md").read_text("utf-8"), re.MULTILINE)
    assert set(typer.main.get_command(app).commands) <= set(rows)  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moacompress":
            assert node.attr in moacompress.__all__


def anchors(page: str) -> list[str]:
    """Returns what a link to this page may end in: its headings, as GitHub names them, and its `<a id>`."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+?)\s*$", page, re.MULTILINE)
    named = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return named + re.findall(r'<a id="([^"]+)"', page)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    page = path.read_text("utf-8")
    assert [name for name in re.findall(r'<a id="([^"]+)"', page) if anchors(page).count(name) > 1] == []
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text("utf-8")), target


def test_pages_that_code_names() -> None:
    sources = [
        path
        for folder in SOURCES
        for path in (ROOT / folder).glob("**/*")
        if path.suffix in (".py", ".h", ".cpp", ".yaml")
    ]
    named = {name for path in sources for name in re.findall(r"docs/[\w/-]+\.md", path.read_text("utf-8"))}
    assert len(named) >= 4
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

"""How large the tree is: lines by what they are, functions, words of the docs, parameters of commands and keys of recipes.

python benchmarks/size.py
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("moacompress", "calibration", "search", "_moacompress_autoload.py", "setup.py")
"""Top-level names of what is installed; the rest of the Python is tests and benchmarks."""
CPP = (".cpp", ".h", ".inl")
MANY = 7
"""Parameters above which a function has many."""


def main() -> None:
    """Prints the counts."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    python = {name: (ROOT / name).read_text("utf-8") for name in files if name.endswith(".py") and not is_link(name)}
    for part, names in (
        ("product", [name for name in python if name.split("/")[0] in PRODUCT]),
        ("tests", [name for name in python if name.startswith("tests/")]),
        ("benchmarks", [name for name in python if name.startswith("benchmarks/")]),
    ):
        lines: Counter[str] = sum((kinds(python[name]) for name in names), Counter())
        print(
            f"{part}: {len(names)} files, {lines.total()} lines ({', '.join(f'{n} {kind}' for kind, n in lines.items())})"
        )
        found = [one for name in names for one in functions(python[name])]
        print(
            f"  {len(found)} functions, median {statistics.median(map(length, found)):.0f} lines, "
            f"{sum(parameters(one) > MANY for one in found)} with more than {MANY} parameters, "
            f"{sum('bytes' in one.name for one in found)} named *bytes*"
        )
    print(f"C++: {sum((ROOT / name).read_text('utf-8').count(chr(10)) for name in files if name.endswith(CPP))} lines")
    pages = [name for name in files if name.startswith("docs/") and name.endswith(".md")]
    for part, here in (("docs", [name for name in pages if "/lab/" not in name]), ("README", ["README.md"])):
        print(f"{part}: {sum(len((ROOT / name).read_text('utf-8').split()) for name in here)} words")
    print(
        f"commands: {command_parameters(python)} parameters by hand, {shown_parameters()} with those made from the recipe "
        f"and the harness; recipes: {recipe_keys()} keys"
    )


def is_link(name: str) -> bool:
    """Whether a file is reached through a link, so that it is counted elsewhere."""
    path = ROOT / name
    return path.resolve() != path


def kinds(source: str) -> Counter[str]:
    """Returns the lines of a file by kind: code, imports, docstrings, comments and blank ones."""
    found = ["code" if line.strip() else "blank" for line in source.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            found[token.start[0] - 1] = "comments"
    for node in ast.walk(ast.parse(source)):
        kind = "imports" if isinstance(node, ast.Import | ast.ImportFrom) else "docstrings" if is_text(node) else None
        if kind is not None:
            begin, end = node.lineno - 1, node.end_lineno  # type: ignore[attr-defined]
            found[begin:end] = [kind] * (end - begin)
    return Counter(found)


def is_text(node: ast.AST) -> bool:
    """Whether a node is a string that stands alone: a docstring, of an attribute too."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields the functions and methods of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the lines of a function without its docstring."""
    first = function.body[1:] if is_text(function.body[0]) else function.body
    return (first[-1].end_lineno or 0) - first[0].lineno + 1 if first else 0


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns how many parameters a function has, `self` included."""
    return len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs)


def command_parameters(python: dict[str, str]) -> int:
    """Returns the parameters of the functions that are commands."""
    return sum(
        parameters(one)
        for name, source in python.items()
        if name.startswith("moacompress/cli/")
        for one in functions(source)
        if any(ast.unparse(decorator).startswith("command(") for decorator in one.decorator_list)
    )


def shown_parameters() -> int:
    """Returns the options and arguments of all commands of `moacompress`."""
    import typer

    from moacompress.cli import app

    return sum(len(command.params) for command in commands(typer.main.get_command(app)))


def commands(command: Any) -> Iterator[Any]:
    """Yields the commands of a group, of its groups too."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield command
        return
    for one in inner.values():
        yield from commands(one)


def recipe_keys() -> int:
    """Returns the keys that a recipe may have, those of its sections included and the sections themselves left out."""
    from pydantic import BaseModel

    from moacompress.recipe import Recipe

    def count(model: type[BaseModel]) -> int:
        return sum(
            count(field.annotation)
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            else 1
            for field in model.model_fields.values()
        )

    return count(Recipe)


if __name__ == "__main__":
    main()

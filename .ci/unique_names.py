"""One name for one thing: no two classes, type aliases or modules of the product have the same name.

    python .ci/unique_names.py

A module is a file: packages and `__init__` may be called like one (`search/`, and the file of the command `search`). A file
that only hands on names, for those who know them from there, defines nothing and is left out, and so are scripts outside of the
package. Exits with 1 and one line for every name that is there twice.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("moacompress", "search", "calibration")
"""Folders of the product; links to others within them are not followed."""


def product_files(root: Path) -> Iterator[Path]:
    """Yields the product's Python files, each once."""
    pending = [root / package for package in PACKAGES]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir() and not path.is_symlink():
                pending.append(path)
            elif path.suffix == ".py":
                yield path


def defined_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields the names of a module's classes, at any depth, and of its type aliases and variables, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.lineno
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "TypeAlias" in ast.unparse(statement.annotation):
                yield statement.target.id, statement.lineno
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if _is_type_name(name):
                yield name, statement.lineno


def _is_type_name(name: str) -> bool:
    bare = name.lstrip("_")
    return bare[:1].isupper() and not bare.isupper()


def only_hands_on(tree: ast.Module) -> bool:
    """Returns whether a module has nothing but a docstring, imports and `__all__`."""

    def passes(statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Assign):
            return ast.unparse(statement.targets[0]) == "__all__"
        return isinstance(statement, ast.Import | ast.ImportFrom) or (
            isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        )

    return all(map(passes, tree.body))


def repeated(root: Path) -> list[str]:
    """Returns one line for every name that is there twice."""
    modules, names = defaultdict(list), defaultdict(list)
    for path in sorted(product_files(root)):
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        if not (path.stem.startswith("__") or only_hands_on(tree)):
            modules[path.stem].append(where)
        for name, line in defined_names(tree):
            names[name].append(f"{where}:{line}")
    return [
        f"{kind} {name} is there {len(places)} times: {', '.join(places)}"
        for kind, found in (("module", modules), ("class or type", names))
        for name, places in sorted(found.items())
        if len(places) > 1
    ]


def main() -> int:
    """Prints what is there twice; returns the exit code."""
    found = repeated(Path(__file__).resolve().parent.parent)
    print("\n".join(found) or "no name is there twice")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

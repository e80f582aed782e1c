"""The names of what a run leaves stand in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from moacompress.core import artefact_names
from moacompress.core.artefact_names import (
    front_file,
    of_audit,
    of_bench,
    of_compress,
    of_demo,
    of_evaluation,
    of_profile,
    of_search,
    plan_named,
)

ROOT = Path(__file__).resolve().parents[2]
NAMES = {value for name, value in vars(artefact_names).items() if name.isupper()}
DERIVED = {
    "".join(path.suffixes)
    for listed in (of_search, of_audit, of_evaluation, of_bench)
    for path in (*listed(Path("x")), front_file(Path("x")))
}
PRODUCT = sorted(
    {path.resolve() for top in ("moacompress", "search", "calibration") for path in (ROOT / top).rglob("*.py")}
)


def spelled(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of every string in a module that spells the name of an artefact."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if text in {name for name in NAMES if "." in name} or text in DERIVED - {".json", ".html", ""}:
                yield node.lineno, text
        match node:  # a path of a folder: out / "model"
            case ast.BinOp(op=ast.Div(), right=ast.Constant(value=str(text))) if text in NAMES:
                yield node.lineno, text


def test_nothing_else_spells_them() -> None:
    assert len(PRODUCT) > 90
    found = {
        f"{path.relative_to(ROOT)}:{line}": text
        for path in PRODUCT
        if path != Path(artefact_names.__file__).resolve()
        for line, text in spelled(path)
    }
    assert found == {}


@pytest.mark.parametrize("out", ["plan.json", "plan-12.5.json", "deep/a[1].json", "*.json", "plan"])
def test_names_beside_a_plan_are_its_own(out: str, tmp_path: Path) -> None:
    plan = tmp_path / out
    listed = [*of_search(plan), front_file(plan)]
    assert len(set(listed)) == len(listed)
    assert all(path.parent == plan.parent and path.name.startswith(plan.stem) for path in listed)
    assert not set(listed) & set(of_search(plan_named(plan, "25")))


def test_everything_is_listed_once_and_within(tmp_path: Path) -> None:
    for listed in (of_compress(tmp_path), of_demo(tmp_path), of_profile(tmp_path)):
        assert len(set(listed)) == len(listed)
        assert all(path.is_relative_to(tmp_path) for path in listed)
    assert of_compress(tmp_path)[-1] == tmp_path / "recipe.json"  # the mark goes last
    assert of_demo(tmp_path)[-1] == tmp_path / "demo.json"
    assert of_profile(tmp_path)[-1] == tmp_path / "profile.json"

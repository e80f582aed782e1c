"""The notebook of the documentation runs from its first cell to its last; in `make test` with a tiny model."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import moacompress

ROOT = Path(__file__).resolve().parent.parent


def run(model: Path, lengths: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the notebook with another model, in a folder of its own, and returns it with its outputs."""
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("LENGTHS", lengths)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(work)}}).execute()
    return notebook


def shown(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text", "") or str(output.get("data", {})) for output in outputs)


TABLES = (
    "KL(dense || plan) on validation samples",  # of compress_
    "Kept share of each KV head",  # of inspect
    "Tasks, mean and 95% interval",  # of evaluate
    "Decode, ms a step",  # of benchmark
    "Exact match (NLL of the answer",  # of compress
)


def check(notebook: Any) -> None:
    text = shown(notebook)
    pages = [
        output["data"].get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    for title in TABLES:  # as tables, and not as names of classes or as long dicts
        assert any(title in page for page in pages), title
    share = re.search(r"bytes at \d+ tokens; dense [\d,]+: ([\d.]+)%", text)
    assert share is not None
    assert float(share[1]) <= 25
    assert "\nTrue\n" in text  # the checkpoint answers as the model that it was saved from


def test_the_notebook_is_clean() -> None:
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_its_recipes_are_of_keys_that_there_are() -> None:
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    made = [node for node in ast.parse(code).body if isinstance(node, ast.Assign) and "Recipe()" in ast.unparse(node)]
    assert len(made) == 1
    found = eval(ast.unparse(made[0].value), {"moacompress": moacompress, "MODEL": "m", "LENGTHS": [512]})
    assert isinstance(found, moacompress.Recipe)


@pytest.mark.heavy
def test_the_notebook_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(run(tiny_folder, "600,700", tmp_path, monkeypatch))


@pytest.mark.heavy
@pytest.mark.real
def test_the_notebook_runs_on_a_real_model(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(run(smollm2, "512,1k", tmp_path, monkeypatch))

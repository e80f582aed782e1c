"""The table of docs/scale.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scale(load_script: Callable[[Path], Any]) -> Any:
    return load_script(ROOT / "benchmarks" / "scale.py")


def test_the_models_are_as_large_as_they_are_called(scale: Any) -> None:
    for made, parameters in zip(scale.MODELS.values(), (1.24e9, 8.03e9, 70.6e9, 405.9e9), strict=True):
        assert made().parameters == pytest.approx(parameters, rel=0.005)


def test_the_table_is_in_the_docs(scale: Any) -> None:
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    assert scale.table(scale.rules_of(scale.RECIPE)) in page
    hours = scale.table(10, 1000.0).splitlines()[2].split(" | ")[1]
    flops, _, rest = hours.partition(" (")
    assert float(rest.removesuffix(" h)")) == pytest.approx(float(flops) * 1e15 / 1e15 / 3600, rel=0.06)

"""Tables of what a search came to: MoA's number never stands without the uniform window's, nor as a verdict on MoA."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moacompress.report.page.figures import baselines_picture
from moacompress.report.search_tables import MOA_NOTE, kl_table

KL = {"plan": 0.027, "uniform": 0.75, "moa": 1.55}
BYTES = {"1024": {"dense": 400, "plan": 100}}


def said(kl: dict[str, float | None]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(kl_table(kl, BYTES))
    return capture.get()


def test_moas_number_says_that_its_estimator_is_rebuilt() -> None:
    text = said({**KL})
    assert re.search(r"uniform window +0\.75 ", text)
    assert "MoA's estimator, rebuilt" in text
    assert " ".join(MOA_NOTE.split()) in " ".join(text.split())


@pytest.mark.parametrize("moa", [{}, {"moa": None}])
def test_without_its_number_nothing_is_said(moa: dict[str, float | None]) -> None:
    assert MOA_NOTE[:30] not in said({"plan": 0.027, "uniform": 0.75, **moa})


@pytest.mark.parametrize("named", [True, False])
def test_the_page_says_it_too(named: bool) -> None:
    kl = KL if named else {"plan": 0.027, "uniform": 0.75}
    found: Any = SimpleNamespace(explanation=None, plan=SimpleNamespace(quality={"measured_harm": kl, "samples": 28}))
    picture = baselines_picture(found)
    assert picture is not None
    assert (MOA_NOTE in picture.note) is named

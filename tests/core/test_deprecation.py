"""Old names go on working for two minor versions, and whoever uses one is told: held against names that nothing has."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moacompress
from moacompress.cli import app
from moacompress.core import deprecation
from moacompress.core.deprecation import RECIPE, Renaming, overdue, renamed_arguments
from moacompress.core.errors import RecipeError
from moacompress.recipe import Recipe

INVENTED = (
    Renaming("moacompress.fold", "crease", "edge", since="0.3"),
    Renaming("moacompress recipe init", "--vigour", "--effort", since="0.3"),
    Renaming("moacompress recipe", "--out", "--nowhere", since="0.3"),
    Renaming(RECIPE, "search.attempts", "search.trials", since="0.3"),
    Renaming(RECIPE, "start", "seed", since="0.9"),
)
TOLD = "{} of {} is called {} since 0.3; {} goes in 0.5"


@pytest.fixture(autouse=True)
def _invented(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.function is not test_no_old_name_is_kept_beyond_its_version:
        monkeypatch.setattr(deprecation, "RENAMED", INVENTED)


@renamed_arguments
def fold(paper: str, *, edge: int = 0) -> tuple[str, int]:
    return paper, edge


def test_an_old_argument_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="crease") as told:
        assert fold("a4", crease=3) == ("a4", 3)  # type: ignore[call-arg]
    assert [str(one.message) for one in told] == [TOLD.format("crease", "moacompress.fold", "edge", "crease")]
    assert told[0].filename == __file__  # it names the caller
    with pytest.raises(TypeError, match="crease and edge of moacompress.fold are one; give edge alone"):
        fold("a4", crease=3, edge=4)  # type: ignore[call-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fold("a4", edge=4) == ("a4", 4)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        fold("a4", start=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("given", [["--vigour", "quick"], ["--vigour=quick"]])
def test_an_old_option_works_and_says_so(given: list[str], tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    done = CliRunner().invoke(app, ["recipe", "init", *given, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["recipe"] == str(out)  # --out is renamed of another command
    told = TOLD.format("--vigour", "moacompress recipe init", "--effort", "--vigour")
    assert " ".join(done.stderr.split()) == f"moacompress: {told}"
    assert Recipe.load(out).profile.estimator == "fisher"  # that of quick
    unknown = CliRunner().invoke(app, ["recipe", "validate", str(out), *given])
    assert unknown.exit_code == 2


def test_what_follows_two_dashes_is_no_option() -> None:
    said: list[str] = []
    given = ["--vigour", "--", "--vigour"]
    assert deprecation.with_new_options("moacompress recipe init", given, said.append) == ["--effort", "--", "--vigour"]
    assert len(said) == 1


def test_an_old_setting_works_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("start: 7\nsearch: {attempts: 3, rounds: 1}\n")
    with caplog.at_level(logging.WARNING):
        recipe = Recipe.load(file)
    assert recipe == Recipe(seed=7).override(search__trials=3, search__rounds=1)
    assert TOLD.format("search.attempts", "recipe", "search.trials", "search.attempts") in caplog.messages
    assert "start of recipe is called seed since 0.9; start goes in 0.11" in caplog.messages
    assert len(caplog.messages) == 2
    assert Recipe().override(search__attempts=5).search.trials == 5
    assert len(caplog.messages) == 3
    assert "attempts" not in json.dumps(recipe.resolved())
    with pytest.raises(RecipeError, match=r"search.attempts and search.trials of recipe are one; give search.trials"):
        Recipe.from_dict({"search": {"attempts": 3, "trials": 4}})


@pytest.mark.parametrize(("version", "count"), [("0.3.0", 0), ("0.4.9", 0), ("0.5.0", 4), ("0.10.2", 4), ("1.0", 5)])
def test_names_are_kept_for_two_minor_versions(version: str, count: int) -> None:
    assert len(overdue(version)) == count


def test_no_old_name_is_kept_beyond_its_version() -> None:
    assert overdue(moacompress.__version__) == []

"""How the texts of options are read, and where the artefacts of a run are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from moacompress.cli.options import read_sources, required_model, split_list
from moacompress.core.errors import ArtefactError, UsageError
from moacompress.models.stored_plan import find_plan_file
from moacompress.recipe import Recipe


def test_lists() -> None:
    assert split_list(None) is None
    assert split_list("dense, uniform,") == ("dense", "uniform")


def test_the_model_is_given_or_in_the_recipe() -> None:
    assert required_model(Recipe(model="a")) == "a"
    with pytest.raises(UsageError, match="no model given; name one as MODEL"):
        required_model(Recipe())


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    given = [
        "needle",
        "multi-needle-prose",
        "key-value",
        "key-value-uuids",
        "needle-prose-uuids",
        "records-codes",
        "qa.jsonl",
        str(tmp_path / "texts"),
        "some/set",
    ]
    sources = read_sources(given)
    assert sources == [
        {"generator": "needle"},
        {"generator": "multi-needle", "haystack": "prose"},
        {"generator": "key-value"},
        {"generator": "key-value", "values": "uuids"},
        {"generator": "needle", "haystack": "prose", "values": "uuids"},
        {"generator": "records", "values": "codes"},
        {"path": "qa.jsonl"},
        {"path": str(tmp_path / "texts")},
        {"dataset": "some/set"},
    ]
    assert len(Recipe().override(calibration__sources=sources).calibration.sources) == 9
    with pytest.raises(UsageError, match="unknown source 'nedle'; did you mean 'needle'?"):
        read_sources(["nedle"])
    with pytest.raises(UsageError, match="unknown source 'zzz'; it is a generator"):
        read_sources(["zzz"])


def test_folders(tmp_path: Path) -> None:
    model = tmp_path / "out" / "model"
    model.mkdir(parents=True)
    with pytest.raises(ArtefactError, match="holds no plan.json; make a plan with `moacompress search`"):
        find_plan_file(tmp_path / "out")
    (model / "plan.json").write_text("{}")
    assert find_plan_file(tmp_path / "out") == find_plan_file(model) == model / "plan.json"
    assert find_plan_file(model / "plan.json") == model / "plan.json"
    with pytest.raises(ArtefactError, match="does not exist"):
        find_plan_file(tmp_path / "none")

"""Recipes: unknown keys, values out of range, what wins over what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moacompress.bench.bench_request import BenchRequest
from moacompress.core.errors import RecipeError
from moacompress.recipe import Recipe, shared_name

ROOT = Path(__file__).resolve().parent.parent
LAUGHS = b"max_loss: [&a0 x, %s]" % b", ".join(
    b"&a%d [%s]" % (number, b",".join([b"*a%d" % (number - 1)] * 10)) for number in range(1, 10)
)
"""A few lines of YAML that stand for 10**9 texts."""


def test_there_are_few_keys(load_script: Callable[[Path], Any]) -> None:
    """A new key takes the place of one that nobody needs."""
    assert load_script(ROOT / "benchmarks" / "size.py").recipe_keys() <= 60


def test_an_empty_recipe_is_the_defaults() -> None:
    recipe = Recipe.from_dict({})
    assert recipe == Recipe()
    assert recipe.calibration.lengths == (512, 1024)
    assert json.loads(json.dumps(recipe.resolved())) == recipe.resolved()
    assert Recipe.from_dict(recipe.resolved()) == recipe


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"search": {"trails": 3}}, "unknown key 'search.trails'; did you mean 'trials'?"),
        ({"calibration": {"sources": [{"generatr": "needle"}]}}, "did you mean 'generator'?"),
        (
            {"profile": {"qqq": 3}},
            "known keys are draws, baselines, heads, anchors, gates, scorer, gate_samples, formats, centres, "
            "min_window",
        ),
        ({"search": {"trials": 0}}, "search.trials: "),
        ({"profile": {"min_window": 17}}, "profile.min_window: min_window is one of 16, 32, 64"),
        ({"calibration": {"sources": []}}, "calibration.sources: "),
        ({"calibration": {"sources": [{}]}}, "exactly one of generator, path, dataset"),
        (
            {"calibration": {"sources": [{"generator": "recall", "values": "uuids"}]}},
            "only needles, key-value pairs and records have values; recall has none to choose",
        ),
        ({"calibration": {"sources": [{"generator": "needle", "path": "x"}]}}, "exactly one of"),
        ({"calibration": {"sources": [{"generator": "nedle"}]}}, "calibration.sources.0.generator: "),
        ({"calibration": {"sources": [{"generator": "needle", "weight": 0}]}}, "weight"),
        ({"budget": "25"}, "budget: budget '25' is a bare number above 1; did you mean '25%'?"),
        ({"budget": 25}, "did you mean '25%'?"),
        ({"max_loss": "none"}, "max_loss: loss 'none' is not understood; write '1%' or '0.01'"),
        ({"max_loss": "1%", "budget": "25%"}, "budget is 25% and max_loss is 1%"),
        ({"search": {"timeout": float("inf")}}, "search.timeout: Input should be a finite number"),
        ({"heal": {"lr": float("nan")}}, "heal.lr: Input should be a finite number"),
        ({"calibration": {"lengths": [["1k"], ["2k"]]}}, "must be lengths, such as 1k,4k"),
        ({"profile": {"formats": [["int8"], ["int4"]]}}, "must be names of formats, such as int8,int4"),
        ({"seed": -1}, "seed: "),
        ({"dtype": "int8"}, "dtype: "),
        ({"evaluation": {"tasks": []}}, "evaluation.tasks: "),
        ([], "must be a mapping"),
        ("model", "must be a mapping"),
    ],
)
def test_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    if isinstance(data, dict):  # one that is made in Python is refused alike
        with pytest.raises(RecipeError, match=re.escape(str(error.value))):
            Recipe(**data)


@pytest.mark.parametrize(
    ("given", "formats"),
    [
        ("int4,int8", ("int8", "int4")),
        (["int4", "native", "int4"], ("int4",)),
        ("native", ()),
        ([], ()),
    ],
)
def test_formats_are_those_beside_the_native_one(given: Any, formats: tuple[str, ...]) -> None:
    assert Recipe.from_dict({"profile": {"formats": given}}).profile.formats == formats


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: some/model\nbudget: 25%\ncalibration:\n  lengths: 1k,2k\n  samples: 8\n")
    recipe = Recipe.load(path)
    assert (recipe.model, recipe.budget, recipe.calibration.lengths) == ("some/model", ("25%",), (1024, 2048))
    path.write_text(json.dumps(recipe.resolved()))
    assert Recipe.load(path) == recipe
    path.write_text("budget: 0.25\n")
    assert Recipe.load(path).budget == ("0.25",)
    path.write_text("budget: [0.25, 512MiB@32k]\n")
    assert Recipe.load(path).budget == ("0.25", "512MiB@32k")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not valid YAML"),
        (b"\xff\xfe\xff", "is not valid YAML"),
        (b"!!python/object/apply:os.system ['true']", "is not valid YAML"),
        (b"[" * 100_000, "is not valid YAML"),
        (b"x: " + b"y" * 2**20, "more than 1 MiB"),
        (LAUGHS, "what an alias stands for counted each time"),
        (b"max_loss: &a [*a]", "what an alias stands for counted each time"),
        (b"", "must be a mapping"),
    ],
    ids=["half", "not-utf8", "code", "deep", "large", "laughs", "endless", "empty"],
)
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        Recipe.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read recipe .*: No such file"):
        Recipe.load(tmp_path / "none.yaml")


def test_flags_win_and_none_is_unset() -> None:
    recipe = Recipe.from_dict({"seed": 3, "search": {"trials": 5, "classes": 2}})
    changed = recipe.override(search__trials=9, calibration__lengths="2k", budget=["10%"], seed=None)
    assert (changed.search.trials, changed.search.classes, changed.seed) == (9, 2, 3)
    assert changed.calibration.lengths == (2048,)
    assert changed.budget == ("10%",)
    assert recipe.search.trials == 5
    with pytest.raises(RecipeError, match=r"options: search\.trials: "):
        recipe.override(search__trials=0)


PLACES = {
    "model": "/home/me/models/dense",
    "calibration": {
        "text": "../texts/prose/",
        "sources": [{"path": "/data/qa.jsonl"}, {"dataset": "org/set"}, {"dataset": "/data/sets/mine"}],
    },
    "search": {"storage": "postgresql://me:secret@host/db"},
}


def test_what_is_shared_names_no_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_dict(PLACES)
    shared = recipe.shared("/home/me/models/dense")
    assert shared["model"] == "dense"
    assert shared["calibration"]["text"] == "prose"
    sources = shared["calibration"]["sources"]
    assert [(part["path"], part["dataset"]) for part in sources] == [
        ("qa.jsonl", None),
        (None, "org/set"),
        (None, "mine"),
    ]
    assert shared["search"]["storage"] is None
    again = Recipe.from_dict(shared)
    back = again.override(
        model=PLACES["model"], search__storage=recipe.search.storage, calibration=recipe.resolved()["calibration"]
    )
    assert back == recipe
    (tmp_path / "org" / "set").mkdir(parents=True)
    assert recipe.shared("org/dense")["calibration"]["sources"][1]["dataset"] == "set"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("/home/me/models/dense", "dense"),
        ("/home/me/models/dense/", "dense"),
        ("/home/me/x.Q4_1.gguf", "x.Q4_1.gguf"),
    ],
)
def test_a_hub_id_is_whole_and_a_path_a_name(source: str, name: str) -> None:
    assert shared_name(source) == name
    assert Recipe().shared(source)["model"] == name


DTYPES = {"fp16": "float16", "half": "float16", "BF16": "bfloat16", "fp32": "float32", "torch.bfloat16": "bfloat16"}


def test_dtypes_have_other_names() -> None:
    for given, name in DTYPES.items():
        assert Recipe().override(dtype=given).dtype == name
    assert BenchRequest(lengths=(8,), batches=(1,), dtypes=("half", "auto")).dtypes == ("float16", "auto")

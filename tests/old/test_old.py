"""What an earlier moacompress left is read and resumed, or refused in one sentence that changes nothing; see `make.py`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moacompress
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import MoaCompressError
from moacompress.rules.plan import Plan

HERE = Path(__file__).resolve().parent
LONG_AGO = 1.6e9
"""When everything here was written, seconds since 1970: of processes on other machines nothing was heard since."""
TOLERANCE = 2e-3
"""Of logits; a code that rounds another way on another processor moves them by less."""


@pytest.fixture(scope="module")
def made(load_script: Callable[[Path], Any]) -> Any:
    """Returns the script that made the artefacts."""
    return load_script(HERE / "make.py")


@pytest.fixture
def old(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of the artefacts, which is the working directory too."""
    folder = tmp_path / "old"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in folder.rglob("*"):
        if path.is_file():
            if path.suffix == ".json":
                path.write_text(path.read_text("utf-8").replace(f'"{made.FOLDER}/', f'"{folder}/'), "utf-8")
            os.utime(path, (LONG_AGO, LONG_AGO))
    monkeypatch.chdir(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Returns a digest of every file but those that say who is at work."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".owner", ".lock")
    }


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the numbers of the samples that are profiled from now on, not around a plan."""
    from moacompress.calibration.profile.sample_statistics import sample_statistics

    numbers: list[int] = []

    def counted(*arguments: Any) -> Any:
        numbers.append(arguments[7])
        return sample_statistics(*arguments)

    monkeypatch.setattr("moacompress.search.predict.around.sample_statistics", sample_statistics)
    monkeypatch.setattr("moacompress.calibration.profile.profiler.sample_statistics", counted)
    return numbers


@pytest.fixture
def newer() -> Iterator[None]:
    """Makes this a later version, whose recipes have one more key in every section, with a default."""
    from pydantic.fields import FieldInfo

    from moacompress import Recipe, recipe_sections

    names = ("Source", "Calibration", "Profile", "Search", "Evaluation", "Heal")
    sections: list[Any] = [*(getattr(recipe_sections, f"{name}Recipe") for name in names), Recipe]
    made_before = [field.default for section in sections for field in section.model_fields.values()]
    made_before += [part for value in made_before if isinstance(value, tuple) for part in value]
    instances = [value for value in made_before if isinstance(value, tuple(sections))]
    for section in sections:
        section.__pydantic_fields__["invented"] = FieldInfo.from_annotated_attribute(int, 7)
        section.model_rebuild(force=True)
    for instance in instances:
        instance.__dict__["invented"] = 7
    yield
    for section in sections:
        del section.__pydantic_fields__["invented"]
        section.model_rebuild(force=True)
    for instance in instances:
        del instance.__dict__["invented"]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_plans_are_read(old: Path, version: int) -> None:
    from moacompress.models import load_source

    file = old / f"plans/{version}.json"
    data = json.loads(file.read_text("utf-8"))
    assert data["version"] == version
    plan, source = Plan.load(file), load_source("dense")
    plan.check_model(source.shape, weights=source.weights_like)
    for layer, row in zip(data["layers"], plan.rules, strict=True):
        for name in set(layer) - {"share", "kv_dtype"}:
            assert [getattr(rule, name) for rule in row] == layer[name]
    assert (plan.gates, plan.selects) == (data.get("gates", ""), version == 3)
    plan.save(old / "again.json")
    assert Plan.load(old / "again.json") == plan
    ids = torch.arange(4, 100)[None]
    dense = source.model(ids).logits
    under = moacompress.attach(source.model, plan)(ids).logits
    assert not torch.allclose(under, dense, atol=0.1)
    moacompress.detach(source.model)
    assert torch.equal(source.model(ids).logits, dense)


@pytest.mark.parametrize("name", ["profile", "gated"])
def test_a_finished_profile_is_returned(made: Any, old: Path, profiled: list[int], name: str) -> None:
    recipe = moacompress.Recipe.from_dict(made.PROFILED).override(profile__gates=name == "gated")
    before, manifest = digests(old), json.loads((old / name / "profile.json").read_text("utf-8"))
    read = Profile.load(name)
    found = moacompress.profile("dense", name, recipe)
    assert profiled == []
    assert found.fingerprint == read.fingerprint == manifest["fingerprint"]
    assert (found.gates is None) == (name == "profile")
    assert changed(before, digests(old)) <= {f"{name}/profile.json", f"{name}/calibration.shingles"}
    (old / name / "influence.safetensors").unlink()
    moacompress.profile("dense", name, recipe)
    assert profiled == []
    assert changed(before, digests(old)) <= {f"{name}/profile.json", f"{name}/calibration.shingles"}


def test_a_profile_that_was_killed_is_finished(made: Any, old: Path, profiled: list[int]) -> None:
    before, whole = digests(old), Profile.load("profile")
    done = {name for name in before if name.startswith("half/samples/")}
    found = moacompress.profile("dense", "half", moacompress.Recipe.from_dict(made.PROFILED))
    assert profiled == [4, 5]
    assert not changed(before, digests(old)) & done
    assert found.fingerprint == whole.fingerprint
    for name, array in whole.statistics.arrays.items():
        np.testing.assert_allclose(found.statistics.arrays[name], array, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("newer")
def test_a_new_key_with_a_default_makes_no_other_request(made: Any, old: Path, profiled: list[int]) -> None:
    recipe = moacompress.Recipe.from_dict(made.PROFILED)
    moacompress.profile("dense", "profile", recipe)
    assert profiled == []
    moacompress.profile("dense", "half", recipe)
    assert profiled == [4, 5]
    for changes in ({"calibration__invented": 8}, {"calibration__sources": [{"path": "rows.jsonl", "invented": 8}]}):
        with pytest.raises(MoaCompressError, match="another model or recipe"):
            moacompress.profile("dense", "profile", recipe.override(**changes))


def test_gates_that_were_not_trained_yet_are_trained_on_other_rows(
    made: Any, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moacompress.calibration.data.samples import load_samples
    from moacompress.calibration.gates.training import train_gates

    for name in ("gates.safetensors", "influence.safetensors"):
        (old / "gated" / name).unlink()
    shutil.rmtree(old / "gated/samples")
    manifest = json.loads((old / "gated/profile.json").read_text("utf-8")) | {
        "gates": "",
        "digest": "",
        "complete": False,
    }
    (old / "gated/profile.json").write_text(json.dumps(manifest), "utf-8")
    trained: list[Any] = []

    def train(model: Any, samples: list[Any], *rest: Any) -> Any:
        trained.extend(samples)
        return train_gates(model, samples, *rest)

    monkeypatch.setattr("moacompress.calibration.profile.profiler.train_gates", train)
    recipe = moacompress.Recipe.from_dict(made.PROFILED).override(profile__gates=True)
    found = moacompress.profile("dense", "gated", recipe)
    assert found.gates is not None
    assert len(trained) == 4
    profiled = {tuple(sample.input_ids[:60]) for sample in load_samples("gated/calibration.safetensors")}
    assert not profiled & {tuple(sample.input_ids[:60]) for sample in trained}


def trials(journal: Path) -> dict[str, list[Any]]:
    """Returns what the finished trials of every study in a journal came to."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(journal)))
    done = (optuna.trial.TrialState.COMPLETE,)
    return {
        name: [trial.value for trial in optuna.load_study(study_name=name, storage=storage).get_trials(states=done)]
        for name in optuna.get_all_study_names(storage)
    }


def test_a_study_that_was_killed_is_resumed(made: Any, old: Path) -> None:
    ((study, before),) = trials(old / "search/study.log").items()
    assert len(before) == 3
    recipe = moacompress.Recipe.from_dict({**made.PROFILED, "search": {**made.SEARCHED, "storage": "search/study.log"}})
    found = moacompress.find_plan("profile", "60%", recipe=recipe, out="search/plan.json")
    after = trials(old / "search/study.log")[study]
    assert len(after) == recipe.search.trials == found.trials
    assert after[:3] == before
    assert Plan.load("search/plan.json") == found.plan


@pytest.mark.usefixtures("newer")
def test_a_run_that_was_killed_is_resumed(made: Any, old: Path, profiled: list[int]) -> None:
    assert moacompress.Recipe().resolved()["calibration"]["sources"][0]["invented"] == 7
    before, recipe = digests(old / "run"), moacompress.Recipe.from_dict(made.RUN)
    kept = {name for name in before if name.startswith(("profile/samples/", "profile/influence", "plan.rounds/"))}
    (study,) = (name for name, values in trials(old / "run/plan.study.journal").items() if len(values) == 4)
    earlier = trials(old / "run/plan.study.journal")[study]
    summary = moacompress.compress(recipe, "run")
    assert profiled == []
    assert len([name for name in kept if name.startswith("plan.rounds/")]) == 1
    assert not changed(before, digests(old / "run")) & kept
    assert trials(old / "run/plan.study.journal")[study] == earlier
    assert summary["kv_bytes"]["planned"] <= 0.6 * summary["kv_bytes"]["dense"]
    assert Plan.load("run/model/plan.json").key() == Plan.load("run/plan.json").key()


@pytest.mark.parametrize("name", ["dense", "gates", "formats", "copies"])
def test_checkpoints_compute_what_they_did(made: Any, old: Path, name: str) -> None:
    expected = json.loads((old / "models/expected.json").read_text("utf-8"))[name]
    found = made.continuation(old / ("dense" if name == "dense" else f"models/{name}"))
    assert found["tokens"] == expected["tokens"]
    assert found["ids"][0] == expected["ids"][0]
    assert found["logits"] == pytest.approx(expected["logits"], abs=TOLERANCE)


def _other_request(made: Any, name: str) -> None:
    recipe = moacompress.Recipe.from_dict(made.PROFILED)
    moacompress.profile("dense", name, recipe.override(seed=1, profile__gates=name == "gated"))


def _other_budget(made: Any, name: str) -> None:
    moacompress.find_plan("profile", "80%", recipe=moacompress.Recipe.from_dict(made.PROFILED), out=f"{name}/plan.json")


def _other_run(made: Any, name: str) -> None:
    moacompress.compress(moacompress.Recipe.from_dict({**made.RUN, "seed": 1}), name)


def _other_plan(made: Any, name: str) -> None:
    moacompress.export("dense", "plans/1.json", name)


def _newer_plan(made: Any, name: str) -> None:
    data = json.loads(Path("plans/3.json").read_text("utf-8"))
    moacompress.export("dense", Plan.from_dict(data | {"version": 1 << 16}), name)


REFUSED = [
    ("profile", _other_request, "another model or recipe"),
    ("gated", _other_request, "another model or recipe"),
    ("half", _other_request, "another model or recipe"),
    ("search", _other_budget, "plan.json"),
    ("run", _other_run, "another run"),
    ("models/gates", _other_plan, "is not of this plan"),
    ("plans", _newer_plan, "upgrade moacompress"),
]
"""A folder, what is tried with it, and what the refusal says."""


@pytest.mark.parametrize(("name", "attempt", "says"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_is_refused_is_left_alone(
    made: Any, old: Path, name: str, attempt: Callable[[Any, str], None], says: str
) -> None:
    before = digests(old)
    with pytest.raises(MoaCompressError) as refusal:
        attempt(made, name)
    assert re.search(says, str(refusal.value))
    assert "\n" not in str(refusal.value)
    assert changed(before, digests(old)) == set()

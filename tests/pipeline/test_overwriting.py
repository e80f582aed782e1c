"""Runs in a folder that holds something: what `--overwrite` removes, and what another process is at."""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from moacompress import pipeline, run_folder
from moacompress.core.artefact_names import of_compress
from moacompress.core.errors import ArtefactError
from moacompress.core.files import remove
from moacompress.core.lock_holders import own_file, own_folder
from moacompress.pipeline import compress
from moacompress.run_folder import begin_run, check_place


def test_a_run_whose_storage_has_a_password_is_its_own(recipe, tmp_path):
    asked = recipe.override(search__storage="postgresql://me:secret@host/studies")
    begin_run(tmp_path, asked, False)
    assert "secret" not in (tmp_path / "recipe.json").read_text()
    check_place(tmp_path, asked, False)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"holds another run \(plan.json\)"):
        check_place(tmp_path, recipe, False)
    assert (tmp_path / "plan.json").read_text() == "{}"


USERS = ("notes.txt", "plan-mine.json", "text/prose.txt", "dense/mine.txt", "profile/notes.txt", "models/model.txt")
"""Files of the user's beside those of a run, and in folders of names that are a demo's."""


def test_overwrite_leaves_nothing_of_the_run_before_and_all_of_the_users(finished, recipe, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    ours = {path.relative_to(out) for path in out.rglob("*")}
    for name in (
        *("bench.json", "bench.cells.jsonl", "profile/audit.json", "profile/samples/99.safetensors", "model/x"),
        *("plan.scouts/9", "plan.baselines/old.json", ".summary.json.89abcdef.tmp", ".model.89abcdef.partial/x"),
    ):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text('{"provenance": {"baseline": "old"}}' if name.endswith("old.json") else "of before")
    with ExitStack() as held:  # an open file keeps its inode from being given to another
        files = [path for path in out.rglob("*") if path.is_file()]
        inodes = {os.fstat(held.enter_context(path.open()).fileno()).st_ino for path in files}
        for name in USERS:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("mine")
        summary = compress(recipe, out, overwrite=True)
        assert not inodes & {path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert all((out / name).read_text() == "mine" for name in USERS)
    users = {Path(name) for name in USERS} | {Path(name).parent for name in USERS}
    left = {path.relative_to(out) for path in out.rglob("*")} - users
    assert left == ours - users


@pytest.fixture
def begun(monkeypatch):
    """Has runs only begin, with no model; returns the names of the models that they would load."""
    models = []
    monkeypatch.setattr(pipeline, "load_for", lambda recipe, model, **_: models.append(model))
    monkeypatch.setattr(pipeline, "check_with_model", lambda *arguments: None)

    def fill(recipe, out, progress, from_scratch, **_):
        pipeline._begin(recipe, out, from_scratch, False)

    monkeypatch.setattr(pipeline, "fill", fill)
    return models


def test_an_overwrite_that_is_interrupted_is_recovered_from(finished, recipe, tmp_path, monkeypatch, begun):
    """After every removal in turn: the same recipe can go on, and another is refused as before."""
    count = len([path for path in of_compress(tmp_path) if path.parent == tmp_path])
    for stop in range(count):
        out = tmp_path / str(stop)
        shutil.copytree(finished[0], out)

        def removing(paths, stop=stop):
            remove(paths[:stop])
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(run_folder, "remove", removing)
            with pytest.raises(KeyboardInterrupt):
                compress(recipe.override(seed=1), out, overwrite=True)
        assert not (out / "model").exists() or (out / "model" / "plan.json").exists()
        empty = ("recipe.json", "seconds.json", "profile.json")
        if any(path.exists() for path in of_compress(out) if path.name not in empty):
            with pytest.raises(ArtefactError, match="holds another run .* pass --overwrite"):
                compress(recipe.override(seed=1), out)
        compress(recipe, out)
        compress(recipe.override(seed=1), out, overwrite=True)
        assert [path.name for path in out.iterdir()] == ["recipe.json"]
    assert len(begun) == 3 * count


@pytest.mark.usefixtures("begun")
def test_a_run_that_failed_at_once_is_no_other_run(recipe, tmp_path):
    """What it left (a recipe, a clock, a profile without a sample) is replaced; what somebody else left is not."""
    out, wrong = tmp_path / "out", recipe.override(model="a-typo")
    compress(wrong, out)
    (out / "seconds.json").write_text('{"profile": 3.5}')
    (out / "profile").mkdir()
    (out / "profile" / "profile.json").write_text("{}")
    compress(recipe, out)
    assert json.loads((out / "recipe.json").read_text()) == recipe.resolved()
    assert not (out / "seconds.json").exists()
    (out / "profile" / "answers.jsonl").write_text("{}")
    for run in (compress, lambda recipe, out: pipeline.estimate(recipe, out=out)):
        with pytest.raises(ArtefactError, match=r"holds another run \(profile/answers.jsonl\)"):
            run(wrong, out)
    (tmp_path / "food").mkdir()
    (tmp_path / "food" / "recipe.json").write_text('{"flour": 2}')
    with pytest.raises(ArtefactError, match=r"holds another run \(recipe.json\)"):
        compress(recipe, tmp_path / "food")


def test_overwrite_never_costs_what_no_run_left_or_what_is_read(finished, recipe, tiny_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny_folder, out / "model")
    with pytest.raises(ArtefactError, match="model exists already and no run left it"):
        compress(recipe, out, overwrite=True)
    shutil.move(out / "model", tmp_path / "moved")
    (out / "profile" / "samples").mkdir(parents=True)
    with pytest.raises(ArtefactError, match="profile exists already and no run left it"):
        compress(recipe, out, overwrite=True)
    assert (out / "profile" / "samples").exists()
    for name in ("recipe.json", "report.html", "plan.scouts/mine"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(ArtefactError, match="exists already and no run left it"):
        compress(recipe, tmp_path / "mine", overwrite=True)
    assert len([path for path in (tmp_path / "mine").rglob("*") if path.is_file()]) == 3
    whole = tmp_path / "whole"
    shutil.copytree(finished[0], whole)
    shutil.copytree(tiny_folder, whole / "dense")
    (whole / "demo.json").write_text("{}")
    (whole / "profile" / "answers.jsonl").write_text(" ".join(f"word{number}" for number in range(3000)))
    (tmp_path / "link").symlink_to(whole / "dense")
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    for model in (whole / "dense", tmp_path / "link"):
        with pytest.raises(ArtefactError, match="would be removed with .*dense; choose another folder for the run"):
            compress(recipe.override(model=str(model)), whole, overwrite=True)
    with pytest.raises(ArtefactError, match="would be removed with .*answers.jsonl"):
        compress(recipe.override(calibration__text=str(whole / "profile" / "answers.jsonl")), whole, overwrite=True)
    changed = [path for path, stamp in before.items() if path.is_file() and path.stat().st_mtime_ns != stamp]
    assert changed == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_overwrite_reaches_a_study_in_another_place(recipe, tmp_path, monkeypatch, overwrite):
    asked = []

    def find_plan(*arguments, **options):
        asked.append(options["overwrite"])
        raise KeyboardInterrupt

    monkeypatch.setattr("moacompress.calibration.profile.profiler.profile", lambda *arguments, **options: None)
    monkeypatch.setattr("moacompress.search.plan_sets.find_plan", find_plan)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe.override(search__storage=str(tmp_path / "s.log")), tmp_path / "out", overwrite=overwrite)
    assert asked == [overwrite]


@pytest.mark.parametrize("name", ["profile/x", "eval.json"])
def test_overwrite_is_refused_where_another_verb_is_at_work(finished, recipe, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    owned = own_folder(out / "profile") if "/" in name else own_file(out / name)
    with owned, pytest.raises(ArtefactError, match=f"{Path(name).parts[0]} is in use"):
        compress(recipe, out, overwrite=True)
    with own_folder(out):
        for overwrite in (False, True):
            with pytest.raises(ArtefactError, match=r"out is in use: process .* another folder"):
                compress(recipe, out, overwrite=overwrite)
    assert {path.name for path in out.iterdir()} == {path.name for path in finished[0].iterdir()}

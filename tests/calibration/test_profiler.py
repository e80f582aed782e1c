"""Profiles of tiny models: runs that are stopped, damaged and taken up again, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import sample_run
from moacompress.calibration.profile.profiler import profile
from moacompress.calibration.profile.statistics import ESTIMATORS, Statistics
from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import MANIFEST_FILE, SHINGLES_FILE, holder_of_folder, of_profile, sample_file
from moacompress.core.errors import ArtefactError, DataError, UsageError
from moacompress.core.files import remove
from moacompress.core.progress import Progress
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.rules.rule import Rule

Factory = Callable[..., PreTrainedModel]
RECIPE = Recipe.from_dict(
    {"calibration": {"lengths": [128, 192], "samples": 4, "validation_samples": 2}, "profile": {"draws": 2}}
)
SETS = ("calibration", "validation", "influence")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the data by random ids, which is all that the profiler needs; returns the splits made."""
    made: list[str] = []

    def build(source: Any, recipe: Recipe, split: str, progress: Any = None, answers: Any = None) -> list[Sample]:
        made.append(split)
        rng = np.random.default_rng([recipe.seed, split == "calibration"])
        count = recipe.calibration.samples if split == "calibration" else recipe.calibration.validation_samples
        lengths = np.sort(np.resize(recipe.calibration.lengths, count)).tolist()
        return [Sample(rng.integers(3, 150, n - 1), np.arange(n - 1) > n - 8, "random", n) for n in lengths]

    monkeypatch.setattr("moacompress.calibration.data.sample_sources.build_samples", build)
    monkeypatch.setattr("moacompress.calibration.data.sample_sources.make_drafts", lambda *arguments: [])
    return made


def check_influence(made: Profile, estimator: str) -> None:
    influence = made.influence(estimator)
    assert influence.shape == (2, 3, 2, len(made.rules))
    assert not influence[..., 0].any()
    assert (influence[..., 1:] > 0).any()


def test_profile_of_a_folder(tiny_folder: Path, tmp_path: Path, data: list[str], done: list[int]) -> None:
    made = profile(str(tiny_folder), tmp_path / "p", RECIPE)
    assert data == ["calibration", "validation"]
    assert done == [0, 1, 2, 3]
    assert made.source == str(tiny_folder)
    assert (made.lengths, made.rules[0], len(made.validation)) == ((128, 192), Rule.FULL, 2)
    check_influence(made, "robust")
    assert json.loads((tmp_path / "p" / "profile.json").read_text())["complete"] is True

    again = profile(tiny_folder, tmp_path / "p", RECIPE.override(search__trials=3))
    assert (len(data), len(done)) == (2, 4)
    assert again.recipe.search.trials == 3
    assert np.array_equal(again.influence("robust"), made.influence("robust"))


@pytest.mark.parametrize("seed", [0, 1], ids=["the same request", "another request"])
def test_overwrite_starts_anew_and_leaves_what_is_not_of_a_profile(
    source: SourceModel, tmp_path: Path, data: list[str], done: list[int], seed: int
) -> None:
    out = tmp_path / "p"
    profile(source, out, RECIPE)
    with pytest.raises(ArtefactError, match="--overwrite"):
        profile(source, out, RECIPE.override(seed=1))
    for path in of_profile(out):
        if not path.exists():  # an audit, and the answers, which `data` does without
            path.write_text("of before")
    (out / "samples" / "00007.safetensors").write_text("of before")
    (out / "notes.txt").write_text("mine")
    with ExitStack() as held:  # an open file keeps its inode from being given to another
        files = [path for path in out.rglob("*") if path.is_file() and path.name != "notes.txt"]
        before = {os.fstat(held.enter_context(path.open()).fileno()).st_ino for path in files}
        made = profile(source, out, RECIPE.override(seed=seed), overwrite=True)
        assert not before & {path.stat().st_ino for path in out.rglob("*")}
    assert (len(data), len(done), made.recipe.seed) == (4, 8, seed)
    left = {"notes.txt", "samples", MANIFEST_FILE, SHINGLES_FILE, *(f"{name}.safetensors" for name in SETS)}
    assert {path.name for path in out.iterdir()} == left
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("seed", [0, 1], ids=["the same request", "another request"])
def test_an_overwrite_that_is_interrupted_is_recovered_from(
    source: SourceModel, tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Stopped after some removals, the command starts from scratch; without the flag nothing is taken for whole."""
    before = profile(source, tmp_path / "before", RECIPE)
    whole = profile(source, tmp_path / "whole", RECIPE.override(seed=seed)).influence("robust")
    for stop in (0, 1, 3, len(of_profile(tmp_path)) - 1):
        out = tmp_path / str(stop)
        shutil.copytree(before.path, out)
        (out / "notes.txt").write_text("mine")
        for overwrite in (True, False) if seed == 0 else (True,):
            with monkeypatch.context() as patched:
                patched.setattr("moacompress.calibration.profile.folder.remove", stopping_after(stop))
                with pytest.raises(KeyboardInterrupt):
                    profile(source, out, RECIPE.override(seed=seed), overwrite=True)
            made = profile(source, out, RECIPE.override(seed=seed), overwrite=overwrite)
            assert np.array_equal(made.influence("robust"), whole)
        assert (out / "notes.txt").exists()


def stopping_after(count: int) -> Callable[[Iterable[Path]], None]:
    """Returns a `remove` that is interrupted after so many files."""

    def removing(paths: Iterable[Path]) -> None:
        remove(list(paths)[:count])
        raise KeyboardInterrupt

    return removing


def test_a_second_run_in_the_same_process_is_refused(source: SourceModel, tmp_path: Path, data: list[str]) -> None:
    class Again(Progress):
        def step(self, note: str = "") -> None:
            with pytest.raises(ArtefactError, match="is in use"):
                profile(source, tmp_path / "p", RECIPE)

    profile(source, tmp_path / "p", RECIPE, progress=Again())
    assert holder_of_folder(tmp_path / "p").exists() is False


def test_stopped_and_damaged_profiles_are_finished(
    source: SourceModel, tmp_path: Path, data: list[str], done: list[int]
) -> None:
    """With as little as has to be done."""

    class StopAtThree(Progress):
        steps = 0

        def step(self, note: str = "") -> None:
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt

    out = tmp_path / "p"
    with pytest.raises(KeyboardInterrupt):
        profile(source, out, RECIPE, progress=StopAtThree())
    with pytest.raises(ArtefactError, match="not finished"):
        Profile.load(out)
    sample_file(out, 1).write_bytes(sample_file(out, 1).read_bytes()[:-3])
    made = profile(source, out, RECIPE)
    assert data == ["calibration", "validation"]
    assert done == [0, 1, 2, 1, 3]
    for name, redone in (("influence", 0), ("validation", 1), ("calibration", 1)):
        path = out / f"{name}.safetensors"
        before = path.read_bytes()
        path.write_bytes(before[: len(before) // 2])
        data.clear()
        if name == "calibration":  # search does not need it
            assert Profile.load(out).fingerprint == made.fingerprint
            (out / "influence.safetensors").unlink()
        else:
            with pytest.raises(ArtefactError, match=f"{name}.*run the same profile command again"):
                Profile.load(out)
        assert profile(source, out, RECIPE).fingerprint == made.fingerprint
        assert len(data) == redone
        assert len(path.read_bytes()) == len(before)
    (out / "profile.json").write_text("{")
    assert np.array_equal(profile(source, out, RECIPE).influence("robust"), made.influence("robust"))
    assert len(done) == 5  # no other sample was profiled twice


def poison(monkeypatch: pytest.MonkeyPatch, indices: set[int]) -> None:
    def statistics(
        model: Any, shape: Any, table: Any, sample: Any, chosen: Any, seed: int, index: int, *rest: Any
    ) -> Statistics:
        values = np.full((chosen.draws, shape.layers, shape.kv_heads, len(table)), index, np.float32)
        values[..., 0] = 0
        if index in indices:
            values[0, 0, 0, 1] = np.inf
        return Statistics({"squares": values.mean(0), "total": values})

    monkeypatch.setattr(sample_run, "sample_statistics", statistics)


def test_samples_that_are_not_finite_are_left_out(
    source: SourceModel, tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = RECIPE.override(profile__formats=[])
    recipe = plain.override(calibration__samples=20)
    poison(monkeypatch, {3})
    made = profile(source, tmp_path / "one", recipe)
    assert len(made.sample_lengths) == 19
    assert made.influence("robust")[0, 0, 0, 1] == pytest.approx(
        np.mean([(n / 2) ** 0.75 for n in range(10) if n != 3]) ** (4 / 3)
    )
    poison(monkeypatch, {3, 12})
    with pytest.raises(DataError, match="2 of 20 samples"):
        profile(source, tmp_path / "two", recipe)
    poison(monkeypatch, {0})
    with pytest.raises(DataError, match="1 of 2 samples have activations or gradients that are not finite"):
        profile(source, tmp_path / "all", plain.override(calibration__samples=2))


def test_lengths_that_cannot_be_profiled(source: SourceModel, tmp_path: Path, data: list[str]) -> None:
    for lengths, message in (([128, 8192], "length 8,192 is beyond .* 4,096"), ([96, 512], "length 96 is too short")):
        with pytest.raises(DataError, match=message):
            profile(source, tmp_path / "p", RECIPE.override(calibration__lengths=lengths))
    assert not (tmp_path / "p").exists()
    assert data == []


def test_statistics_asked_for_later_are_added(
    source: SourceModel, tmp_path: Path, data: list[str], done: list[int]
) -> None:
    plain = profile(source, tmp_path / "p", RECIPE)
    assert plain.estimators == ("robust",)
    more = profile(source, tmp_path / "p", RECIPE.override(profile__baselines=True))
    assert more.estimators == ESTIMATORS
    assert np.array_equal(more.influence("robust"), plain.influence("robust"))
    assert (len(data), done) == (2, [0, 1, 2, 3] * 2)  # the samples stay
    again = profile(source, tmp_path / "p", RECIPE)
    assert again.estimators == ESTIMATORS
    assert len(done) == 8
    for name in ESTIMATORS:
        check_influence(again, name)


def test_a_full_disk_leaves_a_sound_profile(
    source: SourceModel, tmp_path: Path, data: list[str], done: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at every file in turn; then there is room again."""
    whole = profile(source, tmp_path / "whole", RECIPE)
    done.clear()
    sync, out, free = os.fsync, tmp_path / "p", 0
    leftovers: list[Path] = []

    def full(descriptor: int) -> None:
        nonlocal free
        free -= 1
        if free < 0:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    messages: list[str] = []
    for room in range(20):
        free = room
        try:
            made = profile(source, out, RECIPE)
            break
        except ArtefactError as error:
            messages.append(str(error))
            leftovers += list(out.rglob("*.tmp"))
    assert len(messages) > 3
    assert all("No space left on device; nothing was changed" in message for message in messages)
    assert not leftovers
    assert np.array_equal(made.influence("robust"), whole.influence("robust"))
    assert sorted(set(done)) == [0, 1, 2, 3]


def test_plain_text_is_profiled_beside_the_answers(source: SourceModel, tmp_path: Path) -> None:
    """With real samples: the data is not replaced here."""
    text = tmp_path / "book.txt"
    text.write_text(" ".join(f"Sentence number {index} says little about the sea." for index in range(4000)))
    recipe = Recipe.from_dict(
        {
            "calibration": {
                "sources": [{"generator": "recall"}],
                "text": str(text),
                "lengths": [600, 700],
                "samples": 2,
                "text_samples": 2,
                "validation_samples": 2,
                "answer_tokens": 4,
            },
            "profile": {"draws": 1},
        }
    )
    made = profile(source, tmp_path / "p", recipe)
    assert made.sample_kinds == ("answer", "answer", "text", "text")
    assert made.sample_lengths.tolist() == [600, 700, 600, 700]
    assert [sample.kind for sample in made.validation] == ["answer", "answer", "answer", "answer", "text", "text"]
    assert [sample.length for sample in made.validation] == [600, 700, 1400, 1400, 600, 700]
    answers, plain = made.influence("robust"), made.influence("robust", "text")
    assert answers.shape == plain.shape
    assert (plain[..., 1:] > 0).any()
    assert not np.array_equal(answers, plain)
    plain_only = recipe.override(calibration__sources=[{"path": str(text)}], calibration__text_samples=0)
    only = profile(source, tmp_path / "only", plain_only)
    assert set(only.sample_kinds) == {"text"}
    with pytest.raises(UsageError, match="no samples of kind 'answer' but text"):
        only.influence("robust")

"""Shards of a profile: parts of its samples, made apart, which are the profile of one run when they are put together."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moacompress.calibration.data.answers import SampleDraft, answer_batches
from moacompress.calibration.gates.gate_samples import gate_drafts
from moacompress.calibration.profile import estimate
from moacompress.calibration.profile.merging import merge_shards
from moacompress.calibration.profile.profiler import profile, profile_shard
from moacompress.calibration.profile.sample_run import check_skipped
from moacompress.calibration.profile.shard import Shard, parse_shard, parted
from moacompress.calibration.profile.store import Profile
from moacompress.cli import app
from moacompress.core.artefact_names import sample_file
from moacompress.core.errors import ArtefactError, DataError, UsageError
from moacompress.estimate.estimator import Estimator
from moacompress.models.source import load_source
from moacompress.recipe import Recipe
from moacompress.search.study import find_plan

RECIPE = Recipe.from_dict(
    {
        "calibration": {"lengths": [700, 800], "samples": 6, "validation_samples": 3, "answer_tokens": 4},
        "profile": {"draws": 1, "gates": True, "gate_samples": 3},
        "search": {"trials": 1, "alternatives": False, "formats": ["native"]},
        "weights": "int8",
    }
)
Folders = dict[int, Path]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Returns the profile of one run."""
    return profile(tiny_folder, tmp_path_factory.mktemp("whole") / "profile", RECIPE)


@pytest.fixture(scope="module")
def shards(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Returns the folders of three shards; do not write into them."""
    place = tmp_path_factory.mktemp("shards")
    for number in (1, 2, 3):
        profile_shard(tiny_folder, place / str(number), RECIPE, f"{number}/3")
    return {number: place / str(number) for number in (1, 2, 3)}


def test_shards_in_any_order_are_one_profile(
    tiny_folder: Path, shards: Folders, whole: Profile, tmp_path: Path, done: list[int]
) -> None:
    for order in ((1, 2, 3), (3, 1, 2)):
        made = merge_shards([shards[number] for number in order], tmp_path / str(order[0]))
        assert made.statistics.shapes == whole.statistics.shapes
        for name, array in made.statistics.arrays.items():
            assert np.array_equal(array, whole.statistics.arrays[name]), name
        for ours, theirs in zip(made.calibration_samples(), whole.calibration_samples(), strict=True):
            assert np.array_equal(ours.input_ids, theirs.input_ids)
            assert (ours.source, ours.kind, ours.length) == (theirs.source, theirs.kind, theirs.length)
        heads = [json.loads((folder / "profile.json").read_text()) for folder in (made.path, whole.path)]
        assert [head.pop("seconds") > 0 for head in heads] == [True, True]
        assert heads[0] == heads[1]
        for file in ("weights.json", "calibration.shingles"):
            assert (made.path / file).read_bytes() == (whole.path / file).read_bytes()
    # the samples that it has need not be profiled again
    sample_file(made.path, 4).unlink()
    (made.path / "influence.safetensors").unlink()
    again = profile(tiny_folder, made.path, RECIPE)
    assert done == [4]
    assert again.statistics.digest() == whole.statistics.digest()


def test_a_profile_and_its_plans_know_all_that_they_saw(tiny_folder: Path, whole: Profile, tmp_path: Path) -> None:
    seen, source = whole.shingles, load_source(tiny_folder)
    assert seen is not None
    samples = [*whole.calibration_samples(), *whole.validation]
    ids = [*(sample.input_ids.tolist() for sample in samples), *(draft.ids for draft in gate_drafts(source, RECIPE))]
    assert seen.share(str(source.tokenizer.decode(list(each), skip_special_tokens=True)) for each in ids) == 1.0
    assert len(seen.hashes) < sum(map(len, ids))
    find_plan(whole, "50%", out=tmp_path / "plan.json")
    assert (tmp_path / "plan.shingles").read_bytes() == (whole.path / "calibration.shingles").read_bytes()


def changed(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Returns a copy of a shard with another head."""
    shutil.copytree(folder, to)
    head = json.loads((to / "profile.json").read_text())
    change(head)
    (to / "profile.json").write_text(json.dumps(head))
    return to


def with_samples(numbers: Any, head: dict[str, Any]) -> None:
    head["shard"]["calibration"] = numbers


def test_what_cannot_be_merged_is_named(shards: Folders, whole: Profile, tiny_folder: Path, tmp_path: Path) -> None:
    one, two, three = shards.values()

    def refused(*folders: Path) -> str:
        with pytest.raises((ArtefactError, UsageError)) as error:
            merge_shards(folders, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "no shards given" in refused()
    assert "given twice" in refused(one, two, one)
    assert "where the profile goes" in refused(one, two, tmp_path / "out")
    assert refused(one, three).endswith("give shard 2/3 too")
    assert f"{whole.path} is no shard" in refused(one, two, whole.path)
    copy = tmp_path / "copy"
    shutil.copytree(two, copy)
    message = refused(one, two, copy, three)
    assert "both have calibration sample" in message
    assert str(copy) in message
    assert str(two) in message

    weights = changed(three, tmp_path / "weights", lambda head: head["shape"].update(weights_fingerprint="f" * 16))
    assert f"{weights} (shard 3/3) has another weights (fingerprint {'f' * 16}" in refused(one, two, weights)

    reseeded = {**json.loads((three / "profile.json").read_text())["recipe"], "seed": 5}
    seed = changed(three, tmp_path / "seed", lambda head: head.update(request="0" * 16, recipe=reseeded))
    assert "has another request: seed is 5, not 0" in refused(one, two, seed)
    gates = changed(three, tmp_path / "gates", lambda head: head.update(gates="0" * 16))
    assert "has another gates (fingerprint 0000000000000000" in refused(one, two, gates)
    for number, wrong in enumerate(([0, 99], [1, 0], [-1], "all")):
        strange = changed(one, tmp_path / f"strange{number}", partial(with_samples, wrong))
        assert "cannot read it" in refused(strange)
    lacking = tmp_path / "lacking"
    shutil.copytree(two, lacking)
    numbers = json.loads((lacking / "profile.json").read_text())["shard"]["calibration"]
    sample_file(lacking, numbers[-1]).unlink()
    with pytest.raises(ArtefactError, match=rf"shard 2/3\) is not finished: {len(numbers) - 1} of its {len(numbers)}"):
        merge_shards([one, lacking, three], tmp_path / "out")
    assert not (tmp_path / "out" / "influence.safetensors").exists()
    with pytest.raises(ArtefactError, match="is shard 2/3 of a profile; .*--merge"):
        Profile.load(two)
    with pytest.raises(ArtefactError, match="holds shard 2/3 of this profile, not shard 1/3"):
        profile_shard(tiny_folder, lacking, RECIPE, "1/3")
    with pytest.raises(ArtefactError, match="holds shard 2/3 of this profile, not all samples"):
        profile(tiny_folder, lacking, RECIPE)


def test_a_profile_with_more_statistics_is_not_merged_into(shards: Folders, tmp_path: Path) -> None:
    out = merge_shards(list(shards.values()), tmp_path / "profile").path
    head = json.loads((out / "profile.json").read_text())
    head["recipe"]["profile"]["baselines"] = True
    (out / "profile.json").write_text(json.dumps(head))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    more = {
        number: changed(folder, tmp_path / str(number), lambda head: head["recipe"]["profile"].update(heads=True))
        for number, folder in shards.items()
    }
    for folders in (shards, more):
        with pytest.raises(ArtefactError, match=r"that the shards lack \(mass, moa\)"):
            merge_shards(list(folders.values()), out)
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_in_one_shard_and_batches_stay_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drafts = [
        SampleDraft([3] * int(rng.choice([900, 1000, 4000])), [], int(rng.choice([0, 0, 8, 16])), "any", 4096)
        for _ in range(rng.integers(1, 40))
    ]
    whole = [[id(drafts[index]) for index in batch] for batch in answer_batches(drafts) if drafts[batch[0]].room]
    for count in range(1, 9):
        parts = parted(drafts, count)
        assert sorted(number for part in parts for number in part) == list(range(len(drafts)))
        assert all(part == tuple(sorted(part)) for part in parts)
        answered = []
        for part in parts:
            mine = [drafts[number] for number in part]
            answered += [[id(mine[i]) for i in batch] for batch in answer_batches(mine) if mine[batch[0]].room]
        assert sorted(answered) == sorted(whole)
        tokens = [sum(len(drafts[number].ids) + drafts[number].room for number in part) for part in parts]
        assert max(tokens) - min(tokens) <= 9 * (900 + 16)  # no more than a batch


def test_more_shards_than_batches_are_refused() -> None:
    drafts = [SampleDraft([3] * 4096, [], 8, "any", 4096)] * 5  # two in a batch
    assert Shard.of(3, 3, drafts, []).calibration
    with pytest.raises(UsageError, match="shard 4/4 has no samples: .* in 3 batches; make 3 shards or fewer"):
        Shard.of(4, 4, drafts, [])

    for text in ("0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5", ""):
        with pytest.raises(UsageError, match="the third of eight shards is 3/8"):
            parse_shard(text)


def test_a_broken_model_is_found_in_a_shard(whole: Profile) -> None:
    samples = dict(enumerate(whole.calibration_samples()[:2]))
    check_skipped([], samples, 6)
    with pytest.raises(DataError, match="1 of 6 samples"):
        check_skipped([0], samples, 6)
    check_skipped([0], samples, 600)


def test_dry_runs_of_shards_write_nothing_and_are_of_the_shard(
    shards: Folders, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str | Path, exit_code: int = 0) -> Any:
        done = CliRunner().invoke(app, ["profile", *map(str, arguments), "--dry-run", "--json"])
        assert done.exit_code == exit_code, done.output
        assert not out.exists()
        return json.loads(done.stdout) if exit_code == 0 else done.stderr

    out, recipe = tmp_path / "profile", tmp_path / "recipe.yaml"
    found = run("--merge", *shards.values(), "-o", out)
    assert "--merge" in run(tiny_folder, tmp_path, "-o", out, exit_code=2)
    assert "--shard" in run(tiny_folder, "-o", out, "--shard", "1/2", "--audit", "2", exit_code=2)
    held_out = RECIPE.calibration.validation_samples + RECIPE.calibration.longer_samples
    assert (found["shards"], found["samples"], found["validation_samples"]) == (3, 6, held_out)
    assert "calibration samples are in no shard" in run("--merge", shards[1], shards[2], "-o", out, exit_code=1)
    stolen, alone = tmp_path / "stolen", tmp_path / "alone"
    shutil.copytree(shards[1], stolen)
    (stolen / "answers.jsonl").unlink(missing_ok=True)
    (stolen / "answers.jsonl").symlink_to(shards[2] / "profile.json")
    assert "answers.jsonl is a link" in run("--merge", stolen, shards[2], shards[3], "-o", out, exit_code=1)
    changed(shards[1], alone, lambda head: head["shard"].update(totals=[10**12, 10**12]))
    assert "of 1000000000000 calibration samples are in no" in run("--merge", alone, "-o", out, exit_code=1)
    monkeypatch.setattr(Estimator, "one", lambda *arguments: 1.0)
    monkeypatch.setattr(estimate, "profile_bytes", lambda *arguments: defaultdict(int))
    recipe.write_text(json.dumps(RECIPE.resolved()))
    whole = run(tiny_folder, "-o", out, "--recipe", recipe)
    parts = [run(tiny_folder, "-o", out, "--recipe", recipe, "--shard", f"{number}/3") for number in (1, 2, 3)]
    for name in ("samples", "text_samples", "validation_samples"):
        assert sum(part[name] for part in parts) == whole[name]
    for number, part in enumerate(parts, 1):
        head = json.loads((shards[number] / "profile.json").read_text())
        assert part["samples"] + part["text_samples"] == len(head["shard"]["calibration"])
    assert "the third of eight shards is 3/8" in run(tiny_folder, "-o", out, "--shard", "4/3", exit_code=2)

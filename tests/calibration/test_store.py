"""The profile's folder: what is read back, what is refused, what a resumed run trusts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moacompress.calibration.data.samples import Sample, fingerprint_samples, save_samples
from moacompress.calibration.profile.folder import clear_profile, prepare, recipe_in
from moacompress.calibration.profile.manifest import Manifest, is_profile
from moacompress.calibration.profile.request import file_digests, request_fingerprint
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile, merge, read_sample, read_samples, write_sample
from moacompress.core.artefact_names import sample_file
from moacompress.core.errors import ArtefactError, UsageError
from moacompress.core.version import own_version
from moacompress.recipe import Recipe
from moacompress.rules.formats import CODED
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule

SHAPE = ModelShape("llama", 3, 4, 2, 16, "float32", (None, 24, None), "0123456789abcdef")
RULES = (Rule.FULL, Rule(4, 32, 0), Rule(16, 0, 256))
RECIPE = Recipe.from_dict({"calibration": {"lengths": [128, 256]}, "profile": {"draws": 2}})
LENGTHS = (128, 128, 256)
PROFILED = [Sample(np.arange(n - 1), np.arange(n - 1) > n - 5, "random", n) for n in LENGTHS]


def head(**changes: Any) -> Manifest:
    request = request_fingerprint(SHAPE, RULES, RECIPE, {})
    return replace(Manifest("some/model", SHAPE, RULES, RECIPE, request), **changes)


def statistics(seed: int) -> Statistics:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.random(shape).astype(np.float32) for name, shape in head().array_shapes.items()}
    for array in arrays.values():
        array[..., 0] = 0
    return Statistics(arrays)


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, 99, n), np.arange(n) > n - 5, "needle/noise", n) for n in (100, 200)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished profile of three samples."""
    out = tmp_path / "profile"
    begun = prepare(out, head(), False)
    for split in ("calibration", "validation"):
        save_samples(out / f"{split}.safetensors", samples())
    mark = fingerprint_samples(samples())
    begun = replace(begun, fingerprint="f00d", calibration_fingerprint=mark, validation_fingerprint=mark, seconds=3.5)
    for index in range(len(LENGTHS)):
        write_sample(out, index, statistics(index), "f00d", 1.0)
    merge(out, begun, PROFILED, [statistics(index) for index in range(len(LENGTHS))])
    return out


def test_round_trip(folder: Path) -> None:
    profile = Profile.load(folder)
    assert (profile.source, profile.shape, profile.rules, profile.recipe) == ("some/model", SHAPE, RULES, RECIPE)
    assert (profile.lengths, profile.min_window, profile.seconds) == ((128, 256), 32, 3.5)
    assert profile.fingerprint == "f00d"
    assert profile.calibration_fingerprint == fingerprint_samples(profile.validation)
    assert profile.sample_lengths.tolist() == list(LENGTHS)
    assert profile.sample_kinds == ("answer",) * 3
    assert profile.estimators == ("robust",)
    for name, array in statistics(1).arrays.items():
        assert np.array_equal(profile.statistics.arrays[name][1], array)


def test_influence_is_a_power_mean_of_half_the_squares(folder: Path) -> None:
    profile = Profile.load(folder)
    influence = profile.influence("robust")
    assert influence.shape == (2, 3, 2, 3)
    assert influence.dtype == np.float64
    halves = np.stack([statistics(index).arrays["squares"] for index in range(3)]).astype(np.float64) / 2
    assert np.allclose(influence[0], (halves[:2] ** 0.75).mean(0) ** (4 / 3), rtol=1e-12)
    assert np.allclose(influence[1], halves[2], rtol=1e-12)  # one sample is its own mean
    assert not influence[..., 0].any()
    with pytest.raises(UsageError, match="no statistics for the estimator 'moa'"):
        profile.influence("moa")
    with pytest.raises(UsageError, match="'best' is not one of robust, moa, mass"):
        profile.influence("best")
    with pytest.raises(UsageError, match="no samples of kind 'text' but answer"):
        profile.influence("robust", "text")
    offered = profile.offering(["int8"])
    assert offered.estimators == ("robust",)
    with pytest.raises(UsageError, match="'moa' says nothing of formats"):
        offered.influence("moa")


def test_kinds_are_apart_and_a_subset_keeps_them(folder: Path) -> None:
    profile = replace(Profile.load(folder), sample_kinds=("answer", "text", "answer"))
    alone = [statistics(index).arrays["squares"].astype(np.float64) / 2 for index in range(3)]
    assert np.allclose(profile.influence("robust"), np.stack([alone[0], alone[2]]))
    # plain text was not profiled at 256 tokens: what there is serves there too
    assert np.allclose(profile.influence("robust", "text"), np.stack([alone[1], alone[1]]))
    part = profile.subset([2, 0])
    assert (part.sample_lengths.tolist(), part.sample_kinds) == ([256, 128], ("answer", "answer"))
    assert np.array_equal(part.influence("robust"), profile.influence("robust"))


def test_a_skipped_sample_is_not_merged(tmp_path: Path) -> None:
    bad = statistics(1)
    bad.arrays["squares"][1, 0, 1] = np.nan
    assert bad.not_finite() == "squares of layer 1"
    out = tmp_path / "profile"
    begun = replace(prepare(out, head(), False), skipped=(1,))
    save_samples(out / "validation.safetensors", samples())
    merge(out, begun, PROFILED, [statistics(0), bad, statistics(2)])
    profile = Profile.load(out)
    assert profile.sample_lengths.tolist() == [128, 256]
    assert profile.skipped == (1,)
    save_samples(out / "calibration.safetensors", PROFILED)
    profile = replace(profile, calibration_fingerprint=fingerprint_samples(PROFILED))
    left = [sample.input_ids.tolist() for sample in profile.calibration_samples()]
    assert left == [PROFILED[index].input_ids.tolist() for index in (0, 2)]
    assert np.isfinite(profile.influence("robust")).all()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("influence.safetensors", cut),
        ("influence.safetensors", flip),
        ("validation.safetensors", Path.unlink),
        ("validation.safetensors", lambda path: path.write_bytes(b"")),
        ("profile.json", cut),
        ("profile.json", Path.unlink),
    ],
)
def test_damage_is_one_error_that_names_the_file(folder: Path, name: str, damage: Any) -> None:
    damage(folder / name)
    with pytest.raises(ArtefactError, match=name) as error:
        Profile.load(folder)
    assert "run the same profile command again" in str(error.value) or "moacompress profile" in str(error.value)


def test_an_unfinished_profile_says_what_to_do(tmp_path: Path) -> None:
    prepare(tmp_path / "profile", head(), False)
    with pytest.raises(ArtefactError, match="not finished; run the same profile command again"):
        Profile.load(tmp_path / "profile")
    with pytest.raises(ArtefactError, match="is not a profile"):
        Profile.load(tmp_path)


OTHER_ARRAYS: dict[str, tuple[str, str, Any]] = {
    "kinds": ("influence", "kinds", lambda array: array.astype(np.float64)),
    "column": ("influence", "lengths", lambda array: array[:, None]),
    "offsets": ("validation", "offsets", lambda array: array.astype(np.float64)),
    "infinite": ("validation", "lengths", lambda array: array * np.inf),
    "bfloat16": ("influence", "lengths", None),
}
"""Files and their arrays, with what is put in the array's place; None for a type that numpy has not."""


@pytest.mark.parametrize(("file", "name", "other"), OTHER_ARRAYS.values(), ids=OTHER_ARRAYS)
def test_arrays_of_other_types_are_one_error(folder: Path, file: str, name: str, other: Any) -> None:
    path = folder / f"{file}.safetensors"
    with safe_open(path, "pt") as opened:
        arrays, notes = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    arrays[name] = arrays[name].bfloat16() if other is None else torch.as_tensor(other(arrays[name].numpy()))
    save_file(arrays, path, notes)
    with pytest.raises(ArtefactError, match=f"{file}.safetensors"):
        Profile.load(folder)


def test_samples_are_not_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    """Which a profile of somebody else may have: a resumed run writes there, and removes what looks half-written."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / ".notes.safetensors.12345678.tmp").write_text("mine")
    shutil.rmtree(folder / "samples")
    (folder / "samples").symlink_to(mine)
    for overwrite in (False, True):
        with pytest.raises(ArtefactError, match="samples is a link, which is not followed"):
            prepare(folder, head(), overwrite)
    assert [path.name for path in mine.iterdir()] == [".notes.safetensors.12345678.tmp"]


DELETED = object()
"""Takes a field away."""


def change(folder: Path, **fields: Any) -> None:
    """Changes fields of the head, as another version might have written them."""
    path = folder / "profile.json"
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not DELETED}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


OTHER_HEADS: list[tuple[dict[str, Any], str]] = [
    ({"version": 4}, "version 4, this moacompress reads up to 3"),
    ({"version": "2b"}, "version 2b"),
    ({"moacompress_version": None, "recipe": {"search": {"wings": 2}}}, "its recipe: unknown key 'search.wings'"),
    ({"recipe": {"profile": {"draws": 0}}}, "its recipe"),
    ({"recipe": ["a"]}, "its recipe"),
    ({"rules": [[4, 32, 0, "int3", "int3"]]}, "int3"),
    ({"rules": [[4, 0, 1024], [4, 2**70, 0]]}, "alpha of layer 0 KV head 0 is 1180591620717411303424"),
    ({"rules": {"a": 1}}, "cannot read it"),
    ({"shape": {**SHAPE.to_dict(), "wings": 2}}, "wings"),
    ({"shape": {**SHAPE.to_dict(), "native_windows": [None, 2.5, None]}}, "native_windows of layer 1"),
    ({"shape": {**SHAPE.to_dict(), "layers": 10**9}}, "model.layers is 1000000000"),
    ({"shape": 3}, "cannot read it"),
    ({"skipped": None}, "cannot read it"),
    ({"skipped": [float("inf")]}, "cannot convert float infinity"),
    ({"digest": 3}, "cannot read it"),
    ({"digest": DELETED}, "no 'digest'"),
]


@pytest.mark.parametrize(
    ("fields", "said"), OTHER_HEADS, ids=[f"{next(iter(fields))}-{said}" for fields, said in OTHER_HEADS]
)
def test_a_profile_of_another_version_is_refused_and_not_touched(
    folder: Path, fields: dict[str, Any], said: str
) -> None:
    fields = {"moacompress_version": "9.9.9", **fields}
    change(folder, **fields)
    (folder / ".profile.json.89abcdef.tmp").write_text("half a fi")
    before = contents(folder)
    by = "moacompress 9.9.9" if fields["moacompress_version"] else "an unnamed version of moacompress"
    for use in (
        lambda: Profile.load(folder),
        lambda: recipe_in(folder, "some/model"),
        lambda: prepare(folder, head(), False),
        lambda: prepare(folder, head(request="another"), False),
    ):
        with pytest.raises(ArtefactError, match=f"profile.json was made by {by} and .*{said}"):
            use()
        assert contents(folder) == before
    assert prepare(folder, head(), True) == head()
    assert list(contents(folder)) == ["profile.json"]


def test_what_cannot_be_opened_is_not_taken_for_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)

    def denied(path: Path, mode: str = "r") -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", denied)
        with pytest.raises(ArtefactError, match="cannot read profile .*: Permission denied"):
            prepare(folder, head(), False)
    assert contents(folder) == before


@pytest.mark.parametrize("damage", [cut, lambda path: change(path.parent, version=3)], ids=["cut", "another version"])
def test_a_cleared_folder_with_other_files_is_free_again(folder: Path, damage: Any) -> None:
    (folder / "notes.txt").write_text("mine")
    damage(folder / "profile.json")
    clear_profile(folder)
    assert sorted(contents(folder)) == ["notes.txt", "profile.json"]
    assert is_profile(folder)
    assert prepare(folder, head(), False) == head()


def forget_formats(folder: Path) -> None:
    """Makes a profile one that was asked for no formats."""
    recipe = json.loads((folder / "profile.json").read_text())["recipe"]
    recipe["profile"]["formats"] = []
    plain = [Statistics({k: v for k, v in statistics(i).arrays.items() if k in ("squares", "total")}) for i in range(3)]
    change(folder, recipe=recipe, digest=Statistics.stack(plain).digest())
    merge(folder, replace(Manifest.read(folder), complete=False), PROFILED, plain)
    change(folder, recipe=recipe)


def test_a_profile_without_formats_is_read_and_completed(folder: Path) -> None:
    forget_formats(folder)
    older = Profile.load(folder)
    assert older.recipe.profile.formats == older.profiled_formats == ()
    assert set(older.statistics.arrays) == {"squares", "total"}
    assert older.offering(()).rules == older.rules
    with pytest.raises(UsageError, match="nothing of the format int4; run the same profile command again"):
        older.offering(["int4"])
    again = prepare(folder, head(), False)
    assert not again.complete  # its samples are to be profiled again
    assert again.recipe.profile.formats == CODED


def test_prepare_resumes_the_same_request_only(folder: Path) -> None:
    later = RECIPE.override(search__trials=3)
    assert json.loads((folder / "profile.json").read_text())["moacompress_version"] == own_version()
    change(folder, moacompress_version="0.0.1")  # which decides nothing
    found = prepare(folder, head(recipe=later, source="moved/model"), False)
    assert found.complete
    assert Profile.load(folder).recipe == later
    assert Profile.load(folder).source == "moved/model"

    other = head(request="another")
    with pytest.raises(ArtefactError, match="another model or recipe"):
        prepare(folder, other, False)
    assert Profile.load(folder)
    cut(folder / "profile.json")
    assert prepare(folder, head(), False) == head()
    assert sorted(path.name for path in folder.iterdir()) == ["influence.safetensors", "profile.json", "samples"]
    assert prepare(folder, other, True) == other
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json"]
    assert prepare(folder, head(), False) == head()  # nothing was saved of the other one


def test_prepare_refuses_what_is_not_a_profile(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        for overwrite in (False, True):
            with pytest.raises(ArtefactError, match="exists already and is not a profile"):
                prepare(path, head(), overwrite)
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".profile.json.89abcdef.tmp").write_text("half a fi")  # killed in the very first write
    assert prepare(tmp_path / "empty", head(), False) == head()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "profile.json").write_text('{"format": "something else"}')
    assert not is_profile(foreign)
    for overwrite in (False, True):
        with pytest.raises(ArtefactError, match="format"):
            prepare(foreign, head(), overwrite)
    assert (foreign / "profile.json").read_text() == '{"format": "something else"}'


def test_only_a_sample_file_as_it_was_written_is_taken(folder: Path) -> None:
    shape, path = head().array_shapes, sample_file(folder, 1)
    found = read_sample(folder, 1, "f00d", shape)
    assert found is not None
    assert found[0].digest() == statistics(1).digest()
    assert read_samples(folder / "calibration.safetensors", "") is not None
    assert read_samples(folder / "calibration.safetensors", "other") is None
    assert found[1] == 1.0
    assert read_sample(folder, 1, "other", shape) is None
    assert read_sample(folder, 1, "f00d", {**shape, "total": (2, 3, 2, 4)}) is None
    assert read_sample(folder, 9, "f00d", shape) is None
    path.write_bytes(sample_file(folder, 0).read_bytes())
    assert read_sample(folder, 1, "f00d", shape) is None
    for damage in (flip, cut):
        write_sample(folder, 1, statistics(1), "f00d", 1.0)
        damage(path)
        assert read_sample(folder, 1, "f00d", shape) is None


def test_the_request_depends_on_what_decides_the_numbers(tmp_path: Path) -> None:
    base = request_fingerprint(SHAPE, RULES, RECIPE, {})
    same = RECIPE.override(search__trials=2, evaluation__prompts=3, budget="25%")
    assert request_fingerprint(SHAPE, RULES, same, {}) == base
    others = [RECIPE.override(seed=1), RECIPE.override(profile__draws=3), RECIPE.override(calibration__samples=3)]
    hashes = {request_fingerprint(SHAPE, RULES, recipe, {}) for recipe in others}
    hashes |= {
        request_fingerprint(replace(SHAPE, weights_fingerprint="other"), RULES, RECIPE, {}),
        request_fingerprint(SHAPE, RULES[:2], RECIPE, {}),
        request_fingerprint(SHAPE, RULES, RECIPE, {"qa.jsonl": "0"}),
        request_fingerprint(SHAPE, RULES, RECIPE, {}, computes_in="bfloat16"),
        request_fingerprint(replace(SHAPE, dtype="bfloat16"), RULES, RECIPE, {}, computes_in=SHAPE.dtype),
    }
    assert base == request_fingerprint(SHAPE, RULES, RECIPE, {}, computes_in=SHAPE.dtype)
    assert base not in hashes
    assert len(hashes) == 8
    rows = tmp_path / "qa.jsonl"
    named = RECIPE.override(calibration__sources=[{"path": str(rows)}])
    digests = []
    for row in ("a", "b"):
        rows.write_text(row)
        digests.append(file_digests(named))
    assert digests[0].keys() == digests[1].keys() == {"qa.jsonl"}
    assert digests[0] != digests[1]


def test_rules_in_formats_cost_their_span_and_their_formats(folder: Path) -> None:
    profile = Profile.load(folder)
    assert profile.profiled_formats == CODED
    assert profile.spans == profile.rules == RULES
    assert profile.parts is None
    for wanted in (("int8", "int4"), ("int4",)):
        offered = profile.offering(wanted)
        assert offered.rules[: len(RULES)] == offered.spans == RULES
        assert len(set(offered.rules)) == len(offered.rules) == 3 * (1 + len(wanted)) ** 2
        assert offered.offering(wanted).rules == offered.rules
        assert offered.offering(()).rules == RULES
        assert offered.subset([0, 2]).rules == offered.rules
        alone, found, arrays = profile.influence("robust"), offered.influence("robust"), profile.statistics.arrays
        parts, totals = offered.parts, offered.of_parts("total")
        assert parts is not None
        for number, rule in enumerate(offered.rules):
            span = RULES.index(Rule(rule.sink, rule.alpha, rule.beta_q))
            expected, moved = alone[..., span].copy(), arrays["total"][..., span].astype(np.float64)
            for side, name in (("key", rule.key_format), ("value", rule.value_format)):
                column = ("native", *CODED).index(name)
                of_format = arrays[f"{side}_squares"][..., column].astype(np.float64) / 2
                for place, length in enumerate((128, 256)):
                    expected[place] += (of_format[profile.sample_lengths == length] ** 0.75).mean(0) ** (4 / 3)
                moved = moved + arrays[f"{side}_total"][..., column]
            np.testing.assert_allclose(found[..., number], expected, rtol=1e-6)
            np.testing.assert_allclose(totals[..., parts[number]].sum(-1), moved, rtol=1e-6)

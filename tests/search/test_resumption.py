"""The same call resumes where a killed one stopped, or starts from scratch where it is told to."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from moacompress.core.artefact_names import of_search
from moacompress.core.errors import ArtefactError, ModelError
from moacompress.core.files import remove
from moacompress.rules.plan import Plan
from moacompress.search import study
from tests.search.conftest import Search, make_profile


def test_killed_at_any_point_the_same_call_ends_the_same(search: Search, tmp_path: Path) -> None:
    whole, fake = search(out=tmp_path / "whole.json")
    total = len(fake.calls)
    out, measured, runs = tmp_path / "plan.json", [], 0
    result = None
    while result is None:
        runs += 1
        result, fake = search(out=out, dies_at=13)
        measured += fake.calls
        if runs == 4:  # what a kill in the middle of a write leaves
            with (tmp_path / "plan.study.journal").open("ab") as file:
                file.write(b'{"op_code": 8, "worker')
    assert runs > 5
    assert result.plan == whole.plan
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    # only the plan at hand when it died is measured again: at most its 8 samples a run
    assert len(measured) - total <= 8 * (runs - 1)
    finished, fake = search(out=out)
    assert fake.calls == []
    assert finished.plan == whole.plan


def test_a_run_that_stops_sooner_takes_nothing_back(search: Search, tmp_path: Path) -> None:
    out, kls, stage = tmp_path / "plan.json", list[float](), ""
    while not stage.startswith("trial") or stage == "trial 0":
        result, _ = search(make_profile(trials=14), out=out, dies_at=9)
        assert result is None
        found = Plan.load(out)
        stage = found.provenance["stage"]
        kl = found.quality["measured_harm"]["plan"]
        assert kls == [] or kl is not None
        kls += [kl] if kl is not None else []
    stopped, _ = search(make_profile(trials=14, timeout=1e-6), out=out)
    assert stopped.harm["plan"] == kls[-1] < kls[0]
    assert stopped.plan.provenance["stage"] == stage
    assert stopped.plan.provenance["finished"] is False
    more, _ = search(make_profile(trials=16, timeout=1e-6), out=out)
    assert more.harm["plan"] <= kls[-1]


def test_more_trials_go_on_with_the_same_study(search: Search, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    search(make_profile(trials=4), out=out)
    result, fake = search(make_profile(trials=7), out=out)
    assert result.trials == 7
    assert len(fake.calls) <= 3 * 8
    again, fake = search(make_profile(trials=5), out=out)
    assert again.trials == 7
    assert fake.calls == []


def test_what_is_at_the_output_already(search: Search, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    out.write_text("{}")
    with pytest.raises(ArtefactError, match="is not a plan"):
        search(make_profile(trials=2), out=out)
    search(make_profile(trials=2), out=out, overwrite=True)
    with pytest.raises(ArtefactError, match="another search"):
        search(make_profile(trials=2), "60%", out=out)
    assert Plan.load(out).budget["asked"] == ["50%"]
    search(make_profile(trials=2), "60%", out=out, overwrite=True)
    assert Plan.load(out).budget["asked"] == ["60%"]
    with pytest.raises(ArtefactError, match="exists already"):
        search(make_profile(trials=2), out=tmp_path, overwrite=True)


def test_overwrite_starts_from_scratch_and_leaves_what_is_not_of_the_search(search: Search, tmp_path: Path) -> None:
    out, profile = tmp_path / "plan.json", make_profile(trials=2)
    _, fresh = search(profile, out=tmp_path / "whole" / "plan.json")
    search(profile, out=out)
    for name in ("plan.baselines/old.json", "plan.scouts/99.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"provenance": {"baseline": "old"}}')
    (tmp_path / ".plan.json.89abcdef.tmp").write_text("half a pl")
    (tmp_path / "plan.study.journal.lock").write_text("")
    own = ("plan.txt", "plan.notes.json", "plan-25.json", "plan.study.journal.copy", "other.study.journal")
    for name in own:
        (tmp_path / name).write_text("mine")
    made = {path.name for path in of_search(out)}
    with ExitStack() as held:  # an open file keeps its inode from being given to another
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.relative_to(tmp_path).parts[0] in made]
        before = {os.fstat(held.enter_context(path.open()).fileno()).st_ino for path in files}
        _, fake = search(profile, out=out, overwrite=True)
        assert not before & {path.stat().st_ino for path in tmp_path.rglob("*")}
    assert fake.calls == fresh.calls
    assert out.read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()
    left = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")}
    assert left <= {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert {path.name for path in tmp_path.iterdir()} == {*own, "whole", *(path.parts[0] for path in left)}
    assert all((tmp_path / name).read_text() == "mine" for name in own)


@pytest.mark.parametrize(
    ("theirs", "overwrite"), [("notes.txt", False), ("results.json", True), ("deep/notes.txt", True), (None, False)]
)
def test_a_folder_that_no_search_left_is_not_removed(
    search: Search, tmp_path: Path, theirs: str | None, overwrite: bool
) -> None:
    folder = tmp_path / "plan.baselines"
    file = folder if theirs is None else folder / theirs
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    with pytest.raises(ArtefactError, match=r"plan.baselines.* was not left by a search; move it, or choose another"):
        search(make_profile(trials=1), out=tmp_path / "plan.json", overwrite=overwrite)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {file}


def test_overwrite_forgets_the_study_in_a_storage_and_no_other(search: Search, tmp_path: Path) -> None:
    profile = make_profile(trials=2, storage=str(tmp_path / "s.log"))
    _, first = search(profile, out=tmp_path / "plan.json")
    _, other = search(profile, "60%", out=tmp_path / "other.json")
    _, again = search(profile, out=tmp_path / "plan.json", overwrite=True)
    assert again.calls == first.calls
    _, kept = search(profile, "60%", out=tmp_path / "copy.json")
    assert kept.calls == []
    assert other.calls


@pytest.mark.heavy
def test_an_overwrite_that_is_interrupted_is_recovered_from(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every removal in turn, the same command starts from scratch; without the flag the search resumes."""
    profile = make_profile(trials=1)
    whole, fresh = search(profile, out=tmp_path / "plan.json")

    for stop in range(len(of_search(tmp_path))):

        def removing(paths: list[Path], stop: int = stop) -> None:
            remove(paths[:stop])
            raise KeyboardInterrupt

        for overwrite in (True, False):
            with monkeypatch.context() as patched:
                patched.setattr(study, "remove", removing)
                assert search(profile, out=tmp_path / "plan.json", overwrite=True)[0] is None
            result, fake = search(profile, out=tmp_path / "plan.json", overwrite=overwrite)
            assert result.plan == whole.plan
            assert not overwrite or fake.calls == fresh.calls


def test_overwrite_removes_nothing_for_a_search_that_cannot_begin(search: Search, tmp_path: Path) -> None:
    """The model has moved since it was profiled: the earlier plan, its study and what lies beside it stay."""
    from moacompress.search.study import find_plan

    out = tmp_path / "plan.json"
    profile = make_profile(trials=2)
    search(profile, out=out)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    profile = replace(profile, source=str(tmp_path / "moved"))
    with pytest.raises(ModelError, match="moved does not exist"):
        find_plan(profile, "50%", recipe=profile.recipe, out=out, overwrite=True)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before

"""The measured cells on disk: they come back, and those of another configuration are never mixed in."""

import json

import pytest

from moacompress.bench.cell_store import CellStore
from moacompress.core.artefact_names import of_bench
from moacompress.core.errors import ArtefactError

CONFIGURATION = {"lengths": (1024, 2048), "threads": 2}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "bench.json"


def begun(out, configuration=CONFIGURATION, **more):
    store = CellStore(out, configuration, **more)
    store.begin()
    return store


def test_cells_come_back(out):
    store = begun(out)
    store.add("decode", {"seconds": {"plan": [0.1, float("nan")]}})
    with out.with_name("bench.cells.jsonl").open("a") as file:
        file.write('\n{"key": "cut off", "ce')
    again = begun(out)
    assert again.get("decode") == {"seconds": {"plan": [0.1, None]}}
    assert again.get("cut off") is None
    again.add("prefill", {})
    assert begun(out).get("prefill") == {}


def test_nothing_is_written_before_it_begins(out):
    CellStore(out, CONFIGURATION)
    assert list(out.parent.iterdir()) == []
    CellStore(None, CONFIGURATION).begin()


def test_another_configuration_is_refused(out):
    begun(out).add("decode", {"a": 1})
    other = {**CONFIGURATION, "threads": 1}
    with pytest.raises(ArtefactError, match=r"another configuration: threads 2 where this one has 1; .*--overwrite"):
        CellStore(out, other)
    store = CellStore(out, other, overwrite=True)
    assert store.get("decode") is None
    assert CellStore(out, CONFIGURATION).get("decode") == {"a": 1}  # nothing is lost before it begins
    store.begin()
    assert begun(out, other).get("decode") is None


def test_overwrite_measures_the_same_configuration_anew(out):
    begun(out).add("decode", {"a": 1})
    out.write_text("no JSON")
    with out.open() as held:  # an open file keeps its inode from being given to another
        store = CellStore(out, CONFIGURATION, overwrite=True)
        assert store.get("decode") is None
        assert {path.name for path in out.parent.iterdir()} == {path.name for path in of_bench(out)}
        store.begin()  # only now is anything lost
        assert not out.exists()
        assert held.read() == "no JSON"
    store.add("prefill", {})
    again = begun(out)
    assert (again.get("decode"), again.get("prefill")) == (None, {})


def test_a_result_of_something_else_is_refused(out):
    out.write_text(json.dumps({"runs": []}))
    with pytest.raises(ArtefactError, match=r"bench.json is no benchmark of this tool"):
        CellStore(out, CONFIGURATION)
    CellStore(out, CONFIGURATION, overwrite=True)
    out.write_text("no JSON")
    with pytest.raises(ArtefactError, match=r"not valid JSON"):
        CellStore(out, CONFIGURATION)
    with pytest.raises(ArtefactError, match=r"is a folder; name a file"):
        CellStore(out.parent, CONFIGURATION)


def test_cells_of_something_else_are_refused(out):
    out.with_name("bench.cells.jsonl").write_text("a diary\n")
    with pytest.raises(ArtefactError, match=r"bench.cells.jsonl is no benchmark of this tool"):
        CellStore(out, CONFIGURATION)

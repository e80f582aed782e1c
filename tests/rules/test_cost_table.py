"""The cost table: what is read back, and every refusal of a file that nobody may trust."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moacompress.core.errors import ArtefactError
from moacompress.estimate.machine import this_machine
from moacompress.rules.cost_table import CostTable, command_for, head_groups
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from tests.cost_tables import known_table

SHAPE = ModelShape("llama", 3, 4, 2, 16, "float32", (None, 64, None), "0123456789abcdef")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return known_table(SHAPE, (512, 1024), (2, 8))


def test_a_file_is_read_back(data: dict[str, Any], tmp_path: Path) -> None:
    table = CostTable.from_dict(data)
    table.save(tmp_path / "t.json")
    again = CostTable.load(tmp_path / "t.json")
    assert again == table
    assert again.key == table.key
    assert again.cell_names == "512x2, 512x8, 1kx2, 1kx8"
    cell = again.find_cell(1024, 8)
    assert cell is not None
    assert cell.full_span.name == "full span"
    assert again.find_cell(1024, 4) is None
    assert again.differences(SHAPE, this_machine("cpu", "float32"), ("keep", None)) == []


def test_heads_are_counted_by_formats() -> None:
    rule = Rule(4, 32, 0, "int8", "int4")
    rows = ((Rule.FULL, rule), (Rule.FULL, rule), (Rule(4, 32, 0, select_alpha=48), rule))
    found = {
        (group.key_format, group.gated): group for group in head_groups(Plan(SHAPE, 16, rows, gates="0" * 16), 512)
    }
    assert [(found[key].heads, found[key].slots, found[key].selected) for key in sorted(found)] == [
        (3, 48 + 32 + 48, 0),  # two blocks of the window, and one of sinks but where the layer's own window hides them
        (2, 512 + 64, 0),
        (1, 48 + 48, 48),
    ]
    assert sum(group.slots for group in found.values()) == Plan(SHAPE, 16, rows, gates="0" * 16).slots(512)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="moacompress-plan"), 'not a cost table: "format"'),
        (lambda d: d.update(version=2), "version 2, this moacompress reads up to 1"),
        (lambda d: d.update(version=True), "version"),
        (lambda d: d.update(more=1), "unknown key 'more'"),
        (lambda d: d.pop("cells"), "lacks the key 'cells'"),
        (lambda d: d.update(cells=[]), "cells"),
        (lambda d: d.update(cells=d["cells"] * 100), "cells"),
        (lambda d: d["configuration"].update(threads=0), "configuration.threads is 0"),
        (lambda d: d["configuration"].update(processor="x" * 1000), "configuration.processor"),
        (lambda d: d["configuration"]["model"].update(layers=10**9), "configuration.model.layers"),
        (lambda d: d["cells"][0].update(rows=0), "cells[0].rows is 0"),
        (lambda d: d["cells"][0].update(length=2**40), "cells[0].length"),
        (lambda d: d["cells"][1].update(rows=2), "two of its cells have the same length and rows"),
        (lambda d: d["cells"][0]["points"][3].update(ms=float("nan")), "cells[0].points[3].ms"),
        (lambda d: d["cells"][0]["points"][3].update(ms=float("inf")), "cells[0].points[3].ms"),
        (lambda d: d["cells"][0]["points"][3].update(ms=-1.0), "cells[0].points[3].ms is -1.0"),
        (lambda d: d["cells"][0]["points"][3].update(ms="3"), "cells[0].points[3].ms"),
        (lambda d: d["cells"][0]["points"][3].update(spread_ms=[1.0]), "cells[0].points[3].spread_ms"),
        (lambda d: d["cells"][0]["points"][3].update(groups=[]), "cells[0].points[3].groups"),
        (lambda d: d["cells"][0]["points"][3]["groups"][0].update(key_format="int2"), "is int2, not one of native"),
        (
            lambda d: d["cells"][0]["points"][3]["groups"][0].update(heads=5),
            "points[3] is of 5 KV heads; the model has 6",
        ),
        (lambda d: d["cells"][0]["points"][3]["groups"][0].update(slots=10**6), "points[3] keeps 1,000,000 tokens"),
        (lambda d: d["cells"][0]["points"][3]["groups"][0].update(selected=16), "16 of them selected"),
        (lambda d: d["cells"][0]["points"][3].update(use="full_span"), "has 2 steps at full span"),
        (
            lambda d: d["cells"][0]["points"][0].update(ms=0.1),
            "what heads keep makes no difference that can be measured",
        ),
    ],
)
def test_refusals(change: Callable[[dict[str, Any]], Any], words: str, data: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(data)
    change(changed)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(ArtefactError) as caught:
        CostTable.load(path)
    assert str(caught.value).startswith(f"cost table {path}: ")
    assert words in str(caught.value)


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with pytest.raises(ArtefactError, match="moacompress bench MODEL --cost-table"):
        CostTable.load(path)
    assert command_for("c.json", [(8192, 8), (4096, 8), (4096, 32)]) == (
        "moacompress bench MODEL --cost-table c.json --lengths 4k,8k --batch 8,32"
    )


def test_what_is_not_a_file_of_json(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ArtefactError, match="not valid JSON"):
        CostTable.load(path)
    path.write_text("[1]")
    with pytest.raises(ArtefactError, match="not a cost table"):
        CostTable.load(path)
    with path.open("w") as file:
        file.truncate(1 << 25)
    with pytest.raises(ArtefactError, match="at most 16,777,216 are read"):
        CostTable.load(path)


def test_differences_are_named(data: dict[str, Any]) -> None:
    table, here = CostTable.from_dict(data), this_machine("cpu", "float32")
    other = replace(SHAPE, kv_heads=4, dtype="bfloat16", weights_fingerprint="of another checkpoint")
    assert table.differences(other) == ["kv heads 2 in the table, 4 here", "dtype float32 in the table, bfloat16 here"]
    machine = replace(here, device="cuda", threads=here.threads + 3, kernel="reference", isa="")
    assert table.differences(SHAPE, machine) == [
        "device cpu in the table, cuda here",
        f"threads {here.threads} in the table, {here.threads + 3} here",
        *([f"kernel {here.kernel} in the table, reference here"] if here.kernel != "reference" else []),
        *([f"isa {here.isa} in the table, none here"] if here.isa else []),
    ]
    assert table.differences(SHAPE, here, ("int8", "int4")) == [
        "weights keep in the table, int8 here",
        "head weights none in the table, int4 here",
    ]

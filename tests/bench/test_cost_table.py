"""Measuring a cost table on a tiny model: what is timed, what is filed, and how it fails. No time is asserted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moacompress.bench import cost_table
from moacompress.bench.bench_request import Cell
from moacompress.bench.cost_table import CostTableRequest, measure_cost_table, probes
from moacompress.bench.sides import FilledPlanCache, overlapping_kv
from moacompress.core.errors import ArtefactError, DataError, MoaCompressError, UsageError
from moacompress.models.source import SourceModel, load_source
from moacompress.rules.cost_table import CostTable, head_groups
from moacompress.rules.model_shape import ModelShape

REQUEST = CostTableRequest((256,), (1, 3), tokens=2, repeats=2)


@pytest.fixture(scope="module")
def source(tiny_folder: Path) -> SourceModel:
    return load_source(str(tiny_folder))


class Clock:
    """Seconds that pass as they are asked for: every run of a plan takes as long as the tokens that it keeps."""

    def __init__(self, shape: ModelShape, inputs: int) -> None:
        self.slots = [
            sum(group.slots for group in head_groups(probe.plan, 256)) for probe in probes(shape, inputs, 256, 0)
        ]
        self.calls, self.now = 0, 0.0

    def __call__(self) -> float:
        if self.calls % 2:
            self.now += self.slots[self.calls // 2 % len(self.slots)] * 1e-6
        self.calls += 1
        return self.now


def test_a_table_is_measured_and_resumed(source: SourceModel, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    inputs = source.model.config.hidden_size
    clock = Clock(source.shape, inputs)
    table = measure_cost_table(source, REQUEST, out, clock=clock)
    assert CostTable.load(out) == table
    assert table.cell_names == "256x1, 256x3"
    assert table.configuration.lengths == [256]
    assert (tmp_path / "costs.cells.jsonl").exists()
    names = [probe.name for probe in probes(source.shape, inputs, 256, 0)]
    for cell in table.cells:
        assert [point.name for point in cell.points] == names
        for point, slots in zip(cell.points, clock.slots, strict=True):
            assert point.ms == pytest.approx(slots * 1e-3 / REQUEST.tokens)
    again = measure_cost_table(source, REQUEST, out, clock=lambda: pytest.fail("measured again"))
    assert again.cells == table.cells
    with pytest.raises(ArtefactError, match="repeats 2 where this one has 3"):
        measure_cost_table(source, replace(REQUEST, repeats=3), out)
    other = measure_cost_table(
        source, replace(REQUEST, rows=(2,)), out, overwrite=True, clock=Clock(source.shape, inputs)
    )
    assert other.cell_names == "256x2"


def test_plans_mix_everything(source: SourceModel) -> None:
    found = probes(source.shape, 8, 1024, 0)
    assert len({probe.name for probe in found}) == len(found)
    assert len({probe.plan.key() for probe in found}) == len(found)
    assert found[0].use == "full_span"
    pairs = {
        (group.key_format, group.value_format)
        for probe in found
        if probe.use == "fit"
        for group in head_groups(probe.plan, 1024)
    }
    assert len(pairs) == 9
    mixed = [probe.plan for probe in found if probe.use == "check"]
    assert any(plan.selects for plan in mixed)
    assert not all(plan.selects for plan in mixed)
    assert probes(source.shape, 8, 1024, 1)[-1].plan.key() != mixed[-1].key()
    windowed = replace(source.shape, native_windows=(80,) * source.shape.layers)
    assert not any(probe.plan.selects for probe in probes(windowed, 8, 1024, 0))


def test_rows_of_filled_caches_share_no_blocks(source: SourceModel) -> None:
    """Else a step would read the same memory for every row."""
    cell = Cell(source.shape.dtype, 512, 3)
    kv = overlapping_kv(source.shape, cell, 5, "cpu")
    keys = kv[0][0]
    assert keys.shape == (3, source.shape.kv_heads, 512, source.shape.head_dim)
    assert torch.equal(keys[1, :, :-1], keys[0, :, 1:])
    for probe in probes(source.shape, source.model.config.hidden_size, 512, 0):
        filled = FilledPlanCache(probe.plan, source.shape, cell, 520, 5, "cpu", kv)
        assert filled.kv_bytes() == probe.plan.kv_bytes(512, 3)


def test_requests_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="length is 255; it must be at least 256"):
        CostTableRequest((255,), (1,))
    with pytest.raises(UsageError, match="batch is 0"):
        CostTableRequest((512,), (0,))
    with pytest.raises(UsageError, match="repeats is 0"):
        CostTableRequest((512,), (1,), repeats=0)


def test_what_does_not_fit(source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="the model was made for at most"):
        measure_cost_table(source, CostTableRequest((1 << 20,), (1,)), tmp_path / "c.json")
    monkeypatch.setattr(cost_table, "available_memory", lambda device: 1 << 20)
    with pytest.raises(MoaCompressError, match=r"1.0 MiB is available; choose shorter --lengths"):
        measure_cost_table(source, REQUEST, tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()

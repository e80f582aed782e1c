"""Measuring a cost table on a tiny model: what is timed, what is filed, and how it fails. No time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moacompress.bench import cost_table
from moacompress.bench.bench_request import Cell
from moacompress.bench.cost_table import CostTableRequest, measure_against, measure_cost_table, probes
from moacompress.bench.sides import FilledPlanCache, overlapping_kv
from moacompress.core.errors import ArtefactError, DataError, MoaCompressError, UnsupportedError, UsageError
from moacompress.models.source import SourceModel, load_source
from moacompress.models.stored_plan import stored_plan
from moacompress.rules.cost_table import CostTable, head_groups
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share
from tests.cost_tables import known_ns, known_table

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
            turn, at = divmod(self.calls // 2, len(self.slots))
            self.now += self.slots[-1 - at if turn % 2 else at] * 1e-6  # every second turn runs in the other order
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


class KnownClock:
    """Seconds of runs that take what is said, in turn; each run is asked for at its begin and at its end."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.calls, self.now = seconds, 0, 0.0

    def __call__(self) -> float:
        if self.calls % 2:
            self.now += self.seconds[self.calls // 2 % len(self.seconds)]
        self.calls += 1
        return self.now


@pytest.fixture
def known(compressed: Path, tmp_path: Path) -> tuple[Plan, Path]:
    """The plan of the tiny checkpoint, and the file of a table of a machine whose times are known."""
    plan = stored_plan(compressed / "model")
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(known_table(plan.model, (256, 320), (2,))))
    return plan, path


def test_predictions_are_measured_beside_full_span(
    known: tuple[Plan, Path], compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that takes what it took, but a tenth longer: the share is right, the time is off by that."""
    plan, path = known
    asked = plan.with_notes(budget={"asked": ["25%", "latency=0.9@256x2", "latency=0.8@256x2"]})
    monkeypatch.setattr(cost_table, "stored_plan", lambda folder: asked)
    full, ours = (known_ns(one, 256, 2) / 1e9 for one in (Plan.full(plan.model), plan))
    clock = KnownClock([1.1 * 3 * full, 1.1 * 3 * ours])
    report = measure_against(compressed, path, lengths=[256], tokens=3, repeats=3, clock=clock)
    (row,) = report["against"]
    assert clock.calls == 2 * 2 * 3
    assert row["full_span_ms"] == pytest.approx(1.1e3 * full)
    assert row["table_full_span_ms"] == pytest.approx(1e3 * full)
    assert row["measured_ms"] == pytest.approx(1.1e3 * ours)
    assert row["predicted_ms"] == pytest.approx(1e3 * ours, rel=1e-3)
    assert row["error"] == pytest.approx(1 / 1.1 - 1, abs=1e-3)
    assert row["share_error"] == pytest.approx(0, abs=1e-3)
    assert row["share"] == pytest.approx(ours / full)
    assert row["asked"] == 0.8


def test_predictions_that_cannot_be_measured(
    known: tuple[Plan, Path], compressed: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, path = known
    with pytest.raises(UsageError, match="it has 256x2, 320x2"):
        measure_against(compressed, path, rows=[8])
    with pytest.raises(UsageError, match="not a compressed one"):
        measure_against(tiny_folder, path)
    data = json.loads(path.read_text())
    data["configuration"]["threads"] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(ArtefactError, match="was measured elsewhere: threads"):
        measure_against(compressed, path)
    sharing = replace(plan, rules=(plan.rules[0],) * len(plan.rules), shares=(None, None, Share(1, (0, 1))))
    monkeypatch.setattr(cost_table, "stored_plan", lambda folder: sharing)
    with pytest.raises(UnsupportedError, match="layers that share attention"):
        measure_against(compressed, path)

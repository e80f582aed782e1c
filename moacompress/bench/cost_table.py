"""Measures a cost table: steps of a model under plans that differ in how much heads keep, and in which formats, in turns.

The plans of a cell give every KV head the same rule: each pair of formats with a short and a longer window, full span, and
gates. Their steps are the real ones, through whatever kernels run. Others, drawn at random, mix everything and are not fitted:
they say how far what is fitted is off.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.bench.bench_request import LIBRARY_BYTES, MOST_STEPS, SPARE_TOKENS, Cell, check_numbers
from moacompress.bench.benchmark import environment, load_per_core, warn_if_busy
from moacompress.bench.cell_store import CellStore
from moacompress.bench.measure import Clock, interleave
from moacompress.bench.sides import (
    DecodeTurn,
    FilledPlanCache,
    overlapping_kv,
    random_ids,
    same_weights,
    vocabulary_size,
    weight_bytes,
)
from moacompress.core.errors import BudgetError, DataError, MoaCompressError, UnsupportedError, UsageError
from moacompress.core.lock_holders import own_file
from moacompress.core.progress import SILENT, Progress
from moacompress.core.tables import readable_bytes
from moacompress.estimate.machine import this_machine
from moacompress.models.device import available_memory
from moacompress.models.stored_plan import stored_plan
from moacompress.rules.budget import Budget, format_length
from moacompress.rules.cost_table import FORMAT, VERSION, CostTable, Use, head_groups
from moacompress.rules.formats import CODED, FORMATS, NATIVE
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import MIN_WINDOWS, SINKS, Rule
from moacompress.rules.step_time import StepTime
from moacompress.runtime import attach, detach
from moacompress.runtime.checkpoint import compressed_folder, load_checkpoint
from moacompress.runtime.huge_pages import move_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moacompress.models.source import SourceModel

WINDOW_SHARES = (1 / 32, 1 / 4)
"""Windows of the fitted plans, as shares of the length."""
NATIVE_SHARES = (*WINDOW_SHARES, 1 / 2)
"""Those of native keys and values."""
GATED_WINDOW = 64
"""Window of the fitted plans with gates, tokens."""
SELECTED_SHARES = (1 / 16, 1 / 4)
"""What their gates keep beside it, as shares of the length."""
CHECKS = 4
"""Plans by which the fit is judged."""
CHECKED_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Windows of their KV heads, as shares of the length."""
MIN_WINDOW = MIN_WINDOWS[0]


@dataclass(frozen=True)
class CostTableRequest:
    """What is measured, and how often.

    Attributes:
        lengths: tokens in the cache of every row.
        rows: rows of the batch.
        tokens: decode steps that are timed as one.
        repeats: turns, each plan once in every turn.
        seed: of what is in the caches, and of the plans that judge the fit.
        device: torch device.
        weights: kind of weights that the model was loaded with, as in a recipe.
        head_weights: of embedding and output layer, likewise.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    tokens: int = 4
    repeats: int = 9
    seed: int = 0
    device: str = "cpu"
    weights: str = "keep"
    head_weights: str | None = None

    def __post_init__(self) -> None:
        check_numbers("length", self.lengths, 4 * GATED_WINDOW)
        check_numbers("batch", self.rows, 1)
        check_numbers("tokens", (self.tokens,), 1, MOST_STEPS)
        check_numbers("repeats", (self.repeats,), 1)

    def cells(self, dtype: str) -> Iterator[Cell]:
        """Yields the places of the table."""
        for length in self.lengths:
            for rows in self.rows:
                yield Cell(dtype, length, rows)


@dataclass(frozen=True)
class Probe:
    """A plan whose steps are timed.

    Attributes:
        name: what it is.
        use: what for; see `cost_table.Use`.
        plan: the plan.
    """

    name: str
    use: Use
    plan: Plan


def probes(shape: ModelShape, inputs: int, length: int, seed: int) -> list[Probe]:
    """Returns the plans that a cell is measured with, full span first.

    Args:
        shape: of the model.
        inputs: numbers that enter a layer's attention, of which gates are made.
        length: tokens in the cache.
        seed: of the plans that judge the fit.
    """
    random = np.random.default_rng(seed)
    gates = GateWeights(
        random.normal(size=(shape.layers, shape.kv_heads, inputs)).astype(np.float32),
        np.zeros((shape.layers, shape.kv_heads), np.float32),
    )

    def window(share: float) -> int:
        return max(MIN_WINDOW, int(share * length))

    found = [Probe("full span", "full_span", Plan.full(shape))]
    for keys in FORMATS:
        for values in FORMATS:
            for share in NATIVE_SHARES if keys == values == NATIVE else WINDOW_SHARES:
                rule = Rule(min(SINKS), window(share), 0, keys, values)
                found.append(Probe(f"{keys}/{values}, {share:.3g}", "fit", Plan.uniform(shape, rule, MIN_WINDOW)))
    may_select = [native is None for native in shape.native_windows]
    for pair in ((NATIVE, NATIVE), CODED) if any(may_select) else ():
        for share in SELECTED_SHARES:
            rule = Rule(min(SINKS), GATED_WINDOW, 0, select_alpha=window(share)).in_formats(*pair)
            rows = tuple((rule if may else rule.without_choice(),) * shape.kv_heads for may in may_select)
            plan = Plan(shape, MIN_WINDOW, rows).with_gates(gates)
            found.append(Probe(f"{'/'.join(pair)}, gate {share:.3g}", "fit", plan))
    for number in range(CHECKS):
        plan = _mixed(shape, random, window, number / CHECKS)
        found.append(Probe(f"mixed {number + 1}", "check", plan.with_gates(gates) if plan.selects else plan))
    return found


def _mixed(shape: ModelShape, random: np.random.Generator, window: Callable[[float], int], gated: float) -> Plan:
    """Returns a plan of rules drawn at random.

    Args:
        shape: of the model.
        random: draws.
        window: tokens of a share of the length.
        gated: share of the KV heads, where they may select, that do.
    """

    def draw(may_select: bool) -> Rule:
        rule = Rule(int(random.choice(SINKS)), window(float(random.choice(CHECKED_SHARES))), 0)
        if may_select and random.random() < gated:
            rule = replace(rule, select_alpha=window(SELECTED_SHARES[0]))
        return rule.in_formats(*map(str, random.choice(list(FORMATS), 2)))

    rows = [[draw(native is None) for _ in range(shape.kv_heads)] for native in shape.native_windows]
    return Plan(shape, MIN_WINDOW, tuple(map(tuple, rows)))


def measure_cost_table(
    source: SourceModel,
    request: CostTableRequest,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> CostTable:
    """Measures a cost table and writes it.

    Args:
        source: the dense model, loaded as it will run; its weights may move to other memory.
        request: what to measure.
        out: where to write it. Finished cells are kept beside it (`table.cells.jsonl` for `table.json`).
        overwrite: start from scratch.
        progress: told about every turn.
        clock: seconds.

    Raises:
        DataError: a length beyond the model's context.
        ArtefactError: `out` belongs to another configuration, cannot be written, or another process is at work on it; or what
            heads keep makes no difference that can be measured.
        MoaCompressError: not enough memory.
    """
    out, progress = Path(out), progress or SILENT
    shape = replace(source.shape, dtype=source.computes_in)
    if source.context and max(request.lengths) > source.context:
        raise DataError(
            f"a length of {max(request.lengths):,} tokens was asked for; the model was made for at most {source.context:,}"
        )
    move_weights(source.model)
    machine, known = this_machine(request.device, shape.dtype), environment()
    configuration = {
        **asdict(machine),
        "model": shape.to_dict(),
        "weights": request.weights,
        "head_weights": request.head_weights,
        "weight_bytes": weight_bytes(source.model),
        "lengths": list(request.lengths),
        "rows": list(request.rows),
        "tokens": request.tokens,
        "repeats": request.repeats,
        "seed": request.seed,
        "torch": known["torch"],
        "moacompress": known["moacompress"],
    }
    with own_file(out):
        store = CellStore(out, configuration, overwrite)
        cells = list(request.cells(shape.dtype))
        planned = {cell: probes(shape, _inputs(source), cell.length, request.seed) for cell in cells}
        _check_fits(planned, request)
        store.begin()
        left = [cell for cell in cells if store.get(_key(cell)) is None]
        if left:
            warn_if_busy()
            progress.start("measuring", sum(request.repeats + len(planned[cell]) for cell in left))
        for cell in left:
            store.add(_key(cell), _timed(source.model, cell, planned[cell], request, progress, clock))
        progress.done()
        table = CostTable.from_dict(
            {
                "format": FORMAT,
                "version": VERSION,
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                "configuration": store.configuration,
                "cells": [store.get(_key(cell)) for cell in cells],
            }
        )
        table.save(out)
    return table


def measure_against(
    target: str | Path,
    path: str | Path,
    *,
    lengths: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    tokens: int = 4,
    repeats: int = 9,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Measures what a cost table predicts of a compressed checkpoint: its step, in turns with full span's.

    Args:
        target: a compressed checkpoint, or a run's folder with one.
        path: of the table.
        lengths: of the cells; by default all that it has.
        rows: likewise.
        tokens: decode steps that are timed as one.
        repeats: turns.
        seed: of what is in the caches.
        device: torch device.
        trust_remote_code: run modelling code that comes with the model.
        progress: told about every turn.
        clock: seconds.

    Returns:
        `cost_table`, and `against`, for every cell: `length`, `rows`, `predicted_ms` and `measured_ms` of a step under the
        plan, the `full_span_ms` that was measured in turns with it and `table_full_span_ms`, that of the table; the
        `predicted_share` and the measured `share` of full span, and what the plan's budget `asked` for there, or None; and
        predicted over measured, less 1: `error` of the time, and `share_error` of the share, in which cancels what the
        machine is faster or slower by than when the table was measured.

    Raises:
        UsageError: `target` is not compressed, or the table has no such cell.
        ArtefactError: the table cannot be read, or was measured on another model or machine.
        UnsupportedError: layers of the checkpoint share attention.
        MoaCompressError: not enough memory.
    """
    folder, table, progress = compressed_folder(Path(target)), CostTable.load(path), progress or SILENT
    plan = stored_plan(folder)
    if plan.shares:
        raise UnsupportedError(
            "cost tables say nothing of layers that share attention, and those of this checkpoint do"
        )
    dtype = table.configuration.model.dtype
    plan = plan.in_dtype(dtype)
    table.check(path, plan.model, this_machine(device, dtype))
    cells = [
        cell
        for cell in table.cells
        if (lengths is None or cell.length in lengths) and (rows is None or cell.rows in rows)
    ]
    if not cells:
        raise UsageError(f"the cost table {path} has nothing at these --lengths and --batch; it has {table.cell_names}")
    request = CostTableRequest(
        tuple(cell.length for cell in cells), tuple(cell.rows for cell in cells), tokens, repeats, seed, device
    )
    checkpoint = load_checkpoint(folder, dtype, device, trust_remote_code=trust_remote_code)
    plan = replace(plan, gate_weights=checkpoint.plan.gate_weights)
    dense = detach(checkpoint.model).requires_grad_(False)
    found = [Probe("full span", "full_span", Plan.full(plan.model)), Probe("plan", "check", plan)]
    planned = {Cell(dtype, cell.length, cell.rows): found for cell in cells}
    _check_fits(planned, request)
    warn_if_busy()
    progress.start("measuring", len(cells) * (repeats + len(found)))
    against = []
    for cell, place in zip(cells, planned, strict=True):
        timed = _timed(dense, place, found, request, progress, clock)
        full, ours = (point["ms"] for point in timed["points"])
        step = StepTime.fit(cell)
        predicted = step.step_ms(plan)
        asked = [one.share for one in _budgets(plan) if (one.length, one.rows) == (cell.length, cell.rows)]
        against.append(
            {
                "length": cell.length,
                "rows": cell.rows,
                "predicted_ms": predicted,
                "measured_ms": ours,
                "error": predicted / ours - 1,
                "full_span_ms": full,
                "table_full_span_ms": step.full_span_ms,
                "share_error": predicted / step.full_span_ms / (ours / full) - 1,
                "predicted_share": predicted / step.full_span_ms,
                "share": ours / full,
                "asked": min((share for share in asked if share is not None), default=None),
                "load_per_core": timed["load_per_core"],
            }
        )
    progress.done()
    return {"cost_table": str(path), "against": against}


def _budgets(plan: Plan) -> list[Budget]:
    """Returns the budgets of latency that a plan was searched for."""
    found = []
    for text in plan.budget.get("asked", ()):
        with suppress(BudgetError):  # a form of budget that a plan of another version was found for
            found.append(Budget.parse(text))
    return [budget for budget in found if budget.rows is not None]


def _inputs(source: SourceModel) -> int:
    return int(source.model.config.get_text_config(decoder=True).hidden_size)


def _key(cell: Cell) -> str:
    return f"steps {cell}"


def _check_fits(planned: dict[Cell, list[Probe]], request: CostTableRequest) -> None:
    """Refuses cells whose caches memory would not hold: all of a cell's are there at once, so that they can take turns.

    Raises:
        MoaCompressError: says how much it would take.
    """
    available = available_memory(request.device)
    for cell, found in planned.items():
        room = cell.length + request.tokens + SPARE_TOKENS
        needed = LIBRARY_BYTES + sum(probe.plan.kv_bytes(room, cell.batch) for probe in found)
        if needed > available:
            raise MoaCompressError(
                f"{format_length(cell.length)} tokens in {cell.batch} rows would take about {readable_bytes(needed)} of memory "
                f"(a cache for each of {len(found)} plans), and {readable_bytes(available)} is available; choose shorter "
                "--lengths or a smaller --batch"
            )


def _timed(
    dense: PreTrainedModel,
    cell: Cell,
    found: list[Probe],
    request: CostTableRequest,
    progress: Progress,
    clock: Clock,
) -> dict[str, Any]:
    """Times the steps of a cell and returns it as the table has it."""
    device, load = request.device, load_per_core()
    shape = found[0].plan.model
    kv = overlapping_kv(shape, cell, request.seed, device)
    room = cell.length + request.tokens + SPARE_TOKENS
    ids = random_ids((request.tokens + 1, cell.batch, 1), vocabulary_size(dense), request.seed, device)
    turns: dict[str, DecodeTurn] = {}
    for probe in found:
        model: Any = attach(same_weights(dense), probe.plan)
        filled = FilledPlanCache(probe.plan, shape, cell, room, request.seed, device, kv)
        turns[probe.name] = DecodeTurn(model, filled, ids, cell.length, device)
        turns[probe.name].prepare()
        turns[probe.name].run()  # once for what is made once
        progress.step(f"{probe.name} at {cell}")
    seconds = interleave(turns, request.repeats, clock, lambda: progress.step(f"steps at {cell}"))
    del turns, kv
    gc.collect()
    points = []
    for probe in found:
        ms = [taken / request.tokens * 1e3 for taken in seconds[probe.name]]
        points.append(
            {
                "name": probe.name,
                "use": probe.use,
                "ms": statistics.median(ms),
                "spread_ms": [float(value) for value in np.quantile(ms, (0.1, 0.9))],
                "groups": [group.model_dump(mode="json") for group in head_groups(probe.plan, cell.length)],
            }
        )
    return {"length": cell.length, "rows": cell.batch, "load_per_core": load, "points": points}

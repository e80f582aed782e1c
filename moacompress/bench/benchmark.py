"""The benchmark of a compressed checkpoint, from its folder to the result."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moacompress.bench.bench_request import SIDES, BenchRequest, Cell, check_fits
from moacompress.bench.cell_store import CellStore
from moacompress.bench.graphs import CompiledForward
from moacompress.bench.measure import Clock, interleave
from moacompress.bench.peak import peak_bytes
from moacompress.bench.sides import (
    MODELS,
    STATIC,
    DecodeTurn,
    PrefillTurn,
    filled_cache,
    make_models,
    random_ids,
    vocabulary_size,
)
from moacompress.bench.step_trace import trace_steps
from moacompress.bench.timing_rows import break_even, make_row
from moacompress.core.errors import MoaCompressError, one_line
from moacompress.core.files import write_json
from moacompress.core.lock_holders import own_file
from moacompress.core.machine import processor_name
from moacompress.core.progress import SILENT, Progress
from moacompress.core.shown import ShownDict
from moacompress.core.version import own_version
from moacompress.kernels import dispatch
from moacompress.models.device import available_memory
from moacompress.models.stored_plan import stored_plan
from moacompress.models.weight_bytes import weight_bytes
from moacompress.rules.plan import Plan
from moacompress.runtime.checkpoint import compressed_folder, load_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

WARM_TURNS = 3
"""Most turns before the clock runs; a compiled step is warm when a turn makes no new graph."""
WARM_PROMPT = 256
"""Longest prompt before prefilling is timed, tokens."""
BUSY = 0.5
"""Load of the machine per core from which on times are doubted."""


class BenchReport(ShownDict):
    """What a benchmark measured, as `run_bench` describes it."""


def benchmark(
    target: str | Path,
    *,
    lengths: Sequence[int] = (1024,),
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] = ("auto",),
    sides: Sequence[str] = SIDES,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> BenchReport:
    """Measures how fast a compressed checkpoint is, and what memory it takes, beside the dense model: `moacompress bench`.

    Args:
        target: a compressed checkpoint, or a run's folder with one under `model/`.
        lengths: tokens in the cache of every row.
        batches: rows.
        dtypes: of weights and cache; "auto" is the checkpoint's.
        sides: what is timed in turns, of "plan", "full_span", "dense" and "dense_best".
        out: where to write the result as JSON, atomically. Finished cells are kept beside it (`bench.cells.jsonl` for
            `bench.json`) and not measured again.
        overwrite: start from scratch: the result at `out` and the cells beside it are removed.
        progress: told about every turn.
        **options: other attributes of `BenchRequest`, such as `repeats` or `device`.

    Returns:
        `runs`: rows as `moacompress.bench.timing_rows.make_row` makes them; `break_even`; `configuration`; `environment`;
        `serve`, which `serve_benchmark` fills. A notebook shows it as the command does.

    Raises:
        UsageError: `target` is not compressed.
        DataError: a length beyond the model's context.
        ArtefactError: `out` belongs to another configuration, cannot be written, or another process is at work on it.
        PlanError, ModelError: the checkpoint is damaged.
        MoaCompressError: not enough memory.
    """
    request = BenchRequest(tuple(lengths), tuple(batches), tuple(dtypes), tuple(sides), **options)
    return run_bench(target, request, out=out, overwrite=overwrite, progress=progress)


def run_bench(
    target: str | Path,
    request: BenchRequest,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> BenchReport:
    """Returns what `benchmark` does, for a request.

    All sides have the same weights in memory. They are timed in turn, so that what else the machine does meets all alike.
    """
    folder = compressed_folder(Path(target))
    plan = stored_plan(folder)
    request = request.resolved(plan.model)
    machine = environment()
    configuration = {**request.configuration(plan, folder), **machine}
    path = None if out is None else Path(out)
    with nullcontext() if path is None else own_file(path):
        store = CellStore(path, configuration, overwrite)
        check_fits(request, plan, folder, available_memory(request.device))
        bench = _Benchmark(folder, plan, request, store, progress or SILENT, clock)
        runs = list(bench.rows())
        report = {
            "runs": runs,
            "serve": [],
            "break_even": break_even(runs),
            "configuration": store.configuration,
            "environment": machine,
        }
        if path is not None:
            write_json(path, report)
        return BenchReport(report)


def environment() -> dict[str, Any]:
    """Returns what of the machine and of the libraries times depend on."""
    kernel = dispatch.chosen()
    return {
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "moacompress": own_version(),
        "kernel": kernel.name,
        "isa": kernel.isa,
    }


def load_per_core() -> float | None:
    """Returns the load of the machine for each core, over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def warn_if_busy() -> None:
    """Warns where the machine has much else to do."""
    load = load_per_core()
    if load is not None and load > BUSY:
        logger.warning("the machine is busy (load %.1f a core), so times are longer and vary more", load)


@dataclass
class _Benchmark:
    """All that is the same for every cell."""

    folder: Path
    plan: Plan
    request: BenchRequest
    store: CellStore
    progress: Progress
    clock: Clock
    _models: dict[str, PreTrainedModel] = field(default_factory=dict)
    _dtype: str = ""

    @property
    def phases(self) -> tuple[str, ...]:
        return ("decode", "prefill") if self.request.prefill_repeats else ("decode",)

    @property
    def peak_sides(self) -> tuple[str, ...]:
        """Sides whose peak is taken; a compiler's own memory would hide that of `dense_best`."""
        return tuple(side for side in self.request.sides if side in MODELS) if self.request.peak else ()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measures what is not measured yet, and yields the rows."""
        cells = list(self.request.cells())
        steps = sum(map(self._steps, cells))
        if steps:
            warn_if_busy()
            self.progress.start("measuring", steps)
        for cell in cells:
            measured = {phase: self._timed(phase, cell) for phase in self.phases}
            peaks = {side: self._peak(side, cell) for side in self.peak_sides}
            for phase in self.phases:
                steps = self.request.tokens if phase == "decode" else 1
                yield make_row(phase, cell, measured[phase], peaks, self.plan, steps)
        self.progress.done()

    def _steps(self, cell: Cell) -> int:
        """Returns the steps of progress that a cell still takes."""
        repeats = {"decode": self.request.repeats, "prefill": self.request.prefill_repeats}
        timed = sum(repeats[phase] + 1 for phase in self.phases if self.store.get(f"{phase} {cell}") is None)
        return timed + sum(self.store.get(f"peak of {side} {cell}") is None for side in self.peak_sides)

    def _timed(self, phase: str, cell: Cell) -> dict[str, Any]:
        key = f"{phase} {cell}"
        found = self.store.get(key)
        if found is None:
            models, load = self._models_in(cell.dtype), load_per_core()
            found = self._decode(cell, models) if phase == "decode" else self._prefill(cell, models)
            probe = torch.empty(0, dtype=getattr(torch, cell.dtype), device=self.request.device)
            found |= {
                "sides": list(self.request.sides),
                "weight_bytes": sum(weight_bytes(models["dense"]).values()),
                "kernel": dispatch.backend_for(probe).name,
                "load_per_core": load,
            }
            self.store.add(key, found)
            gc.collect()
        return found

    def _peak(self, side: str, cell: Cell) -> dict[str, int]:
        key = f"peak of {side} {cell}"
        found = self.store.get(key)
        if found is None:
            found = peak_bytes(self.folder, side, cell, self.request)
            self.store.add(key, found)
            self.progress.step(key)
        return found

    def _models_in(self, dtype: str) -> Mapping[str, PreTrainedModel]:
        if self._dtype != dtype:
            self._models = {}
            gc.collect()
            checkpoint = load_checkpoint(
                self.folder, dtype, self.request.device, trust_remote_code=self.request.trust_remote_code
            )
            self._models, self._dtype = make_models(checkpoint.model, checkpoint.plan), dtype
            self.store.begin()  # what can be wrong with the request was found by now
        return self._models

    def _variants(self) -> list[str]:
        """Returns what is decoded with: the sides, with the two that `dense_best` is the better of in its place."""
        sides = [side for side in self.request.sides if side != "dense_best"]
        if "dense_best" in self.request.sides:
            sides += [*(() if "dense" in sides else ("dense",)), STATIC]
        return sides

    def _decode(self, cell: Cell, models: Mapping[str, PreTrainedModel]) -> dict[str, Any]:
        request, variants = self.request, self._variants()
        compiled = [side for side in variants if side == STATIC or (request.compile and side in ("plan", "full_span"))]
        if compiled:
            torch._dynamo.reset()  # graphs of other lengths would make these general, and slower
        fed = (request.tokens + 1, cell.batch, 1)
        ids = random_ids(fed, vocabulary_size(models["dense"]), request.seed, request.device)
        turns: dict[str, DecodeTurn] = {}
        kv_bytes: dict[str, int] = {}
        refused: dict[str, str] = {}
        for side in variants:
            model = models["dense" if side == STATIC else side]
            forward: Any = CompiledForward(model.forward) if side in compiled else model
            filled = filled_cache(side, model, self.plan, cell, request.tokens, request.seed, request.device)
            turn = DecodeTurn(forward, filled, ids, cell.length, request.device)
            problem = _warm(turn)
            if problem is not None and side != STATIC:
                raise MoaCompressError(
                    f"the compiled step of {side} cannot be timed, because {problem}; leave --compile out"
                )
            if problem is not None:
                refused[side] = problem
                continue
            turns[side], kv_bytes[side] = turn, filled.kv_bytes()
        self.progress.step(f"ready to decode {cell}")
        for turn in turns.values():
            if isinstance(turn.forward, CompiledForward):
                turn.forward.begin()
        seconds = interleave(turns, request.repeats, self.clock, lambda: self.progress.step(f"decode {cell}"))
        proofs = {
            side: asdict(turn.forward.proof())
            for side, turn in turns.items()
            if isinstance(turn.forward, CompiledForward)
        }
        routes = {side: turn.routes for side, turn in turns.items() if turn.routes}
        found = {"seconds": seconds, "proofs": proofs, "refused": refused, "kv_bytes": kv_bytes, "routes": routes}
        if request.trace:
            backend = dispatch.backend_for(torch.empty(0, dtype=getattr(torch, cell.dtype), device=request.device))
            found["trace"] = trace_steps(turns["plan"], backend, request.repeats)
        return found

    def _prefill(self, cell: Cell, models: Mapping[str, PreTrainedModel]) -> dict[str, Any]:
        request = self.request
        vocabulary = vocabulary_size(models["dense"])
        ids = random_ids((cell.batch, cell.length), vocabulary, request.seed, request.device)
        # for a prompt the default cache is the best dense one there is: a static cache has torch mask it key by key
        sides = [side for side in self._variants() if side != STATIC]
        for side in sides:
            PrefillTurn(models[side], ids[:, :WARM_PROMPT], request.device).run()
        self.progress.step(f"ready to prefill {cell}")
        turns = {side: PrefillTurn(models[side], ids, request.device) for side in sides}
        repeats = request.prefill_repeats
        seconds = interleave(turns, repeats, self.clock, lambda: self.progress.step(f"prefill {cell}"))
        return {"seconds": seconds, "kv_bytes": {}, "routes": {}}


def _warm(turn: DecodeTurn) -> str | None:
    """Takes turns until nothing is compiled any more; returns what is wrong with a compiled step, if anything is."""
    forward = turn.forward
    if not isinstance(forward, CompiledForward):
        turn.prepare()
        turn.run()
        return None
    try:
        for _ in range(WARM_TURNS):
            forward.begin()
            turn.prepare()
            turn.run()
            if not forward.proof().recompiles:
                break
    except MoaCompressError:
        raise
    except Exception as error:  # the compiler, and the one that it calls, raise what they like
        return f"it cannot be compiled: {one_line(error)}"
    return forward.proof().problem

"""The benchmark of serving: the same requests for every model, one after the other, in the same KV memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moacompress.bench.bench_request import DTYPES, LIBRARY_BYTES, check_choices, context_below
from moacompress.bench.benchmark import environment, load_per_core
from moacompress.bench.cell_store import CellStore
from moacompress.bench.request_mix import ANSWERS, PROMPTS, Lengths, Request, requests
from moacompress.bench.running_rows import running_rows
from moacompress.bench.serving import Clock, check_requests, serve
from moacompress.bench.sides import MODELS, make_models, random_ids, vocabulary_size
from moacompress.core.errors import DataError, MoaCompressError
from moacompress.core.files import fingerprint, read_json, write_json
from moacompress.core.lock_holders import own_file
from moacompress.core.progress import SILENT, Progress
from moacompress.core.tables import readable_bytes
from moacompress.kernels import dispatch
from moacompress.models.device import available_memory
from moacompress.models.stored_plan import stored_plan
from moacompress.models.weight_bytes import loaded_weight_bytes
from moacompress.rules.formats import dtype_name
from moacompress.rules.plan import Plan
from moacompress.runtime.checkpoint import compressed_folder, load_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SERVED = ("dense", "plan")
"""Models that are compared where none are named."""
WARM_TOKENS, WARM_STEPS = 64, 4
"""Of a request that is served before the clock runs."""


@dataclass(frozen=True)
class ServeRequest:
    """What is served.

    Attributes:
        count: requests.
        kv_memory: bytes of KV cache.
        prompt: lengths of prompts, tokens.
        new: lengths of answers.
        rate: mean requests a second; None for all at once.
        sides: some of `sides.MODELS`, in the order in which they serve.
        dtypes: of weights and cache; "auto" is the checkpoint's.
        seed: of the requests.
        device: torch device.
    """

    count: int = 48
    kv_memory: int = 128 * 2**20
    prompt: Lengths | int = PROMPTS
    new: Lengths | int = ANSWERS
    rate: float | None = None
    sides: tuple[str, ...] = SERVED
    dtypes: tuple[str, ...] = ("auto",)
    seed: int = 0
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtypes", tuple(map(dtype_name, self.dtypes)))
        check_choices("side", self.sides, MODELS)
        check_choices("dtype", self.dtypes, ("auto", *DTYPES))
        self.requests()

    def requests(self) -> list[Request]:
        """Returns the requests, in the order in which they arrive."""
        return requests(self.seed, self.count, prompt=self.prompt, new=self.new, rate=self.rate)

    def configuration(self, plan: Plan, folder: Path) -> dict[str, Any]:
        """Returns all that the measurements depend on but the machine, as JSON values."""
        asked = {name: value for name, value in asdict(self).items() if name != "trust_remote_code"}
        return {"plan": plan.key(), "model": fingerprint(read_json(folder / "config.json", "config")), "served": asked}


def run_serving(
    target: str | Path,
    request: ServeRequest,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Serves the same requests with a compressed checkpoint and with the dense model, in the same KV memory.

    The result, which is written to `out`, has `serve`: a row for every dtype and model, see docs/measuring.md; `configuration`;
    `environment`; `runs` and `break_even`, which are empty. What a model came to is kept beside it, and not measured again.

    Raises:
        UsageError: `target` is not compressed, or a request is too large for the KV memory.
        DataError: a request beyond the model's context.
        ArtefactError: `out` belongs to another configuration, cannot be written, or another process is at work on it.
        PlanError, ModelError: the checkpoint is damaged.
        MoaCompressError: not enough memory.
    """
    folder = compressed_folder(Path(target))
    plan = stored_plan(folder)
    machine = environment()
    path = None if out is None else Path(out)
    with nullcontext() if path is None else own_file(path):
        store = CellStore(path, {**request.configuration(plan, folder), **machine}, overwrite)
        dtypes = tuple(dict.fromkeys(plan.model.dtype if dtype == "auto" else dtype for dtype in request.dtypes))
        mix = request.requests()
        _check_fits(request, mix, plan, folder, dtypes)
        progress, rows = progress or SILENT, []
        for dtype in dtypes:
            models: Mapping[str, PreTrainedModel] = {}
            for side in request.sides:
                key = f"serve {side} {dtype}"
                found = store.get(key)
                if found is None:
                    if not models:
                        checkpoint = load_checkpoint(
                            folder, dtype, request.device, trust_remote_code=request.trust_remote_code
                        )
                        models = make_models(checkpoint.model, checkpoint.plan)
                        store.begin()  # what can be wrong with the request was found by now
                    load = load_per_core()
                    progress.start(f"serving, {side}, {dtype}", len(mix))
                    found = _served(side, models[side], plan, request, progress, clock, sleep)
                    progress.done()
                    found |= {"load_per_core": load}
                    store.add(key, found)
                    gc.collect()
                rows.append({"side": side, "dtype": dtype, "kv_memory": request.kv_memory, **found})
        report = {
            "runs": [],
            "serve": rows,
            "break_even": [],
            "configuration": store.configuration,
            "environment": machine,
        }
        if path is not None:
            write_json(path, report)
        return report


def _check_fits(request: ServeRequest, mix: Sequence[Request], plan: Plan, folder: Path, dtypes: Sequence[str]) -> None:
    """Refuses requests that the model was not made for, or that memory would not hold."""
    longest = max(one.tokens for one in mix)
    context = context_below(folder, longest)
    if context is not None:
        raise DataError(
            f"the longest request has {longest:,} tokens; the model was made for at most {context:,}: give --prompt and --new"
        )
    for dtype in dtypes:
        for side in request.sides:
            check_requests(mix, _bytes_of(side, plan.in_dtype(dtype)), request.kv_memory, side)
    # the dense cache is copied where a row joins or leaves
    weights = max(loaded_weight_bytes(folder, dtype) for dtype in dtypes)
    needed, available = LIBRARY_BYTES + weights + 2 * request.kv_memory, available_memory(request.device)
    if needed > available:
        raise MoaCompressError(
            f"serving in {readable_bytes(request.kv_memory)} of KV cache would take about {readable_bytes(needed)} of memory, "
            f"and {readable_bytes(available)} is available; choose a smaller --kv-memory"
        )


def _bytes_of(side: str, plan: Plan) -> Callable[[int], int]:
    """Returns the KV bytes of a row by its tokens."""
    return plan.kv_bytes if side == "plan" else plan.model.dense_kv_bytes


def _served(
    side: str,
    model: PreTrainedModel,
    plan: Plan,
    request: ServeRequest,
    progress: Progress,
    clock: Clock,
    sleep: Callable[[float], None],
) -> dict[str, Any]:
    """Returns what serving with one model, under the checkpoint's plan, came to."""
    mix, vocabulary = request.requests(), vocabulary_size(model)

    def prompt_of(number: int) -> torch.Tensor:
        return random_ids((1, mix[number].prompt_tokens), vocabulary, request.seed + number, request.device)

    warm = running_rows(side, model, plan)
    for _ in range(2):
        tokens = [warm.add(random_ids((1, WARM_TOKENS), vocabulary, request.seed, request.device))]
    tokens = tokens * 2
    for _ in range(WARM_STEPS):
        tokens = warm.step(tokens)
    rows = running_rows(side, model, plan)
    bytes_of = _bytes_of(side, plan.in_dtype(str(model.dtype).removeprefix("torch.")))
    served = serve(rows, mix, prompt_of, bytes_of, request.kv_memory, clock=clock, sleep=sleep, progress=progress)
    probe = torch.empty(0, dtype=model.dtype, device=request.device)
    return {**served.row(mix), "kernel": None if side == "dense" else dispatch.backend_for(probe).name}

"""Peak memory of one side, measured in a process that does nothing else.

    python -m moacompress.bench.peak '{"folder": "model", "side": "plan", ...}'

What a process has taken before stays with it, so a peak that is measured beside other sides, or after them, is theirs too.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moacompress.bench.bench_request import BenchRequest, Cell
from moacompress.bench.sides import DecodeTurn, PrefillTurn, filled_cache, make_models, random_ids, vocabulary_size
from moacompress.core.errors import MoaCompressError
from moacompress.core.memory import peak_rss, reset_peak, rss
from moacompress.runtime.checkpoint import load_checkpoint

STEPS = 2
"""Decode steps that a peak is taken over: the second is like every one after it."""


def peak_bytes(folder: Path, side: str, cell: Cell, request: BenchRequest) -> dict[str, int]:
    """Returns the most memory that a side (plan, full_span or dense) takes, from a new process.

    `loaded` is bytes once the weights are there, `decode` and `prefill` the most while it does that, all with Python, the
    libraries and the weights in them; on a GPU what is taken of its memory.

    Raises:
        MoaCompressError: the process failed; most likely there was too little memory.
    """
    task = {"folder": str(folder), "side": side, "prefill": request.prefill_repeats > 0, **asdict(cell)}
    task |= {"seed": request.seed, "device": request.device}
    task["trust_remote_code"] = request.trust_remote_code
    command = [sys.executable, "-P", "-m", "moacompress.bench.peak", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    if done.returncode < 0:
        why = f"it was ended by signal {-done.returncode}, as the system does where memory runs out"
    else:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise MoaCompressError(f"the peak memory of {side} at {cell} could not be measured: {why}; --no-peak leaves it out")


def measure(task: dict[str, Any]) -> dict[str, int]:
    """Returns what `peak_bytes` does, for this process; `task` is what that hands over."""
    cell = Cell(task["dtype"], task["length"], task["batch"])
    side, seed, device = task["side"], task["seed"], task["device"]
    trusted = bool(task["trust_remote_code"])
    checkpoint = load_checkpoint(Path(task["folder"]), cell.dtype, device, trust_remote_code=trusted)
    plan, model = checkpoint.plan, make_models(checkpoint.model, checkpoint.plan)[side]
    vocabulary = vocabulary_size(model)
    meter = _Meter(device)
    PrefillTurn(model, random_ids((1, 32), vocabulary, seed, device), device).run()  # what libraries take once
    found = {"loaded": meter.now()}
    meter.reset()
    filled = filled_cache(side, model, plan, cell, STEPS, seed, device)
    turn = DecodeTurn(
        model, filled, random_ids((STEPS + 1, cell.batch, 1), vocabulary, seed, device), cell.length, device
    )
    turn.use(filled.cache)
    del filled
    turn.run()
    found["decode"] = meter.peak()
    if task["prefill"]:
        del turn
        meter.reset()
        PrefillTurn(model, random_ids((cell.batch, cell.length), vocabulary, seed, device), device).run()
        found["prefill"] = meter.peak()
    return found


class _Meter:
    """The memory of this process, or of the GPU where the model is on one."""

    def __init__(self, device: str) -> None:
        self._gpu: Any = torch.cuda if torch.device(device).type == "cuda" else None

    def now(self) -> int:
        return int(self._gpu.memory_allocated()) if self._gpu else rss()

    def peak(self) -> int:
        return int(self._gpu.max_memory_allocated()) if self._gpu else peak_rss()

    def reset(self) -> None:
        """Counts from now on, after what is free is given back; where the system can't, the peak so far stays in."""
        gc.collect()
        if self._gpu:
            self._gpu.reset_peak_memory_stats()
            return
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        reset_peak()


if __name__ == "__main__":
    try:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    except Exception as error:  # the last line is what the caller shows
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)

"""The part `ruler` of `gpu.py`: RULER at 4k through `moacompress eval`, after it is said what that takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import append_row  # beside this script

LENGTH = 4096
"""Tokens of the prompts."""


def ruler(folder: Path, text: Path, squad: Path, prompts: int, device: str, out: Path) -> None:
    """Runs RULER on a compressed checkpoint and on the dense model; stopped, the same call resumes.

    A line of the estimate is added to `out`; `eval` writes its results beside it.

    Raises:
        subprocess.CalledProcessError: `eval` failed, and has said why.
    """
    from moacompress.core.tables import readable_bytes, readable_seconds

    results = out.with_suffix(".ruler.json")
    command = [sys.executable, "-m", "moacompress", "eval", str(folder), "--against", "dense", "--tasks", "ruler"]
    command += ["--lengths", str(LENGTH), "--prompts", str(prompts), "--text", str(text), "--squad", str(squad)]
    command += ["--device", device]
    dry = subprocess.run([*command, "--dry-run", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    estimate = json.loads(dry.stdout)
    needed = needed_bytes(folder)
    row = {"part": "ruler", "what": "estimate", "seconds": estimate["seconds"], "answers": estimate["answers"]}
    append_row(out, {**row, "bytes": needed})
    print(
        f"RULER at {LENGTH:,} tokens, {prompts} prompts a task, of {folder} and the dense model: "
        f"{estimate['answers']:,} answers in about {readable_seconds(estimate['seconds'])}, from one timed prompt, with "
        f"{readable_bytes(needed)} of memory for weights and caches; stopped, the same command resumes from {results}",
        flush=True,
    )
    subprocess.run([*command, "-o", str(results)], check=True)


def needed_bytes(folder: Path) -> int:
    """Returns the bytes of a checkpoint's weights, which are the dense model's too, and of the dense cache of a batch."""
    from moacompress.evaluation.scoring.prompts import BATCH_TOKENS
    from moacompress.models.stored_plan import stored_plan
    from moacompress.rules.plan import Plan
    from moacompress.runtime.checkpoint import compressed_folder

    folder = compressed_folder(folder)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rows = max(1, BATCH_TOKENS // LENGTH)
    return weights + Plan.full(stored_plan(folder).model).kv_bytes(LENGTH, rows)

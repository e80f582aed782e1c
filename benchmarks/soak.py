"""Threads that share a compressed model for minutes: random lengths, ways of generating, and cancellations.

    python benchmarks/soak.py runs/mine/model --minutes 10 --threads 4 --json

Fails if a thread meets an error, or if memory is not flat. The time goes in ten rounds; between them nothing runs, the
allocator gives back what it can, and the memory of the process is read: after the last round it must be at most a twentieth
above what it was after the first three. Some generations repeat one prompt, whose tokens must always be the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import random
import sys
import threading
import time
from typing import Any

from harness import options  # beside this script

from moacompress.core.memory import rss

GROWTH = 1.05
"""Most memory at the end, as a multiple of that after the first rounds."""
ROUNDS, FIRST_ROUNDS = 10, 3
PROBE_TOKENS = 12


class Cancelled(Exception):
    """Raised from within a generation, as a server does whose client has gone."""


def main() -> None:
    """Runs the command line."""
    parser = options(__doc__)
    parser.add_argument("model", metavar="DIR", help="a compressed checkpoint")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--longest", type=int, default=600, help="longest prompt, tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    chosen = parser.parse_args()
    result = soak(chosen.model, chosen.minutes * 60, chosen.threads, chosen.longest)
    print(json.dumps(result) if chosen.json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    if result["errors"] or not result["flat"]:
        sys.exit(1)


def soak(folder: str, seconds: float, threads: int, longest: int) -> dict[str, Any]:
    """Returns how many generations ended, were cancelled or failed, and the memory over time in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    from moacompress.runtime.compat.alternates import cache_argument, returned_cache

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.set_num_threads(1)
    counts = {"finished": 0, "cancelled": 0}
    errors: list[str] = []
    lock = threading.Lock()
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(3, 10_000, (1, 100), generator=generator)
    with torch.inference_mode():
        kept = returned_cache(model(prefix))
    kinds: dict[str, Any] = {
        "max_new_tokens": PROBE_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = model.generate(prefix, attention_mask=torch.ones_like(prefix), **kinds)

    def work(rng: random.Random, end: float) -> None:
        while time.monotonic() < end and not errors:
            try:
                one(rng)
                kind = "finished"
            except Cancelled:
                kind = "cancelled"
            except Exception as error:  # whatever it is: it is what this looks for
                errors.append(f"{type(error).__name__}: {error}")
                return
            with lock:
                counts[kind] += 1

    def one(rng: random.Random) -> None:
        if rng.random() < 0.2:
            cache = kept.fork() if rng.random() < 0.5 else None
            longer = torch.cat((prefix, torch.full((1, 1), 7)), 1) if cache is not None else prefix
            found = model.generate(longer, attention_mask=torch.ones_like(longer), **cache_argument(cache), **kinds)
            if cache is None and not torch.equal(found, expected):
                raise AssertionError("one prompt gave two answers")
            return
        rows = rng.choice([1, 1, 2, 3])
        ids = torch.randint(3, 10_000, (rows, rng.randint(1, longest)))
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, : rng.randint(0, ids.shape[1] - 1)] = 0
        way: dict[str, Any] = rng.choice([{}, {"do_sample": True}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
        if rows > 1 and "prompt_lookup_num_tokens" in way:
            way = {}
        left = rng.randint(0, 15) if rng.random() < 0.3 else 10**6

        def criterion(input_ids: Any, scores: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Cancelled
            return torch.zeros(len(input_ids), dtype=torch.bool)

        model.generate(
            ids,
            attention_mask=mask,
            stopping_criteria=[criterion],
            **{**kinds, "max_new_tokens": rng.randint(1, 20), **way},
        )

    memory = []
    for turn in range(ROUNDS):
        end = time.monotonic() + seconds / ROUNDS
        workers = [threading.Thread(target=work, args=(random.Random(f"{turn} {n}"), end)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        memory.append(settled_rss())
    first, last = max(memory[:FIRST_ROUNDS]), memory[-1]
    return {**counts, "errors": errors, "flat": last <= GROWTH * first, "rss_bytes": memory}


def settled_rss() -> int:
    """Returns the memory of the process once what is free is given back to the system, where the C library can do that."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return rss()


if __name__ == "__main__":
    main()

"""Checkpoints served by vLLM: the requests of `moacompress bench --serve`, at equal KV memory, one engine after the other.

Run it in the environment of `make test-vllm`, in which moacompress and vLLM are installed:

    .cache/vllm/bin/python benchmarks/vllm_serving.py runs/demo/dense runs/demo/model --kv-memory 128M --prompt 1000 --new 512

Each checkpoint gets a process of its own with vLLM's defaults but for the options here; `--options` hands on more, such as
`--options '{"long_prefill_token_threshold": 128}'`. Beside what `bench --serve` reports there is `ideal`: how many requests
would run at once if memory held what a plan says to the byte and nothing else; and `alone_s`, the time to the first token of a
prompt when nothing else is there, the median of some.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import options  # beside this script

from moacompress.bench.request_mix import ANSWERS, PROMPTS, Request, requests
from moacompress.bench.serving import Served
from moacompress.rules.budget import parse_bytes
from moacompress.rules.plan import Plan

STEPS_OF_IDEAL = 16


def ideal_running(folder: Path, mix: list[Request], memory: int, dtype: str) -> float:
    """Returns how many requests fit into memory in the mean, over the steps of their answers, by the bytes of the plan."""
    config = json.loads((folder / "config.json").read_text())
    stored = config.get("quantization_config", {}).get("plan")
    if stored is None:
        heads = config["num_key_value_heads"]
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        size = config["num_hidden_layers"] * heads * dim * 2 * (4 if dtype == "float32" else 2)
        bytes_of = lambda n: -(-n // 16) * 16 * size  # noqa: E731
    else:
        bytes_of = Plan.from_dict(stored).in_dtype(dtype).kv_bytes
    total = steps = 0.0
    for one in mix:
        lengths = [one.prompt_tokens + one.new_tokens * part // STEPS_OF_IDEAL for part in range(STEPS_OF_IDEAL)]
        total += sum(map(bytes_of, lengths)) / STEPS_OF_IDEAL * one.new_tokens
        steps += one.new_tokens
    return memory / (total / steps)


class Watched:
    """What vLLM's scheduler did."""

    def __init__(self) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        self.steps = self.preempted = 0
        self.running: list[tuple[float, int]] = []
        schedule, preempt = Scheduler.schedule, Scheduler._preempt_request

        def scheduled(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            found = schedule(scheduler, *args, **kwargs)
            self.steps += 1
            self.running.append((time.perf_counter(), len(scheduler.running)))
            return found

        def preempts(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(scheduler, *args, **kwargs)

        Scheduler.schedule, Scheduler._preempt_request = scheduled, preempts

    def mean(self, end: float) -> float:
        """Returns the mean number of requests at once, over time."""
        ends = [at for at, _ in self.running[1:]] + [end]
        spans = [(stop - at, count) for (at, count), stop in zip(self.running, ends, strict=True)]
        return sum(span * count for span, count in spans) / sum(span for span, _ in spans)


def serve(folder: Path, mix: list[Request], memory: int, given: argparse.Namespace) -> dict[str, Any]:
    """Returns a row of numbers, see `bench --serve`."""
    import random

    from vllm import EngineArgs, LLMEngine, SamplingParams

    watched = Watched()
    longest = max(one.tokens for one in mix)
    options: dict[str, Any] = {
        "dtype": given.dtype,
        "max_model_len": max(2048, longest + 1),
        "kv_cache_memory_bytes": memory,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # prompts are random
        **json.loads(given.options),
    }
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(folder), **options))
    size = engine.vllm_config.model_config.get_vocab_size()
    rng = random.Random(given.seed)

    def add(name: str, one: Request) -> None:
        params = SamplingParams(temperature=0, max_tokens=one.new_tokens, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": [rng.randrange(size) for _ in range(one.prompt_tokens)]}, params)

    alone = []
    for turn in range(given.alone + 1):
        began = time.perf_counter()
        add(f"alone-{turn}", Request(mix[0].prompt_tokens, 1))
        while engine.has_unfinished_requests():
            engine.step()
        alone.append(time.perf_counter() - began)
    watched.running.clear()
    watched.steps = 0
    waiting = list(enumerate(mix))
    arrived: dict[str, float] = {}
    first: dict[str, float] = {}
    served = Served()
    began = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1].arrival <= time.perf_counter() - began:
            number, one = waiting.pop(0)
            arrived[str(number)] = began + one.arrival
            add(str(number), one)
        if not engine.has_unfinished_requests():
            time.sleep(0.01)
            continue
        for out in engine.step():
            now, tokens = time.perf_counter(), len(out.outputs[0].token_ids)
            first.setdefault(out.request_id, now)
            if out.finished:
                served.first.append(first[out.request_id] - arrived[out.request_id])
                if tokens > 1:
                    served.token.append((now - first[out.request_id]) / (tokens - 1))
    end = time.perf_counter()
    served.seconds, served.running, served.steps = end - began, watched.mean(end), watched.steps
    served.most = max(count for _, count in watched.running)
    row = served.row(mix)
    del row["reserved_bytes"]
    return {
        "model": str(folder),
        "dtype": given.dtype,
        "kv_memory": memory,
        **row,
        "preemptions": watched.preempted,
        "ideal": ideal_running(folder, mix, memory, given.dtype),
        "alone_s": statistics.median(alone[1:]),
        "options": json.loads(given.options),
    }


def main() -> None:
    """Runs every checkpoint in a process of its own, and prints a line for each."""
    parser = options(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--kv-memory", default="128M")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--alone", type=int, default=5, metavar="TURNS")
    parser.add_argument("--options", default="{}", metavar="JSON", help="more options of vLLM")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line, and nothing else")
    given = parser.parse_args()
    mix = requests(
        given.seed, given.requests, prompt=given.prompt or PROMPTS, new=given.new or ANSWERS, rate=given.rate
    )
    if os.environ.get("MOACOMPRESS_SERVED") == "1":
        print("ROW", json.dumps(serve(given.folders[0], mix, parse_bytes(given.kv_memory), given)))
        return
    rows = []
    for folder in given.folders:
        own = {"MOACOMPRESS_SERVED": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        rest = sys.argv[1:]
        for other in given.folders:
            rest = [one for one in rest if one != str(other)]
        done = subprocess.run(
            [sys.executable, __file__, str(folder), *rest], env={**os.environ, **own}, capture_output=True, text=True
        )
        row = next((line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")), None)
        if row is None:
            sys.exit(
                f"{folder} cannot be served (exit code {done.returncode}):\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
            )
        rows.append(json.loads(row))
        if not given.json:
            one = rows[-1]
            print(
                f"{folder}: {one['seconds']:.1f} s, {one['running']['mean']:.1f} requests at once (ideal {one['ideal']:.1f}), "
                f"first token {one['first_token_s']['mean']:.2f} s, alone {one['alone_s']:.3f} s, "
                f"a token {one['token_s']['mean'] * 1000:.1f} ms, {one['preemptions']} preemptions",
                flush=True,
            )
    if given.json:
        print(json.dumps({"serve": rows}))


if __name__ == "__main__":
    main()

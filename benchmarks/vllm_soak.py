"""A server under a plan for a while: many clients, some of whom leave in the middle, and memory that must stay as it is.

Run it in the environment of `make test-vllm`:

    .cache/vllm/bin/python benchmarks/vllm_soak.py runs/demo/model --minutes 30

It starts vLLM's server on a port of its own, keeps `--clients` of them asking (lengths are those of `moacompress bench
--serve`, cut to the maximum length), lets a third leave after some tokens, and prints the memory of all its processes every
minute. The answers to a few fixed prompts are asked for before, in the middle and after, and must be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from harness import options  # beside this script

from moacompress.bench.request_mix import requests

FIXED = ("The capital of France is", "One, two, three,", "In the beginning", "def main():")
MIB = 2**20


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def memory_of(process: psutil.Process) -> float:
    """Returns the resident memory of a process and all that it started, in MiB."""
    found = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            found += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found / MIB


def metric(address: str, name: str) -> float:
    """Returns what the server says under a name."""
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"vllm:{name}{{"))


async def soak(address: str, process: psutil.Process, given: argparse.Namespace) -> dict[str, Any]:
    """Returns what happened."""
    import openai

    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    rng, counts = random.Random(given.seed), {"answered": 0, "left": 0, "errors": 0}
    mix = requests(given.seed, 10_000)
    began, number, samples = time.monotonic(), itertools.count(), []

    async def say(prompt: str) -> str:
        made = await client.completions.create(model="soaked", prompt=prompt, max_tokens=24, temperature=0)
        return str(made.choices[0].text)

    async def one_client() -> None:
        while time.monotonic() - began < given.minutes * 60:
            one = mix[next(number) % len(mix)]
            room = given.max_model_len - 1
            prompt = [rng.randrange(100, 1000) for _ in range(min(one.prompt_tokens, room // 2))]
            new = min(one.new_tokens, room - len(prompt))
            leaves = rng.randrange(new) if rng.random() < 1 / 3 else None
            try:
                made = await client.completions.create(
                    model="soaked", prompt=prompt, max_tokens=new, stream=True, extra_body={"ignore_eos": True}
                )
                tokens = 0
                async for _ in made:
                    tokens += 1
                    if leaves is not None and tokens > leaves:
                        await made.close()
                        break
                counts["left" if leaves is not None else "answered"] += 1
            except openai.OpenAIError as error:
                counts["errors"] += 1
                print(f"error: {error}", file=sys.stderr, flush=True)

    async def watch() -> None:
        while time.monotonic() - began < given.minutes * 60:
            await asyncio.sleep(60)
            samples.append(memory_of(process))
            print(f"{len(samples)} min: {samples[-1]:.0f} MiB, {counts}", file=sys.stderr, flush=True)

    async def ask_between() -> list[str]:
        await asyncio.sleep(given.minutes * 30)
        return [await say(prompt) for prompt in FIXED]

    before = [await say(prompt) for prompt in FIXED]
    began = time.monotonic()
    *_, between = await asyncio.gather(*(one_client() for _ in range(given.clients)), watch(), ask_between())
    after = [await say(prompt) for prompt in FIXED]
    third = max(len(samples) // 3, 1)
    return {
        "model": str(given.folder),
        "minutes": given.minutes,
        **counts,
        "preemptions": metric(address, "num_preemptions_total"),
        "running_at_the_end": metric(address, "num_requests_running"),
        "kv_usage_at_the_end": metric(address, "kv_cache_usage_perc"),
        "memory_mib": {"first_third": max(samples[:third]), "last_third": max(samples[-third:])},
        "same_alone": before == after,
        "same_beside_others": before == between,
    }


def main() -> None:
    """Starts the server, and prints a JSON object on one line."""
    parser = options(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--kv-memory", default="64M")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(given.folder)),
        *("--served-model-name", "soaked", "--port", str(port), "--host", "127.0.0.1", "--dtype", given.dtype),
        *("--max-model-len", str(given.max_model_len), "--kv-cache-memory-bytes", given.kv_memory),
    ]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}
        )
        try:
            while server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                log.seek(0)
                sys.exit(f"the server did not start:\n{log.read()[-3000:]}")
            found = asyncio.run(soak(f"http://127.0.0.1:{port}", psutil.Process(server.pid), given))
            print(json.dumps(found))
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()

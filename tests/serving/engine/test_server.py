"""vLLM's server on a checkpoint with a plan: a real one on loopback, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engine.test_exact import spans

STARTS = 300
"""Seconds in which a server is there."""


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def server(
    checkpoints: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Yields the address of a server, and the file of what it logs."""
    folder, _ = checkpoints(spans)
    tiny_tokenizer.save_pretrained(folder)
    log, port = tmp_path_factory.mktemp("server") / "log.txt", free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", str(8 << 20), "--dtype", "float32"),
    ]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out, subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + STARTS
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
            yield f"http://127.0.0.1:{port}", log
        finally:
            process.terminate()
            process.wait(60)


def metric(address: str, name: str) -> float:
    """Returns what the server says of itself."""
    metrics = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(f"vllm:{name}{{"))


def test_answers_streams_and_cancels(server):
    openai = pytest.importorskip("openai")
    address, log = server
    assert "holds" in log.read_text()  # what a sequence takes under the plan
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    async def ask(number: int, stream: bool = False) -> str:
        prompt = f"{number} " * 40
        made = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=30, temperature=0, stream=stream, extra_body={"ignore_eos": True}
        )
        if not stream:
            return str(made.choices[0].text)
        return "".join([part.choices[0].text async for part in made])

    async def leave(number: int) -> None:
        made = await client.completions.create(
            model="tiny", prompt="x" * 300, max_tokens=700, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in made:
            break
        await made.close()

    async def everything() -> tuple[list[str], list[str], list[str]]:
        alone = [await ask(number) for number in range(4)]
        together = await asyncio.gather(*(ask(number % 4) for number in range(16)))
        await asyncio.gather(*(leave(number) for number in range(8)))
        streamed = await asyncio.gather(*(ask(number, stream=True) for number in range(4)))
        chat = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5
        )
        assert chat.usage.completion_tokens <= 5
        return alone, list(together), list(streamed)

    alone, together, streamed = asyncio.run(everything())
    assert together == alone * 4
    assert streamed == alone
    deadline = time.monotonic() + 30
    while metric(address, "num_requests_running") and time.monotonic() < deadline:  # those who left are forgotten
        time.sleep(0.2)
    assert metric(address, "num_requests_running") == 0
    assert metric(address, "kv_cache_usage_perc") == 0

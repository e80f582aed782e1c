"""A compressed checkpoint beside llama.cpp: the time of a decode step and of reading a prompt, at short and long contexts.

llama.cpp comes as a wheel for CPUs, and is no dependency of moacompress:

    pip install llama-cpp-py-sync
    python benchmarks/llama_cpp.py eighth-gates/ SmolLM2-135M-Instruct.Q4_1.gguf -o llama_cpp.json

`ours` is the checkpoint in bfloat16; `llama-bf16` the file's weights as BF16, so the same numbers of the same bytes, and
`llama-shipped` the file as it is, both with llama.cpp's default cache in 16 bits. `--sides` names others: a second
checkpoint as `NAME=FOLDER`, or with a cache of q8_0 `llama-bf16-q8_0`. Each side is a process of its own, with the same
number of threads, and they take turns: a turn is a prompt of random tokens, and then some steps behind it. Beside them
stands the time of a plain sum over as many bytes as the checkpoint's weights, in float32, by torch on the same threads.

What is reported are medians over the turns, `step_ms` and `prompt_ms`, with the least and the most. With `-o` a stopped run
resumes: what is there of the same request is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from moacompress.rules.budget import format_length, parse_lengths

BF16_FILE_TYPE = 32
"""What llama.h calls LLAMA_FTYPE_MOSTLY_BF16."""
CACHE_TYPES = {"f16": 1, "q8_0": 8}
"""ggml's numbers of types of a cache."""
OURS, LLAMA = "ours", "llama-"
PROMPT_BATCH = 2048


class Engine(Protocol):
    """What a side's process does for its parent."""

    vocabulary: int

    def prompt(self, ids: Sequence[int]) -> None:
        """Reads a prompt into an empty cache."""

    def step(self, token: int) -> None:
        """Takes one more token in, and computes what may come next."""


class Ours:
    """A checkpoint under its plan, in bfloat16.

    Args:
        folder: the checkpoint.
        threads: of torch.
    """

    def __init__(self, folder: str, threads: int) -> None:
        import torch

        from moacompress.bench.sides import vocabulary_size
        from moacompress.runtime.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = load_checkpoint(Path(folder), "bfloat16", "cpu").model
        self.vocabulary = vocabulary_size(self._model)
        self._cache: Any = None

    def prompt(self, ids: Sequence[int]) -> None:
        """As `Engine`."""
        from moacompress.runtime.compat.alternates import returned_cache

        self._cache = None
        with self._torch.no_grad():
            out = self._model(input_ids=self._torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache = returned_cache(out)

    def step(self, token: int) -> None:
        """As `Engine`."""
        from moacompress.runtime.compat.alternates import cache_argument

        with self._torch.no_grad():
            self._model(input_ids=self._torch.tensor([[token]]), use_cache=True, **cache_argument(self._cache))


class Llama:
    """llama.cpp.

    Args:
        file: the `.gguf` file.
        threads: of a step, and of a prompt.
        tokens: that there must be room for.
        cache: type of keys and values, see `CACHE_TYPES`.
    """

    def __init__(self, file: str, threads: int, tokens: int, cache: str) -> None:
        self._ffi, self._lib = llama_library()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(os.fsencode(file), params)
        if self._model == self._ffi.NULL:
            raise SystemExit(f"llama.cpp cannot load {file}")
        wanted = self._lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch = tokens, min(tokens, PROMPT_BATCH)
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = CACHE_TYPES[cache]
        self._context = self._lib.llama_init_from_model(self._model, wanted)
        if self._context == self._ffi.NULL:
            raise SystemExit(f"llama.cpp has no memory for {tokens} tokens")
        self.vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def prompt(self, ids: Sequence[int]) -> None:
        """As `Engine`."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for begin in range(0, len(ids), PROMPT_BATCH):
            self._decode(ids[begin : begin + PROMPT_BATCH])

    def step(self, token: int) -> None:
        """As `Engine`."""
        self._decode([token])

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = self._ffi.new("llama_token[]", list(ids))
        failed = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if failed:
            raise SystemExit(f"llama_decode of {len(ids)} tokens returned {failed}")
        self._lib.llama_synchronize(self._context)


def llama_library() -> tuple[Any, Any]:
    """Returns the interface to C and the library, which says nothing but errors from now on."""
    try:
        from llama_cpp_py_sync import _cffi_bindings as bindings
    except ImportError:
        raise SystemExit("llama.cpp is not here: pip install llama-cpp-py-sync") from None
    ffi, library = bindings.get_ffi(), bindings.get_lib()
    silent = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
    library.llama_log_set(silent, ffi.NULL)
    llama_library.silent = silent  # type: ignore[attr-defined]  # C holds it from now on
    return ffi, library


def write_bf16(source: Path, to: Path) -> None:
    """Writes a `.gguf` file's weights as BF16, by llama.cpp's own conversion."""
    ffi, library = llama_library()
    params = ffi.new("struct llama_model_quantize_params *", library.llama_model_quantize_default_params())
    params.ftype, params.allow_requantize = BF16_FILE_TYPE, True
    failed = library.llama_model_quantize(os.fsencode(source), os.fsencode(to), params)
    if failed:
        raise SystemExit(f"llama.cpp cannot write {source} as BF16: it returned {failed}")


def work(task: dict[str, Any]) -> None:
    """Is the process of a side: measures a turn for every line that comes in, and answers with its numbers."""
    import random

    if task["side"].startswith(LLAMA):
        engine: Engine = Llama(task["model"], task["threads"], task["tokens"], task["kv_type"])
    else:
        engine = Ours(task["model"], task["threads"])
    print(json.dumps({"ready": engine.vocabulary}), flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        rng = random.Random(turn["seed"])
        ids = [rng.randrange(engine.vocabulary) for _ in range(turn["length"] + 1 + turn["steps"])]
        begin = time.perf_counter()
        engine.prompt(ids[: turn["length"]])
        prompt = time.perf_counter() - begin
        engine.step(ids[turn["length"]])  # the first one takes memory
        steps = []
        for token in ids[turn["length"] + 1 :]:
            begin = time.perf_counter()
            engine.step(token)
            steps.append(time.perf_counter() - begin)
        print(json.dumps({"prompt_ms": prompt * 1e3, "step_ms": statistics.median(steps) * 1e3}), flush=True)


@contextmanager
def side_process(task: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Starts the process of a side, and ends it."""
    command = [sys.executable, __file__, "--work", json.dumps(task)]
    threads = str(task["threads"])
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            answer(process, task["side"])
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def answer(process: subprocess.Popen[str], side: str) -> dict[str, Any]:
    """Returns the next answer of a side's process."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the process of {side} ended with {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def reading_ms(count: int, threads: int, repeats: int = 15) -> float:
    """Returns the least time of a sum over so many bytes, in milliseconds."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.rand(count // 4)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3


def summary(turns: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Returns medians, and the least and most, of some turns of a side at a length."""
    found: dict[str, Any] = {"turns": len(turns)}
    for name in ("prompt_ms", "step_ms"):
        values = [turn[name] for turn in turns]
        found |= {name: statistics.median(values), f"{name[:-3]}_range_ms": [min(values), max(values)]}
    return found


def tasks_of(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Returns what the process of each side is told; makes the file of weights as BF16 if one of them wants it."""
    tokens = max(given.lengths) + given.steps + 2
    tasks = []
    for side in given.sides:
        task = {"side": side, "threads": given.threads, "tokens": tokens}
        if side.startswith(LLAMA):
            weights, _, cache = side.removeprefix(LLAMA).partition("-")
            if weights not in ("bf16", "shipped") or (cache or "f16") not in CACHE_TYPES:
                raise SystemExit(
                    f"there is no side {side}; known are llama-bf16 and llama-shipped, alone or with -q8_0"
                )
            file = given.weights if weights == "shipped" else folder / "bf16.gguf"
            if not file.exists():
                write_bf16(given.weights, file)
            tasks.append({**task, "model": str(file), "kv_type": cache or "f16"})
        else:
            name, _, other = side.partition("=")
            if not other and name != OURS:
                raise SystemExit(f"there is no side {side}; a checkpoint is given as NAME=FOLDER")
            tasks.append({**task, "side": name, "model": other or str(given.checkpoint)})
    return tasks


def measure(given: argparse.Namespace, done: dict[str, list[dict[str, float]]], save: Any) -> None:
    """Takes the turns that `done` lacks, by `side@length`; `save` is called after each round of all sides."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks = tasks_of(given, folder)
        sides = {task["side"]: stack.enter_context(side_process(task)) for task in tasks}
        for length in given.lengths:
            for turn in range(given.turns):
                for side, process in sides.items():
                    found = done.setdefault(f"{side}@{length}", [])
                    if len(found) > turn:
                        continue
                    assert process.stdin is not None
                    process.stdin.write(json.dumps({"length": length, "steps": given.steps, "seed": turn}) + "\n")
                    process.stdin.flush()
                    found.append(answer(process, side))
                    times = "{step_ms:.1f} ms a step, {prompt_ms:.0f} ms the prompt".format(**found[-1])
                    print(f"{side} at {format_length(length)}: {times}", file=sys.stderr)
                save()


def main() -> None:
    """Measures, and prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="compressed checkpoint")
    parser.add_argument("weights", type=Path, nargs="?", help=".gguf file of the same model")
    parser.add_argument("--lengths", type=parse_lengths, default=parse_lengths("256,1k,4k"))
    parser.add_argument("--sides", default="ours,llama-bf16,llama-shipped", help="comma-separated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, help="JSON file, from which a stopped run resumes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        return work(json.loads(given.work))
    if given.checkpoint is None or given.weights is None:
        parser.error("a checkpoint and a .gguf file are needed")
    given.sides = given.sides.split(",")
    request = {
        name: [*map(str, value)] if isinstance(value, list | tuple) else str(value)
        for name, value in vars(given).items()
        if name not in ("out", "json", "work", "turns")
    }
    done: dict[str, list[dict[str, float]]] = {}
    if given.out is not None and given.out.exists():
        before = json.loads(given.out.read_text())
        if before["request"] != request:
            parser.error(f"{given.out} is of another request; name another file")
        done = before["turns"]

    def report() -> dict[str, Any]:
        rows = []
        for name, turns in done.items():
            side, _, length = name.partition("@")
            rows.append({"side": side, "length": int(length), **summary(turns)})
        return {"request": request, "runs": rows, "turns": done}

    def save() -> None:
        if given.out is not None:
            given.out.write_text(json.dumps(report(), indent=1))

    measure(given, done, save)
    count = sum(file.stat().st_size for file in given.checkpoint.glob("model*.safetensors"))
    found = {**report(), "weight_bytes": count, "reading_ms": reading_ms(count, given.threads)}
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1))
    if given.json:
        print(json.dumps(found))
        return
    print(f"{given.threads} threads; a sum over the {count / 1e6:.0f} MB of weights takes {found['reading_ms']:.1f} ms")
    print(f"{'':16}{'tokens':>8}{'ms a step':>12}{'prompt, ms':>12}")
    for row in found["runs"]:
        print(f"{row['side']:16}{format_length(row['length']):>8}{row['step_ms']:>12.1f}{row['prompt_ms']:>12.0f}")


if __name__ == "__main__":
    main()

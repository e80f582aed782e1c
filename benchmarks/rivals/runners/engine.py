"""What a runner does: it loads one setting of its rival, and then answers jobs, one line of JSON each.

The first line out says that it is ready: `{"vocabulary": ..., "versions": {package: version}}`. Then for each job:

- `{"do": "answer", "prompt": ids, "question_at": index or null, "new_tokens": n, "stop": ids}`: the greedy answer, the bytes of
  keys and values in memory at its end, and how many of these are never attended to: `{"ids": ..., "kv_bytes": ...,
  "masked_bytes": ...}`. With `question_at` the prompt is compressed before its question is read.
- `{"do": "turn", "length": n, "steps": n, "seed": n}`: a prompt of random tokens and some steps behind it:
  `{"prompt_ms": ..., "step_ms": ..., "peak_bytes": ...}`, the median step, and the most memory that the process had meanwhile.
- `{"do": "kept", "prompt": ids}`: which tokens of the prompt each KV head keeps: `{"kept": lists of positions by layer and
  KV head}`.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Job = dict[str, Any]


class Engine(ABC):
    """A rival with the model loaded.

    Attributes:
        vocabulary: number of tokens there are.
        packages: whose versions are reported.
    """

    vocabulary: int
    packages: tuple[str, ...] = ()

    @abstractmethod
    def answer(self, job: Job) -> Job:
        """Answers a prompt greedily."""

    @abstractmethod
    def turn(self, job: Job) -> Job:
        """Times a prompt and some steps; `peak_bytes` is added by the caller."""

    def kept(self, job: Job) -> Job:
        """Says which tokens each KV head keeps.

        Raises:
            NotImplementedError: it cannot tell.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which tokens it keeps")


class SteppedEngine(Engine):
    """A rival that is fed tokens, and says after each forward what may come next."""

    @abstractmethod
    def read(self, ids: Sequence[int]) -> None:
        """Reads a prompt into an empty cache, and makes the cache smaller where the rival does that once.

        `more` follows, so that what an answer sees is the smaller cache.
        """

    @abstractmethod
    def more(self, ids: Sequence[int]) -> None:
        """Reads further tokens."""

    @abstractmethod
    def best(self) -> int:
        """Returns the most likely token behind those of the last `more`."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Returns the bytes of keys and values in the cache as it is."""

    def masked_bytes(self) -> int:
        """Returns how many of these bytes are in memory and never attended to."""
        return 0

    def answer(self, job: Job) -> Job:
        """As `Engine`."""
        prompt, at = job["prompt"], job["question_at"]
        at = len(prompt) - 1 if at is None else at
        self.read(prompt[:at])
        self.more(prompt[at:])
        ids = [self.best()]
        while len(ids) < job["new_tokens"] and ids[-1] not in job["stop"]:
            self.more(ids[-1:])
            ids.append(self.best())
        return {"ids": ids, "kv_bytes": self.kv_bytes(), "masked_bytes": self.masked_bytes()}

    def turn(self, job: Job) -> Job:
        """As `Engine`."""
        ids = random_ids(job, self.vocabulary)
        begin = time.perf_counter()
        self.read(ids[: job["length"]])
        prompt = time.perf_counter() - begin
        self.more(ids[job["length"] : job["length"] + 1])  # the first one takes memory
        steps = []
        for token in ids[job["length"] + 1 :]:
            begin = time.perf_counter()
            self.more([token])
            steps.append(time.perf_counter() - begin)
        return {"prompt_ms": prompt * 1e3, "step_ms": statistics.median(steps) * 1e3}


def random_ids(job: Job, vocabulary: int) -> list[int]:
    """Returns the tokens of a turn: its prompt, one that is not timed, and those of its steps."""
    rng = random.Random(job["seed"])
    return [rng.randrange(vocabulary) for _ in range(job["length"] + 1 + job["steps"])]


def serve(make: Callable[[Job], Engine]) -> None:
    """Is the process of a runner: loads what its second argument says, and answers jobs until there are no more.

    What libraries print goes to stderr.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def say(line: Job) -> None:
            print(json.dumps(line), file=out, flush=True)

        engine = make(json.loads(sys.argv[2]))
        say({"vocabulary": engine.vocabulary, "versions": {name: metadata.version(name) for name in engine.packages}})
        for line in sys.stdin:
            job = json.loads(line)
            if job["do"] == "turn":
                _forget_peak()
                say({**engine.turn(job), "peak_bytes": _peak_bytes()})
            else:
                say(engine.answer(job) if job["do"] == "answer" else engine.kept(job))


def _forget_peak() -> None:
    """Makes the most memory that this process has had what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Returns the most memory in use since `_forget_peak`, weights and libraries included."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

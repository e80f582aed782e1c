"""The process of a runner, seen from outside: it is started, given jobs, and ended."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from moacompress.core.errors import MoaCompressError

START = Path(__file__).resolve().parent / "start.py"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SAID = 6
"""Most lines of what a process wrote that an error repeats."""


class RunnerError(MoaCompressError):
    """A runner ended before it answered."""


class Runner:
    """A process that answers jobs; `ready` is its first answer, with `vocabulary` and `versions`."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._name, self._process, self._errors = name, process, errors
        self.ready = self._answer()

    def do(self, what: str, **job: Any) -> dict[str, Any]:
        """Returns the answer to a job.

        Raises:
            RunnerError: the process ended; says what it wrote last.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # that it ended is told with the answer
            self._process.stdin.write(json.dumps({"do": what, **job}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()[-SAID:]
            raise RunnerError("\n".join([f"the process of {self._name} ended with {code}", *said]))
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def runner(python: Path, rival: str, name: str, task: Mapping[str, Any]) -> Iterator[Runner]:
    """Starts the process of a setting, and ends it.

    `task` is what the runner is told first; all libraries keep to its `threads`.

    Raises:
        RunnerError: it ends before it is ready.
    """
    threads = dict.fromkeys(THREAD_VARIABLES, str(task["threads"]))
    env = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [str(python), "-P", str(START), rival, json.dumps(dict(task))]
    with (
        TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        ) as process,
    ):
        try:
            yield Runner(name, process, errors)
        finally:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()

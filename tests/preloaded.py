"""Commands in processes that are forked from one that has imported everything: a fresh one imports for many seconds.

As a script this is that process. It reads a job a line, runs the command in as many processes as are asked for, with the
variables of `torchrun` where there are several, and answers with an exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

PATIENCE = 5.0
"""Seconds that processes have to end in once another one has failed."""


class Preloaded:
    """Runs `moacompress` in forks of one process, which compute with one thread.

    Args:
        path: folders that modules are found in before all others.
    """

    def __init__(self, *path: Path) -> None:
        places = os.pathsep.join(map(str, [*path, Path(__file__).resolve().parent.parent]))
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def run(
        self, *command: str | Path, ranks: int = 1, timeout: float = 240, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end.

        Args:
            command: arguments of `moacompress`, or a script, where the first ends in `.py`, and its arguments.
            ranks: processes.
            timeout: seconds that they may take.
            variables: of their environment, beside the present ones.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        arguments = [*map(str, command)]
        with tempfile.TemporaryDirectory() as folder:
            job = {"command": arguments, "ranks": ranks, "folder": folder, "cwd": os.getcwd()}
            self.process.stdin.write(json.dumps({**job, "environment": {**os.environ, **variables}}) + "\n")
            self.process.stdin.flush()
            late = threading.Timer(timeout, self.close)
            late.start()
            answer = self.process.stdout.readline()
            late.cancel()
            if not answer:
                raise TimeoutError(f"{arguments} did not end within {timeout:g} seconds, or ended what runs it")
            out, error = ((Path(folder) / name).read_text() for name in ("out", "error"))
        return subprocess.CompletedProcess(arguments, int(answer), out, error)

    def close(self) -> None:
        """Ends it, and all that it runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serve() -> None:
    """Runs jobs until there are no more."""
    for name in ("transformers.models.llama.modeling_llama", "moacompress.exporter.exporting", "moacompress.pipeline"):
        importlib.import_module(name)

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        code = run_job(json.loads(line))
        answers.write(f"{code}\n")
        answers.flush()


def run_job(job: dict[str, Any]) -> int:
    """Returns 0 where all processes of a job end well, and otherwise the exit code of the first that does not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = set()
    for rank in range(job["ranks"]):
        child = os.fork()
        if not child:
            be_rank(job, rank, port)
        running.add(child)
    failed, until = 0, 0.0
    while running:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            running.discard(ended)
            if status and not failed:
                failed, until = os.waitstatus_to_exitcode(status), time.monotonic() + PATIENCE
                for other in running:
                    os.kill(other, signal.SIGTERM)
        elif failed and time.monotonic() > until:
            for other in running:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return failed


def be_rank(job: dict[str, Any], rank: int, port: int) -> None:
    """Runs one process of a job, and exits."""
    os.environ.clear()
    os.environ.update(job["environment"], OMP_NUM_THREADS="1")
    if job["ranks"] > 1:
        of_ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        of_ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in of_ranks.items()})
    os.chdir(job["cwd"])
    for number, name in ((1, "out"), (2, "error")):
        file = os.open(Path(job["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    script = job["command"][0].endswith(".py")
    sys.argv = job["command"] if script else ["moacompress", *job["command"]]
    code: Any = 0
    try:
        if script:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module("moacompress", run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    raise SystemExit(code)


if __name__ == "__main__":
    serve()

"""Commands that are killed at a write, and what a run leaves behind that two runs of a command have in common.

As a script it runs `moacompress` in a folder and kills it without warning before the n-th change there: `kills.py FOLDER NUMBER
BESIDE ARGUMENT...`. Changes are what Python reports of the file system: files opened to be written or appended to, moves,
removals and new folders. A file that was about to be written is left with half of something in it. Number 0 kills nothing and
writes how many changes there were to `FOLDER.changes`. `BESIDE` processes run the same command at the same time, undisturbed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.preloaded import Preloaded

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
"""Audit events that name what they change first, beside `open`."""
HALF = b'{"op_code": 8, "worker'
"""What is left in a file that was about to be written."""

IGNORED = re.compile(r".*(\.journal|\.lock|\.html)|seconds\.json|study\.journal\.lock[0-9a-f-]+\.rename")
"""Names of files that no two runs have in common: of times, and of the order in which trials were made.

The last is what Optuna moves the lock of a journal to: where workers share it, it may be that of a live one.
"""
IGNORED_KEYS = {"seconds"}
"""Keys of JSON that differ from run to run, wherever they are."""


@dataclass(frozen=True)
class Command:
    """A resumable command.

    Attributes:
        arguments: of `moacompress`; `{out}` is the folder that is compared, `{model}` the dense model, `{run}` a whole run.
        first: commands before it.
        beside: processes that run the same command at the same time.
    """

    arguments: str
    first: tuple[str, ...] = ()
    beside: int = 0


class Harness:
    """Runs commands in folders of their own, undisturbed or killed.

    Args:
        place: where the folders of undisturbed runs are made.
        preloaded: runs scripts.
        model: folder of the dense model.
        recipe: of whole runs.
    """

    def __init__(self, place: Path, preloaded: Preloaded, model: Path, recipe: dict[str, Any]) -> None:
        self.place, self.preloaded, self.model = place, preloaded, model
        self.recipe = {**recipe, "model": str(model)}
        self.done: dict[str, int] = {}

    def run(self, arguments: str, out: Path, number: int = 0, beside: int = 0) -> bool:
        """Runs a command; returns whether it came to its end.

        Args:
            arguments: see `Command`.
            out: the folder.
            number: of the change that it is killed before; 0 for none.
            beside: see `Command`.

        Raises:
            AssertionError: it failed.
        """
        Path(f"{out}.yaml").write_text(json.dumps(self.recipe))
        names = {"out": out, "model": self.model, "run": self.place / "compress"}
        parts = (part.format(**names) for part in arguments.split())
        ended = self.preloaded.run(Path(__file__), out, str(number), str(beside), *parts, "-q", timeout=900)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        return ended.returncode == 0

    def prepare(self, command: Command, out: Path) -> None:
        """Makes a folder as it is before a command."""
        out.mkdir()
        for arguments in command.first:
            assert self.run(arguments, out)

    def whole(self, name: str, command: Command) -> tuple[Path, int]:
        """Returns the folder of an undisturbed run, and how many changes it took."""
        out = self.place / name.replace(" ", "-")
        if name not in self.done:
            self.prepare(command, out)
            assert self.run(command.arguments, out)
            self.done[name] = int(Path(f"{out}.changes").read_text())
        return out, self.done[name]


def contents(folder: Path) -> dict[str, Any]:
    """Returns what two runs of a command have in common, by path: JSON as values, lines in any order, all else as bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or IGNORED.fullmatch(path.name):
            continue
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = _same(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = sorted({json.dumps(_same(json.loads(line))) for line in path.read_text().splitlines()})
        elif path.suffix == ".safetensors":
            found[name] = _tensors(path.read_bytes())
        else:
            found[name] = path.read_bytes()
    return found


def _tensors(data: bytes) -> tuple[Any, bytes]:
    """Returns the header of a safetensors file, whose entries come in any order, and its numbers."""
    end = 8 + int.from_bytes(data[:8], "little")
    return _same(json.loads(data[8:end])), data[end:]


def _same(value: Any) -> Any:
    """Returns a JSON value without what differs between runs."""
    if isinstance(value, dict):
        kept = (key for key in value if key not in IGNORED_KEYS)
        return {key: _same(value[key]) for key in kept}
    return [_same(each) for each in value] if isinstance(value, list) else value


class Kill:
    """An audit hook that kills the process before a change in a folder.

    Args:
        folder: the folder.
        number: of the change, counted from 1; 0 for none.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number, self.count = os.fspath(folder.resolve()), number, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Counts an event."""
        writes = event == "open" and _writes(*arguments[1:])
        if not writes and event not in CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or not os.path.abspath(os.fsdecode(path)).startswith(
            self.folder
        ):
            return
        self.count += 1
        if self.count == self.number:
            if writes and not os.path.isdir(path):
                leave_half(path)
            os.kill(os.getpid(), signal.SIGKILL)


def _writes(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


def leave_half(path: Any) -> None:
    """Leaves half of something at the end of a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, HALF)
    os.close(file)


def main() -> None:
    """Runs a command, see the module."""
    folder, number, beside = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    sys.argv = ["moacompress", *sys.argv[4:]]
    for name in ("exporter.exporting", "healer.healing"):  # a fresh process, which imports for seconds
        vars(importlib.import_module(f"moacompress.{name}"))["verify_fresh"] = lambda *arguments, **options: None
    for _ in range(beside):
        if not os.fork():
            number = -1
            break
    else:
        victim = os.fork() if beside else 0
        if victim:
            codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(beside + 1)]
            sys.exit(any(code not in (0, -signal.SIGKILL) for code in codes))
    kill = Kill(folder, number)
    sys.addaudithook(kill)
    try:
        runpy.run_module("moacompress", run_name="__main__")
    finally:
        if not number:
            Path(f"{folder}.changes").write_text(str(kill.count))


if __name__ == "__main__":
    main()

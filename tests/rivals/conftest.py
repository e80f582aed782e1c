"""A rival that is none: its runner answers at once, and counts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

FAKE = f"""
import json, sys
sys.path.append({str(BENCHMARKS)!r})
from rivals.runners.engine import SteppedEngine, serve

class Fake(SteppedEngine):
    packages = ("pytest",)
    vocabulary = 50

    def __init__(self, task):
        self.task = task
        if task.get("broken") == "start":
            raise SystemExit("no such model")

    def read(self, ids):
        self.log, self.tokens = [list(ids)], len(ids)

    def more(self, ids):
        if self.task.get("broken") == "answer" and self.tokens > 5:
            raise SystemExit("out of memory")
        self.log.append(list(ids))
        self.tokens += len(ids)

    def best(self):
        print("a library says something")
        return self.task["says"][min(len(self.log) - 2, len(self.task["says"]) - 1)]

    def kept(self, job):
        if "keeps" not in self.task:
            return super().kept(job)
        positions = list(range(len(job["prompt"])))[self.task["keeps"] :]
        return {{"kept": [[positions, positions[: job.get("count")]]]}}

    def kv_bytes(self):
        return 4 * self.tokens

    def masked_bytes(self):
        return self.task.get("masked", 0)

serve(Fake)
"""


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Returns the benchmark's modules by their names; any rival is the fake one, in this Python."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rivals.environments
    import rivals.kept
    import rivals.measures
    import rivals.processes
    import rivals.prompts
    import rivals.settings
    import rivals.table

    start, requirements = tmp_path / "start.py", tmp_path / "requirements"
    start.write_text(FAKE)
    requirements.mkdir()
    for name in ("fake", "transformers"):
        (requirements / f"{name}.txt").write_text("pytest\n")
    monkeypatch.setattr(rivals.processes, "START", start)
    for module in (rivals.measures, rivals.environments):
        monkeypatch.setattr(module, "REQUIREMENTS", requirements)
    monkeypatch.setattr(rivals.measures, "python_of", lambda rival, folder: Path(sys.executable))
    names = ("environments", "kept", "measures", "processes", "prompts", "settings", "table")
    return SimpleNamespace(**{name: getattr(rivals, name) for name in names}, requirements=requirements)


@pytest.fixture
def bench(rivals: SimpleNamespace, tmp_path: Path, tiny_folder: Path) -> Callable[..., Any]:
    """Returns a function that makes what all settings are measured with; rows go to `rows.jsonl`."""
    from moacompress.core.records import Records, named_numbers

    def make(**given: Any) -> Any:
        records = Records(tmp_path / "rows.jsonl", named_numbers)
        return rivals.measures.Bench(tiny_folder, None, tmp_path / "environments", 1, records, "a machine", **given)

    return make

"""Builds programs of the kernels' core, which needs no torch, with any compiler."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def build_core(setup: Any, command: list[str], flags: list[str], main: str, program: Path) -> None:
    """Builds a program.

    Args:
        setup: the module of setup.py.
        command: the compiler.
        flags: for compiling and linking, beside those of the instruction sets.
        main: name of its own source, in this folder.
        program: what is made; its objects lie beside it.
    """

    def make(source: Path) -> str:
        made = str(program.with_name(f"{source.name}.o"))
        run = [*command, *flags, *setup.instruction_flags(source.name), "-Werror", "-c", str(source), "-o", made]
        built = subprocess.run(run, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr[-3000:]
        return made

    folder = Path(setup.__file__).parent / setup.FOLDER
    sources = [path for path in sorted(folder.glob("*.cpp")) if not path.name.startswith("binding")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(make, [*sources, TESTS / main]))
    linked = [*command, *flags, *objects, "-o", str(program), "-lpthread"]
    done = subprocess.run(linked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

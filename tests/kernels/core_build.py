"""Builds programs of the kernels, which need no torch, with any compiler."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def build_core(setup: Any, command: list[str], flags: list[str], folder: Path, *mains: str) -> None:
    """Builds programs, each under the name of its source without an ending.

    Args:
        setup: the module of setup.py.
        command: the compiler.
        flags: for compiling and linking, beside those of the instruction sets.
        folder: where they and their objects will lie.
        mains: names of their own sources, in this folder; one that begins with "operators" stands in for torch, so the
            operators are in its program.
    """

    def run(*command: str) -> None:
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr[-3000:]

    def compile_source(source: Path) -> str:
        made = str(folder / f"{source.name}.o")
        run(*command, *flags, *setup.instruction_flags(source.name), "-Werror", "-c", str(source), "-o", made)
        return made

    sources = sorted((Path(setup.__file__).parent / setup.FOLDER).glob("*.cpp"))
    if not any(main.startswith("operators") for main in mains):
        sources = [source for source in sources if not source.name.startswith("binding")]
    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(sources, pool.map(compile_source, sources), strict=True))
        own = dict(zip(mains, pool.map(compile_source, (TESTS / main for main in mains)), strict=True))
    core = [made for source, made in objects.items() if not source.name.startswith("binding")]
    for main, made in own.items():
        linked = [*objects.values()] if main.startswith("operators") else core
        run(*command, *flags, *linked, made, "-o", str(folder / Path(main).stem), "-lpthread")

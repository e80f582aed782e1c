"""Builds what a release uploads, and tries it as a stranger would: `make release`.

    python -m tests.release MODEL [--out dist] [--skip-runs]

An sdist and, from it, a wheel with the kernels; on Linux the wheel gets the tag of the oldest C library that it runs with,
without which no index takes it. Each of the two is installed into an environment of its own, which sees nothing of this
checkout, and there the two commands of the README run, with MODEL in the place of the one from a hub, and its Python after.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADING = "## Two commands to a compressed model"
PROVIDED = "libtorch_cpu.so"
"""What a wheel names and does not bring: the torch that is installed has it."""


def readme_block(language: str) -> str:
    """Returns the first block of that language below the README's heading of the two commands."""
    _, found, text = (ROOT / "README.md").read_text("utf-8").partition(HEADING)
    block = re.search(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no heading {HEADING!r}"
    assert block, f"README.md has no {language} below {HEADING!r}"
    return block[1]


def readme_commands(model: str) -> list[list[str]]:
    """Returns the README's two commands, of that model."""
    commands = [shlex.split(line) for line in readme_block("bash").splitlines() if line.strip()]
    assert [words[:2] for words in commands] == [["moacompress", "compress"], ["moacompress", "chat"]]
    commands[0][2] = model
    return commands


def check_tag(wheel: str) -> None:
    """Refuses a wheel that no index takes.

    Raises:
        SystemExit: its tag is for any Linux.
    """
    if re.search(r"-linux_\w+\.whl$", wheel):
        raise SystemExit(
            f"{wheel} does not say which C library it needs, so no index takes it; auditwheel must repair it"
        )


def run(
    command: Sequence[str | Path], *, cwd: Path | None = None, said: str | None = None, path: Path | None = None
) -> str:
    """Runs a command and returns what it wrote to stdout.

    Args:
        command: the program and its arguments.
        cwd: where.
        said: what it reads from stdin.
        path: comes before all other folders of programs.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    print("+", shlex.join(map(str, command)), flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, input=said, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{shlex.join(map(str, command))} failed")
    return done.stdout


def build(out: Path) -> tuple[Path, Path]:
    """Builds the sdist and the wheel into a folder, what was there of other builds removed, and returns both."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("moacompress-*.whl"), *out.glob("moacompress-*.tar.gz")):
        old.unlink()
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as place:
        made = Path(place)
        os.environ["MOACOMPRESS_REQUIRE_EXT"] = "1"
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", made, ROOT])
        (wheel,), (sdist,) = made.glob("*.whl"), made.glob("*.tar.gz")
        if sys.platform == "linux":
            repaired = made / "repaired"
            auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--exclude", PROVIDED]
            run(
                [*auditwheel, "--wheel-dir", repaired, wheel], path=programs
            )  # it calls patchelf, which may be there alone
            (wheel,) = repaired.glob("*.whl")
        check_tag(wheel.name)
        run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist])
        return Path(shutil.move(wheel, out / wheel.name)), Path(shutil.move(sdist, out / sdist.name))


def try_out(package: Path, model: str, runs: bool) -> None:
    """Installs a package into an environment of its own and does there what the README says.

    Raises:
        SystemExit: a command failed, or the kernels do not run.
    """
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        programs = work / "environment" / "bin"
        run([sys.executable, "-m", "venv", work / "environment"])
        run([programs / "pip", "install", "--quiet", "torch>=2.10"])
        run([programs / "pip", "install", "--quiet", f"{package}[demo]"])
        found = json.loads(run([programs / "moacompress", "doctor", "--json"], cwd=work))
        if found["kernel"]["name"] != "cpu":
            raise SystemExit(f"{package.name} does not run its kernels: {found['kernel']}")
        if not runs:
            return
        for command in readme_commands(model):
            print(run(command, cwd=work, path=programs, said="What is the capital of France?\n")[-2000:])
        print(run([programs / "python", "-c", readme_block("python")], cwd=work))


def main() -> None:
    """Builds and tries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or .gguf file, in the place of the README's hub id")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--skip-runs", action="store_true", help="install both and look at the kernels, but run no model"
    )
    given = parser.parse_args()
    model = Path(given.model).resolve()
    if not model.exists():
        parser.error(f"{model} is not there")
    wheel, sdist = build(given.out.resolve())
    for package in (wheel, sdist):
        try_out(package, str(model), not given.skip_runs)
    print(f"{wheel} and {sdist} are ready; RELEASING.md says what comes next")


if __name__ == "__main__":
    main()

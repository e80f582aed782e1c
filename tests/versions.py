"""Runs the tests of the runtime on every tested version of transformers: `make test-versions`; its oldest: `make test-oldest`.

    python -m tests.versions [--again] [MINOR ...]

The minors are those of `moacompress.runtime.compat.versions`, or the given ones. Each but the installed one gets a virtual
environment in `.cache/transformers/MINOR` that has nothing but that transformers, and what it asks for in another version; all
else, torch above all, is taken from the environment that runs this. Every version writes checkpoints before any is tested, and
each reads those of all others. What passed with these sources and packages is noted, and left out the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "transformers"
PASSED = FOLDER / "passed.json"
CHECKPOINTS = FOLDER / "checkpoints"
MATRIX = (
    "tests/runtime/test_versions.py",
    "tests/runtime/test_compat.py",
    "tests/runtime/test_behaviours.py",
    "tests/runtime/test_loading.py",
    "tests/runtime/test_prefixes.py",
    "tests/golden/test_golden.py",
    "tests/calibration/test_answers.py",
    "tests/evaluation/test_scoring.py",
    "tests/evaluation/test_quantized_caches.py",
    "tests/bench/test_sides.py",
    "tests/estimate/test_estimator.py",
)
"""What runs on every version: what hands caches on, what leans on private names, and what reads files of other versions."""
SOURCES = ("moacompress", "search", "calibration", "recipes", "tests", "pyproject.toml", "_moacompress_autoload.py")
ENDS = (".py", ".so", ".toml", ".json", ".yaml", ".safetensors")


def environment(minor: str) -> str:
    """Returns the Python whose transformers is of a minor version; makes its environment where it is not there.

    Raises:
        SystemExit: pip cannot install it.
    """
    from moacompress.runtime.compat import versions

    if versions.minor(versions.installed()) == versions.minor(minor):
        return sys.executable
    folder, done = FOLDER / minor, FOLDER / minor / ".ready"
    python = folder / "bin" / "python"
    shared = os.path.realpath(sysconfig.get_path("purelib"))
    if done.is_file() and done.read_text("utf-8") == shared:
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    own = next((folder / "lib").glob("python*/site-packages"))
    # read after the environment's own packages, so that these come first
    (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", "utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", f"transformers=={minor}.*"]
    if subprocess.run(pip, check=False).returncode:
        sys.exit(f"transformers {minor} cannot be installed into {folder}; see what pip says above, and run this again")
    done.write_text(shared, "utf-8")
    return str(python)


def run(python: str, *arguments: str, **variables: str) -> tuple[int, str]:
    """Returns the exit code and the last line of what a Python of some environment says, which is shown as it comes."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    given = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", **variables}
    process = subprocess.Popen([python, *arguments], cwd=ROOT, env=given, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), last


def version_of(python: str) -> str:
    """Returns the version of transformers that a Python finds."""
    code = "import importlib.metadata as m; print(m.version('transformers'), m.version('torch'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def digest(python: str) -> str:
    """Returns the digest of what a version's tests depend on: all sources and artefacts, transformers and torch."""
    total = hashlib.sha256(version_of(python).encode())
    for path in sorted(_files()):
        total.update(f"{path.relative_to(ROOT)}\n".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _files() -> Iterator[Path]:
    for name in SOURCES:
        path = ROOT / name
        yield from [path] if path.is_file() else (file for file in path.rglob("*") if file.suffix in ENDS)


def passed() -> dict[str, Any]:
    """Returns what passed, by minor: the digest, and what pytest said."""
    found: dict[str, Any] = json.loads(PASSED.read_text("utf-8")) if PASSED.is_file() else {}
    return found


def write_checkpoints(folder: Path) -> None:
    """Writes a checkpoint of every kind of plan, and what it computes; runs under the version that writes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moacompress.runtime import attach
    from tests import plan_kinds

    shutil.rmtree(folder, ignore_errors=True)
    for number, (family, kind) in enumerate((f, k) for f in ("llama", "gemma3_text") for k in plan_kinds.KINDS):
        torch.manual_seed(number)
        size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
        more = {"head_dim": 16, "sliding_window": 80} if family == "gemma3_text" else {}
        config = AutoConfig.for_model(family, vocab_size=160, num_hidden_layers=3, **size, **ends, **more)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        plan = plan_kinds.KINDS[kind](model)
        attach(model, plan)
        ids = torch.randint(3, 160, (1, 120))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        place = folder / f"{family}-{kind}"
        model.save_pretrained(place)
        computed = {
            "ids": ids.tolist(),
            "plan": plan.key(),
            "sequences": out.sequences.tolist(),
            "logits": torch.stack(out.logits, 1)[0, :, :8].tolist(),
        }
        (place / "computed.json").write_text(json.dumps(computed), "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Tests versions one after the other, and prints what came of each; returns 1 where one failed."""
    from moacompress.runtime.compat import versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minors", nargs="*", metavar="MINOR", help=f"of {', '.join(versions.TESTED)}; all by default")
    parser.add_argument("--oldest", action="store_true", help="the oldest alone")
    parser.add_argument("--again", action="store_true", help="what passed as it is, too")
    parser.add_argument("--jobs", default="0", help="test files at a time; 0: one")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.write:
        write_checkpoints(given.write)
        return 0
    unknown = sorted({*given.minors} - {*versions.TESTED})
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(versions.TESTED)}")
    minors = given.minors or (versions.TESTED[:1] if given.oldest else versions.TESTED)
    here = ".".join(map(str, versions.INSTALLED))
    pythons = {minor: environment(minor) for minor in dict.fromkeys((*minors, here))}
    digests = {minor: digest(pythons[minor]) for minor in minors}
    notes = passed()
    done = {minor for minor in minors if notes.get(minor, {}).get("digest") == digests[minor] and not given.again}
    results = {minor: f"{notes[minor]['said']}, with these sources before" for minor in minors if minor in done}
    wanted, failed = [minor for minor in minors if minor not in done], False
    for minor in pythons if wanted else ():
        code, _ = run(pythons[minor], "-m", "tests.versions", "--write", str(CHECKPOINTS / minor))
        if code:
            sys.exit(f"under transformers {minor} no checkpoints could be written; see above")
    for minor in wanted:
        begun = time.monotonic()
        print(f"transformers {version_of(pythons[minor]).split()[0]}:", flush=True)
        tests = ["-m", "pytest", "--quiet", "-m", "not heavy and not real", "-p", "no:cacheprovider", *MATRIX]
        split = ["--numprocesses", given.jobs, "--dist", "worksteal"]
        code, said = run(pythons[minor], *tests, *split, MOACOMPRESS_TEST_CHECKPOINTS=str(CHECKPOINTS))
        said = re.sub(r" in [\d.]+s.*", "", said.strip("= "))
        results[minor] = f"{said}, {time.monotonic() - begun:.0f} s"
        failed = failed or bool(code)
        if not code:
            notes[minor] = {"digest": digests[minor], "said": said}
            PASSED.write_text(json.dumps(notes, indent=2) + "\n", "utf-8")
    print()
    for minor in minors:
        print(f"transformers {minor}: {results[minor]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

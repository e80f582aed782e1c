"""Runs transformers' own generation and common tests on tiny models under plans of every kind.

    python tests/peers/run.py DIR [--kinds full,windows] [--families llama] [-- ARGUMENTS OF PYTEST]

DIR is a checkout of transformers, best of the version that is installed; its sdist is not enough, as that has no
`tests/generation`. What fails for the dense model too is left out: a test of another version, or of a package that is not
there. Of the rest everything has to pass, but for the refusals that `known.py` names, each with its exact sentence. Exits with
1 otherwise, and with 2 where DIR has no such tests.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT)]

from tests.peers.known import OTHERWISE, REFUSED  # noqa: E402  (the path comes first)
from tests.plan_kinds import KINDS  # noqa: E402
from tests.refusals import is_refusal  # noqa: E402

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_oss")
NEEDED = ("tests/generation/test_utils.py", "tests/test_modeling_common.py", "tests/causal_lm_tester.py")


def results_of(checkout: Path, kind: str, files: Sequence[Path], more: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns what became of every test under plans of a kind, by its id; `dense` is without any."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        path = os.pathsep.join([str(HERE), str(checkout), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "PEERS_KIND": kind, "PEERS_RESULTS": str(results)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "-c", os.devnull]
        command += ["--rootdir", str(checkout), "--tb=no", "--continue-on-collection-errors", *map(str, files), *more]
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        rows = [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []
    if not rows:
        print(done.stdout[-3000:], file=sys.stderr)
        print(f"error: no test of {kind} models was run; pytest ended with {done.returncode}", file=sys.stderr)
        raise SystemExit(2)
    found: dict[str, dict[str, Any]] = {}
    for row in rows:  # a test has a row for each of its parts: one that failed counts
        if found.get(row["test"], row)["outcome"] != "failed" or row["outcome"] == "failed":
            found[row["test"]] = row
    return found


def refusal(row: Mapping[str, Any]) -> str | None:
    """Returns what known reason ended a test; None where something else did, or the test is not listed with it."""
    if row["name"] in OTHERWISE and fnmatch.filter(row["messages"], OTHERWISE[row["name"]][0]):
        return "not a dense model"
    found = {name for message in row["messages"] if (name := is_refusal(message)) is not None}
    listed = (name for name in found if any(fnmatch.fnmatch(row["name"], pattern) for pattern in REFUSED[name]))
    return next(listed, None)


def main() -> int:
    """Runs the tests and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="DIR", type=Path)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--families", default=",".join(FAMILIES))
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, more = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    checkout = given.checkout.resolve()
    missing = [name for name in NEEDED if not (checkout / name).is_file()]
    if missing:
        print(
            f"error: {given.checkout} has no {missing[0]}; give a checkout of transformers' repository, not its sdist",
            file=sys.stderr,
        )
        return 2
    families = given.families.split(",")
    files = [checkout / f"tests/models/{name}/test_modeling_{name}.py" for name in families]
    files = [file for file in files if file.is_file()]
    dense = results_of(checkout, "dense", files, more)
    if not any(row["outcome"] == "passed" for row in dense.values()):
        print(f"error: no test passes without a plan: {next(iter(dense.values()))['messages'][:1]}", file=sys.stderr)
        return 2
    for file in files:
        if not any(str(file.relative_to(checkout)) in test for test in dense):
            print(f"warning: {file.relative_to(checkout)} has no test that can be run here", file=sys.stderr)
    broken = {test for test, row in dense.items() if row["outcome"] == "failed"}
    print(f"dense: {_counted(dense)}; {len(broken)} fail without a plan and are left out", flush=True)
    faults = 0
    for kind in given.kinds.split(","):
        found = results_of(checkout, kind, files, more)
        failed = [row for test, row in found.items() if row["outcome"] == "failed" and test not in broken]
        refused = Counter(name for row in failed if (name := refusal(row)) is not None)
        wrong = [row for row in failed if refusal(row) is None]
        faults += len(wrong)
        print(
            f"{kind}: {_counted(found)}; refused, as known: {dict(refused) or 'none'}; faults: {len(wrong)}", flush=True
        )
        for row in wrong:
            print(f"  {row['test']}: {row['messages'][0][:300] if row['messages'] else 'no message'}")
    return 1 if faults else 0


def _counted(rows: Mapping[str, Mapping[str, Any]]) -> str:
    counts = Counter(row["outcome"] for row in rows.values())
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


if __name__ == "__main__":
    raise SystemExit(main())

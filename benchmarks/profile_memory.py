"""Peak memory of profiling one sample, by length: every length in a process of its own.

    python benchmarks/profile_memory.py path/to/model --lengths 1k,2k,4k --json

Counted is what the system says the process had in memory at most (RSS), Python and libraries included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from moacompress.budget import parse_lengths
from moacompress.memory import peak_rss, rss

TARGETS = 32
"""Answer tokens of the sample."""


def measure(model: str, length: int) -> dict[str, float]:
    """Profiles one sample of random tokens in this process.

    Args:
        model: MODEL.
        length: of the sample, tokens.

    Returns:
        Length in tokens, seconds of the pass, bytes in memory before it, and the most bytes of the process.
    """
    import numpy as np

    from moacompress.calibration.influence import RuleTable
    from moacompress.calibration.profiler import sample_statistics
    from moacompress.calibration.samples import Sample
    from moacompress.models import load_source
    from moacompress.recipe import ProfileRecipe
    from moacompress.search.space import candidate_rules

    source, chosen = load_source(model), ProfileRecipe()
    table = RuleTable.of(candidate_rules(length, chosen.sinks, chosen.min_window), chosen.min_window)
    ids = np.random.default_rng(0).integers(0, len(source.tokenizer), length)
    sample = Sample(ids, np.arange(length) >= length - TARGETS, "random", length)
    before, begin = rss(), time.perf_counter()
    sample_statistics(source.model, source.shape, table, sample, chosen, None, 0, 0)
    seconds = round(time.perf_counter() - begin, 3)
    return {"length": length, "profile_s": seconds, "before_bytes": before, "peak_bytes": peak_rss()}


def run_alone(model: str, length: int) -> dict[str, float]:
    """Returns what `measure` does, from a new process: its peak is not that of another length."""
    command = [sys.executable, str(Path(__file__).resolve()), model, "--lengths", str(length), "--here"]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return found


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="hub id, folder or .gguf file")
    parser.add_argument("--lengths", default="1k,2k,4k", help="tokens, with commas between")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    lengths = parse_lengths(chosen.lengths)
    if chosen.here:
        print(json.dumps(measure(chosen.model, lengths[0])))
        return
    runs = []
    for length in lengths:
        runs.append(run_alone(chosen.model, length))
        if not chosen.json:
            peak, before = (runs[-1][name] / 2**20 for name in ("peak_bytes", "before_bytes"))
            print(f"{length:>7,} tokens: {peak:7,.0f} MiB at most, {before:,.0f} before the pass", flush=True)
    if chosen.json:
        print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()

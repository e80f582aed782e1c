"""Other libraries beside a plan, as they are: what they still answer, how fast they are, and the memory that they take.

    python benchmarks/compare_rivals.py path/to/dense --ours gates=eighth-gates/ --gguf SmolLM2-135M-Instruct.Q4_1.gguf \
        --rivals transformers,llamacpp,kvpress:snapkv-25,moacompress --text .cache/sotu -o rows.jsonl
    python benchmarks/compare_rivals.py --table rows.jsonl

Each rival runs in an environment of its own with pinned versions, which is made under `--environments` when it is first needed.
All answer the same prompts greedily, those of `moacompress eval`; time and memory are of random tokens, in turns. Each row is
in the file once it is measured, so that the same command resumes a stopped run; another one adds to it. `--list` says what
there is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from harness import options
from rivals.kept import measure_kept
from rivals.measures import Bench, measure_quality, measure_speed
from rivals.prompts import SEEN, UNSEEN, make_prompts, stop_tokens_of
from rivals.settings import SETTINGS, chosen
from rivals.table import read_rows, tables

from moacompress.core.errors import MoaCompressError
from moacompress.core.machine import processor_name
from moacompress.core.records import Records, named_numbers
from moacompress.rules.budget import parse_lengths

MEASURES = ("quality", "speed", "kept")


def machine() -> str:
    """Returns the processor and its number of cores, in words."""
    return f"{processor_name()}, {os.cpu_count()} cores"


def parser() -> argparse.ArgumentParser:
    """Returns the options."""
    found = options(__doc__)
    found.add_argument("dense", type=Path, nargs="?", help="folder of the model as it is, in bfloat16")
    found.add_argument(
        "--ours", action="append", default=[], metavar="NAME=FOLDER", help="a compressed checkpoint of it"
    )
    found.add_argument("--gguf", type=Path, help="the same model as a .gguf file, for llama.cpp")
    found.add_argument("--rivals", default="transformers,moacompress", help="comma-separated: rivals, or rival:setting")
    found.add_argument("--measure", default="quality,speed", help=f"comma-separated: {', '.join(MEASURES)}")
    found.add_argument("--tasks", default="niah-single-2,niah-single-3,niah-multikey-1", help="of moacompress eval")
    found.add_argument("--lengths", type=parse_lengths, default=parse_lengths("1k"), help="of prompts, and for speed")
    found.add_argument("--prompts", type=int, default=12, help="of each task and length")
    found.add_argument("--questions", default=f"{SEEN},{UNSEEN}", help="seen or unseen when a prompt is evicted from")
    found.add_argument("--text", type=Path, help="file or folder of long prose")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--steps", type=int, default=24, help="of a turn")
    found.add_argument("--turns", type=int, default=3)
    found.add_argument("--seconds", type=float, help="begin nothing new after so many")
    found.add_argument("--environments", type=Path, default=Path(".cache/rivals"))
    found.add_argument("-o", "--out", type=Path, help="file of rows (.jsonl), to which this run adds")
    found.add_argument("--table", type=Path, metavar="ROWS", help="print the tables of this file and measure nothing")
    found.add_argument("--list", action="store_true", help="print rivals and settings and measure nothing")
    return found


def run(given: argparse.Namespace) -> int:
    """Measures what is missing, and prints the tables.

    Returns:
        1 where something could not be measured.
    """
    settings = chosen(given.rivals.split(","), dict(pair.split("=", 1) for pair in given.ours))
    records = Records(given.out, named_numbers)
    deadline = None if given.seconds is None else time.monotonic() + given.seconds
    bench = Bench(given.dense, given.gguf, given.environments, given.threads, records, machine(), deadline)
    failures: dict[str, str] = {}
    measures = given.measure.split(",")
    if {"quality", "kept"} & set(measures):
        from transformers import AutoTokenizer

        from moacompress.evaluation.tasks.registry import Resources
        from moacompress.prompts.pools import Prose

        tokenizer, stop = AutoTokenizer.from_pretrained(given.dense), stop_tokens_of(given.dense)
        texts = Resources(prose=None if given.text is None else Prose.load(given.text))
        prompts = make_prompts(tokenizer, given.tasks.split(","), given.lengths, given.prompts, texts)
        questions = given.questions.split(",")
        if "quality" in measures:
            failures |= measure_quality(bench, settings, prompts, tokenizer, stop, questions)
        if "kept" in measures:
            failures |= measure_kept(bench, settings, prompts, questions)
    if "speed" in measures:
        failures |= measure_speed(bench, settings, given.lengths, given.steps, given.turns)
    print(tables(read_rows(given.out)))
    for name in failures:
        print(f"not measured: {name}", file=sys.stderr)
    return bool(failures)


def main() -> None:
    """Reads the options, and runs."""
    known = parser()
    given = known.parse_args()
    if given.table is not None:
        if not given.table.exists():
            known.error(f"--table {given.table}: no such file")
        print(tables(read_rows(given.table)))
    elif given.list:
        print("\n".join(f"{setting.full_name}  {setting.note}".rstrip() for setting in SETTINGS))
    elif given.dense is None or given.out is None:
        known.error("the dense model and a file of rows (-o) are needed")
    elif not set(given.measure.split(",")) <= set(MEASURES) or not set(given.questions.split(",")) <= {SEEN, UNSEEN}:
        known.error(f"--measure takes {', '.join(MEASURES)}, and --questions {SEEN} and {UNSEEN}")
    elif not all("=" in pair for pair in given.ours):
        known.error("--ours takes NAME=FOLDER")
    else:
        try:
            sys.exit(run(given))
        except MoaCompressError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()

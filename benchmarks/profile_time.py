"""Time and peak memory of profiling one sample, by length, beside a plain pass: every length in a process of its own.

    python benchmarks/profile_time.py path/to/model --lengths 1k,2k,4k --json

`profile_s` is one forward and one backward pass of a sample as the profiler makes them, at its default grid of rules; with
`--gates` also of those that keep tokens by a gate, which has random weights here.
`sdpa_s` is a forward and a backward pass of the same tokens through transformers' SDPA attention, from the cross-entropy of
the same answer tokens down to the embeddings. No weight asks for a gradient in either. Both are medians of passes that take
turns. `peak_bytes` is what the system says the process had in memory at most (RSS) when the profiler had run and nothing else
had, Python, libraries and weights included; `before_bytes` is what it had before.

On a busy machine `--cpu-time` counts the time of one thread on its core instead of wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from harness import options, random_gates, run_alone  # beside this script

from moacompress.core.memory import peak_rss, rss
from moacompress.rules.budget import parse_lengths
from moacompress.rules.rule import SINKS

TARGETS = 32
"""Answer tokens of the sample."""


def measure(model: str, dtype: str, length: int, times: int, cpu_time: bool, gated: bool) -> dict[str, Any]:
    """Profiles a sample of so many random tokens in this process, and runs it plainly, each `times` times.

    Returns:
        Length in tokens, kernel, and what the module's docstring says.
    """
    import numpy as np
    import torch

    from moacompress.calibration.data.samples import Sample
    from moacompress.calibration.profile.passes import frozen
    from moacompress.calibration.profile.sample_statistics import sample_statistics
    from moacompress.kernels import dispatch
    from moacompress.models.source import load_source
    from moacompress.recipe_sections import ProfileRecipe
    from moacompress.rules.candidates import candidate_rules, gated_rules
    from moacompress.rules.rule_table import RuleTable

    if cpu_time:
        torch.set_num_threads(1)
    source, chosen = load_source(model, dtype=dtype), ProfileRecipe(draws=1)
    network = source.model
    grid = length, SINKS, chosen.min_window
    rules, gates, generator = candidate_rules(*grid), None, np.random.default_rng(0)
    ids = generator.integers(0, len(source.tokenizer), length)
    if gated:
        rules += gated_rules(*grid)
        gates = random_gates(source.shape, network.config.get_text_config(decoder=True).hidden_size)
    table = RuleTable.of(rules, chosen.min_window)
    sample = Sample(ids, np.arange(length) >= length - TARGETS, "random", length)
    tokens = torch.from_numpy(ids)
    rows = torch.arange(length - TARGETS - 1, length - 1)

    def profiled() -> None:
        sample_statistics(network, source.shape, table, sample, chosen, 0, 0, gates)

    def plain() -> None:
        before = network.config._attn_implementation
        network.set_attn_implementation("sdpa")
        try:
            with frozen(network), torch.enable_grad():
                embeddings = network.get_input_embeddings()(tokens[None]).detach().requires_grad_()
                logits = network(inputs_embeds=embeddings, use_cache=False, logits_to_keep=rows).logits[0]
                loss = torch.nn.functional.cross_entropy(logits.float(), tokens[rows + 1])
                torch.autograd.grad(loss, embeddings)
        finally:
            network.set_attn_implementation(before)

    clock = time.thread_time if cpu_time else time.perf_counter

    def timed(run: Callable[[], None]) -> float:
        begin = clock()
        run()
        return clock() - begin

    before = rss()
    seconds = [[timed(profiled)], []]
    peak = peak_rss()
    seconds[1].append(timed(plain))
    for _ in range(times - 1):
        seconds[0].append(timed(profiled))
        seconds[1].append(timed(plain))
    profile_s, sdpa_s = (round(statistics.median(found), 3) for found in seconds)
    return {
        "length": length,
        "dtype": dtype,
        "rules": len(rules),
        "profile_s": profile_s,
        "sdpa_s": sdpa_s,
        "before_bytes": before,
        "peak_bytes": peak,
        "kernel": dispatch.chosen().name,
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
    }


def main() -> None:
    """Runs the command line."""
    parser = options(__doc__)
    parser.add_argument("model", metavar="MODEL", help="hub id, folder or .gguf file")
    parser.add_argument("--lengths", default="1k,2k,4k", help="tokens, with commas between")
    parser.add_argument("--dtype", default="float32", help="what the model computes in")
    parser.add_argument("--times", type=int, default=3, help="passes of each kind that are timed")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its time on the core: for a busy machine")
    parser.add_argument("--gates", action="store_true", help="also rules that keep tokens by a gate")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    lengths, how = parse_lengths(chosen.lengths), (chosen.times, chosen.cpu_time, chosen.gates)
    if chosen.here:
        print(json.dumps(measure(chosen.model, chosen.dtype, lengths[0], *how)))
        return
    runs = []
    for length in lengths:
        more = [f"--{name}" for name, asked in (("cpu-time", chosen.cpu_time), ("gates", chosen.gates)) if asked]
        command = (chosen.model, "--dtype", chosen.dtype, "--lengths", length, "--times", chosen.times, "--here", *more)
        runs.append(run_alone(__file__, *command))
        if not chosen.json:
            run = runs[-1]
            print(
                f"{length:>7,} tokens: {run['profile_s']:.2f} s, plainly {run['sdpa_s']:.2f} s "
                f"({run['profile_s'] / run['sdpa_s']:.2f} times); {run['peak_bytes'] / 2**20:,.0f} MiB at most, "
                f"{run['before_bytes'] / 2**20:,.0f} before the pass",
                flush=True,
            )
    if chosen.json:
        print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()

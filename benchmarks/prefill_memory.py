"""Peak memory of a prefill, by chunk: every number in a process of its own.

    python benchmarks/prefill_memory.py --length 16k --chunks 256,1k,4k,16k --json

A random Llama of 24 layers whose weights are small beside its cache, under a plan that keeps an eighth, beside the same model
dense. Counted is what the process had in memory at most, less what it had before the prefill.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from harness import options, run_alone  # beside this script

from moacompress.core.memory import peak_rss, rss
from moacompress.rules.budget import parse_lengths

LAYERS, KV_HEADS, HEAD_DIM = 24, 4, 64


def measure(length: int, chunk: int, compressed: bool) -> dict[str, Any]:
    """Prefills random tokens in this process, under the plan or dense with transformers' own cache.

    Returns:
        `length`, `chunk`, `plan`, `peak_bytes` above what was there before, and `cache_bytes` at the end.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moacompress.models.source import model_shape
    from moacompress.rules.plan import Plan
    from moacompress.rules.rule import Rule
    from moacompress.runtime import attach
    from moacompress.runtime.compat.alternates import cache_argument, returned_cache

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=KV_HEADS * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config).eval()
    if compressed:
        attach(model, Plan.uniform(model_shape(model), Rule(16, 0, 112)))
    ids = torch.randint(3, 256, (1, length))
    cache: Any = None
    with torch.inference_mode():
        model(ids[:, :32], logits_to_keep=1)  # what torch takes once
        before = rss()
        for at in range(0, length, chunk):
            out = model(ids[:, at : at + chunk], use_cache=True, logits_to_keep=1, **cache_argument(cache))
            cache = returned_cache(out)
    tensors = [t for layer in cache.layers for t in (layer.tensors if compressed else (layer.keys, layer.values))]
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    return {
        "length": length,
        "chunk": chunk,
        "plan": compressed,
        "peak_bytes": max(peak_rss() - before, 0),
        "cache_bytes": held,
    }


def main() -> None:
    """Runs the command line."""
    parser = options(__doc__)
    parser.add_argument("--length", default="16k", help="tokens")
    parser.add_argument("--chunks", default="256,1k,4k,16k", help="tokens of a forward, with commas between")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    (length,), chunks = parse_lengths(chosen.length), parse_lengths(chosen.chunks)
    if chosen.here:
        print(json.dumps(measure(length, chunks[0], not chosen.dense)))
        return
    runs = []
    for chunk in chunks:
        for compressed in (True, False):
            more = [] if compressed else ["--dense"]
            runs.append(run_alone(__file__, "--length", length, "--chunks", chunk, "--here", *more))
            if not chosen.json:
                peak, held = (runs[-1][name] / 2**20 for name in ("peak_bytes", "cache_bytes"))
                name = "plan " if compressed else "dense"
                print(f"chunks of {chunk:>6,}, {name}: {peak:7,.0f} MiB at most, cache {held:7,.0f}", flush=True)
    if chosen.json:
        print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()

"""What ways of rounding keep at the same bytes, where gates select the tokens: fewer bits buy more tokens.

    python benchmarks/equal_bytes.py PROFILE --budgets 12.5%,6.25%,3.125% --samples 24

PROFILE has gates. Every KV head keeps the first 4 tokens, a small window, and of the rest as many by its gate's score as its
bytes allow: a way with fewer bits keeps more. First tokens that are left as they are count at 16 bits. Ways are those of
`benchmarks/formats.py`, which see; `kl`, `kept` and `ratio` are as there, the ratio to the first way that is named.
"""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import Any

import torch
from formats import SINKS, Way, channel_constants, ratio, ways  # beside this script
from torch import Tensor
from transformers import AttentionInterface

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import answer_logits
from moacompress.calibration.profile.store import Profile
from moacompress.core.statistics import estimate_text
from moacompress.models.kl import kl_divergence
from moacompress.rules.budget import Budget, parse_length
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach
from moacompress.runtime.ready_model import load_for

WAYS = "8/4; 8/4 centred keys; 4/4; 4/4 centred keys, native sinks"
WINDOWS = {0.05: 64, 0.0: 32}
"""Window in tokens by the smallest share of bytes that it is for."""


def tokens_of(way: Way, name: str, share: float, n: int, dim: int) -> int:
    """Returns how many tokens a KV head keeps for a share of the dense bytes at `n` tokens."""
    tokens = share * n / way.share(dim)
    return int(tokens - (SINKS * (1 / way.share(dim) - 1) if "native sinks" in name else 0))


def plan_of(profile: Profile, tokens: int, n: int, share: float) -> Plan:
    """Returns the plan by which every KV head keeps so many tokens, native ones: what it is fed is rounded already."""
    window = next(size for least, size in WINDOWS.items() if share > least)
    rule = Rule(SINKS, window, 0, select_alpha=tokens - SINKS - window)
    return profile.plan([[rule] * profile.shape.kv_heads for _ in range(profile.shape.layers)])


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", metavar="PROFILE", help="folder of a profile with gates")
    parser.add_argument("--budgets", default="12.5%,6.25%,3.125%", help="with commas")
    parser.add_argument(
        "--ways", default=WAYS, help="names of the ways, with semicolons between; the first is compared with"
    )
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", default="1k", help="tokens of a sample")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    given = parser.parse_args()
    profile, n = Profile.load(given.profile), parse_length(given.length)
    if profile.gates is None:
        parser.error("PROFILE has no gates; make one with moacompress profile --gates")
    model: Any = load_for(profile.recipe.override(dtype="float32"), profile.source).model

    def answers(samples: list[Sample]) -> list[Sample]:
        return [sample for sample in samples if sample.kind == "answer" and sample.length == n]

    samples, others = answers(profile.validation)[: given.samples], answers(profile.calibration_samples())[:4]
    inner: Any = AttentionInterface()["moacompress"]
    now: list[Way] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        layer = module.layer_idx
        return inner(module, query, now[-1].keys(key, layer), now[-1].values(value, layer), mask, **rest)

    AttentionInterface.register("moacompress", attention)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        of_model: Any = SimpleNamespace(model=model)
        known = ways(*channel_constants(of_model, others))
        dense = [answer_logits(model, sample) for sample in samples]
        for text in given.budgets.split(","):
            share = Budget.parse(text).share
            assert share is not None
            first: list[float] = []
            for name in (name.strip() for name in given.ways.split(";")):
                now.append(known[name])
                tokens = tokens_of(known[name], name, share, n, profile.shape.head_dim)
                attach(model, plan_of(profile, tokens, n, share).in_dtype("float32"))
                found = [answer_logits(model, sample) for sample in samples]
                detach(model)
                kls = [kl_divergence(mine, other) for mine, other in zip(dense, found, strict=True)]
                kept = [torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in zip(dense, found, strict=True)]
                row = {"budget": text, "way": name, "tokens": tokens, "kl": sum(kls) / len(kls)}
                rows.append(row | {"kept": sum(kept) / len(kept), "ratio": ratio(kls, first) if first else None})
                first = first or kls
                if not given.json:
                    print(shown(rows[-1]), flush=True)
    if given.json:
        print(json.dumps({"profile": given.profile, "length": n, "samples": len(samples), "rows": rows}))


def shown(row: dict[str, Any]) -> str:
    """Returns a row for people."""
    line = (
        f"{row['budget']:>7} {row['way']:<32} {row['tokens']:5} tokens  {row['kl']:9.4f} nats  {row['kept']:.2f} kept"
    )
    if row["ratio"] is not None:
        line += f"  {estimate_text(row['ratio']['value'], row['ratio']['ci95'])} of the first"
    return line


if __name__ == "__main__":
    main()

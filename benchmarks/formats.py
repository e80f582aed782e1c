"""What rounding keys and values costs a model, one way of rounding after the other, with the bytes of each.

    python benchmarks/formats.py MODEL --samples 16 --length 1k --json

Every KV head keeps every token. Keys are rounded after their rotary embedding, in prefill too, and what a query attends to is
what was rounded: by torch, as `docs/formats.md` says, without kernels. `kl` is the mean over samples of KL(dense || rounded) at
the dense model's own answer tokens, nats; `kept` the share of samples whose answer tokens all stay the likeliest; `bytes` the
share of a 16-bit cache, scales and zero points counted. Beside the formats are the ways that were tried and are none: without a
rotation, with a scale for every 32 channels, with 6, 5, 3 or 2 bits, with keys less each channel's mean on other samples or by
its size, and with the first tokens left as they are. `ratio` is a way's KL to that of the format of its bits, sample by
sample: the geometric mean and its 95% interval (Student's t). The model runs in the dtype that is asked for; audits of small
KLs want float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moacompress.core.statistics import estimate_row, estimate_text, exponential_mean
from moacompress.kernels.reference.codes import decode, encode, rotated

if TYPE_CHECKING:
    from moacompress.calibration.data.samples import Sample
    from moacompress.models.source import SourceModel

NAME = "rounded"
SINKS = 4
LEAST = 1e-6
"""Nats added to a KL before its logarithm."""
Rounding = Callable[[torch.Tensor, int], torch.Tensor]
"""Takes keys or values, `[1, kv_heads, tokens, dim]`, and the layer; returns what they are rounded to."""


@dataclass(frozen=True)
class Way:
    """A way to keep keys and values.

    Attributes:
        keys: rounds keys.
        values: rounds values.
        bits: that a key's and a value's number take.
        group: channels that share a scale and a zero point, 0 for all of a vector.
    """

    keys: Rounding
    values: Rounding
    bits: tuple[float, float]
    group: int = 0

    def share(self, dim: int) -> float:
        """Returns the bytes as a share of 16 bits a number."""
        extra = [32 / (self.group or dim) if bits < 16 else 0 for bits in self.bits]
        return (sum(self.bits) + sum(extra)) / 32


_way: ContextVar[Way] = ContextVar("way")


def _attention(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any, **rest: Any) -> Any:
    way = _way.get()
    return sdpa_attention_forward(
        module, query, way.keys(key, module.layer_idx), way.values(value, module.layer_idx), mask, **rest
    )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def native(x: torch.Tensor, layer: int) -> torch.Tensor:
    """Leaves all as it is."""
    return x


def rounding(bits: int, *, rotate: bool = True, group: int = 0, sinks: int = 0) -> Rounding:
    """Returns a rounding to codes of so many bits.

    Args:
        bits: of a code.
        rotate: whether a rotation comes before.
        group: channels that share a scale, 0 for all; the rotation is over them.
        sinks: first tokens that stay as they are.
    """

    def apply(x: torch.Tensor, layer: int) -> torch.Tensor:
        parts = x.unflatten(-1, (-1, group)) if group else x
        given = parts if rotate else rotated(parts)  # `encode` rotates, and a rotation undoes itself
        kept = decode(encode(given, bits))
        back = (rotated(kept) if rotate else kept).reshape(x.shape).to(x.dtype)
        return torch.cat((x[:, :, :sinks], back[:, :, sinks:]), 2) if sinks else back

    return apply


def centred(by: Rounding, means: dict[int, torch.Tensor]) -> Rounding:
    """Returns a rounding of keys less their channels' means, `[1, kv_heads, 1, dim]` of each layer."""
    return lambda x, layer: by(x - means[layer].to(x.dtype), layer) + means[layer].to(x.dtype)


def scaled(by: Rounding, sizes: dict[int, torch.Tensor]) -> Rounding:
    """Returns a rounding of keys by their channels' sizes, `[1, kv_heads, 1, dim]` of each layer."""
    return lambda x, layer: by(x / sizes[layer].to(x.dtype), layer) * sizes[layer].to(x.dtype)


def channel_constants(source: SourceModel, samples: list[Sample]) -> tuple[dict[int, torch.Tensor], ...]:
    """Returns the mean and the root mean square of every channel of the keys, by layer, `[1, kv_heads, 1, dim]` each."""
    sums: dict[int, list[torch.Tensor]] = {}

    def note(x: torch.Tensor, layer: int) -> torch.Tensor:
        wide = x.double()
        found = sums.setdefault(layer, [torch.zeros((), dtype=torch.float64)] * 3)
        found[0] = found[0] + wide.sum(2, keepdim=True)
        found[1] = found[1] + wide.square().sum(2, keepdim=True)
        found[2] = found[2] + x.shape[2]
        return x

    for sample in samples:
        logits_under(source, Way(note, native, (16, 16)), sample)
    means = {layer: total / count for layer, (total, _, count) in sums.items()}
    return means, {layer: (square / count).sqrt() for layer, (_, square, count) in sums.items()}


def both(by: Rounding, bits: int, group: int = 0) -> Way:
    """Returns keys and values rounded alike."""
    return Way(by, by, (bits, bits), group)


def ways(means: dict[int, torch.Tensor], sizes: dict[int, torch.Tensor]) -> dict[str, Way]:
    """Returns all that is tried, by name: keys, values, and what is special."""
    four, eight = rounding(4), rounding(8)
    found = {
        "8/8": Way(eight, eight, (8, 8)),
        "8/4": Way(eight, four, (8, 4)),
        "4/4": Way(four, four, (4, 4)),
        "8/8 not rotated": both(rounding(8, rotate=False), 8),
        "8/4 not rotated": Way(rounding(8, rotate=False), rounding(4, rotate=False), (8, 4)),
        "4/4 not rotated": both(rounding(4, rotate=False), 4),
        "8/4 groups of 32": Way(rounding(8, group=32), rounding(4, group=32), (8, 4), 32),
        "4/4 groups of 32": both(rounding(4, group=32), 4, 32),
        "4/4 groups of 32, not rotated": both(rounding(4, group=32, rotate=False), 4, 32),
        "6/4": Way(rounding(6), four, (6, 4)),
        "5/4": Way(rounding(5), four, (5, 4)),
        "8/3": Way(eight, rounding(3), (8, 3)),
        "8/2": Way(eight, rounding(2), (8, 2)),
        "8/4 centred keys": Way(centred(eight, means), four, (8, 4)),
        "5/4 centred keys": Way(centred(rounding(5), means), four, (5, 4)),
        "4/4 centred keys": Way(centred(four, means), four, (4, 4)),
        "3/4 centred keys": Way(centred(rounding(3), means), four, (3, 4)),
        "4/4 centred keys, not rotated": Way(centred(rounding(4, rotate=False), means), four, (4, 4)),
        "4/4 centred keys, groups of 32": Way(centred(rounding(4, group=32), means), rounding(4, group=32), (4, 4), 32),
        "4/4 centred keys, native sinks": Way(
            centred(rounding(4, sinks=SINKS), means), rounding(4, sinks=SINKS), (4, 4)
        ),
        "4/4 scaled keys": Way(scaled(four, sizes), four, (4, 4)),
        "4/4 native sinks": both(rounding(4, sinks=SINKS), 4),
        "8/4 native sinks": Way(rounding(8, sinks=SINKS), rounding(4, sinks=SINKS), (8, 4)),
        "4/16": Way(four, native, (4, 16)),
        "16/4": Way(native, four, (16, 4)),
    }
    return found


def logits_under(source: SourceModel, way: Way, sample: Sample) -> torch.Tensor:
    """Returns the logits that predict a sample's answer tokens, `[answer, vocabulary]`."""
    from moacompress.calibration.profile.passes import answer_logits

    config: Any = source.model.config
    before = config._attn_implementation
    token = _way.set(way)
    config._attn_implementation = NAME
    try:
        return answer_logits(source.model, sample)
    finally:
        config._attn_implementation = before
        _way.reset(token)


def ratio(kls: list[float], others: list[float]) -> dict[str, Any]:
    """Returns the geometric mean of the ratios of KLs, sample by sample, and its 95% interval."""
    logs = [math.log((mine + LEAST) / (other + LEAST)) for mine, other in zip(kls, others, strict=True)]
    return estimate_row(*exponential_mean(logs))


def measure(
    source: SourceModel, samples: list[Sample], calibration: list[Sample], wanted: list[str]
) -> list[dict[str, Any]]:
    """Returns a row of every way.

    Args:
        source: the dense model.
        samples: where KL is measured.
        calibration: others, for the channels' constants.
        wanted: names of ways; all if there are none. What they are compared with is measured in any case.
    """
    from moacompress.models.kl import kl_divergence

    dense = [logits_under(source, Way(native, native, (16, 16)), sample) for sample in samples]
    rows, kls_of = [], {}
    for name, way in ways(*channel_constants(source, calibration)).items():
        bits = name.split()[0]
        if wanted and name not in wanted and name not in [other.split()[0] for other in wanted]:
            continue
        found = [logits_under(source, way, sample) for sample in samples]
        kls = [kl_divergence(mine, other) for mine, other in zip(dense, found, strict=True)]
        kept = [torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in zip(dense, found, strict=True)]
        row = {"way": name, "bytes": way.share(source.shape.head_dim)}
        row |= {"kl": sum(kls) / len(kls), "kept": sum(kept) / len(kept), "samples": len(kept)}
        kls_of[name] = kls
        rows.append(row | {"ratio": ratio(kls, kls_of[bits]) if name != bits else None})
    return rows


def main() -> None:
    """Prints the rows."""
    from moacompress.calibration.data.sample_sources import build_samples
    from moacompress.models.source import load_source
    from moacompress.recipe import Recipe
    from moacompress.rules.budget import parse_length

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="hub id, folder or .gguf file")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", default="1k", help="tokens of a sample")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ways", default="", help="names of the ways, with semicolons between; all if left out")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    given = parser.parse_args()
    source = load_source(given.model, dtype=given.dtype)
    sources = [{"generator": "needle"}, {"generator": "key-value"}]
    calibration = {"sources": sources, "lengths": [parse_length(given.length)], "samples": 4, "longer_samples": 0}
    recipe = Recipe.from_dict({"calibration": calibration | {"validation_samples": given.samples}})
    others, samples = (build_samples(source, recipe, split) for split in ("calibration", "validation"))
    with torch.no_grad():
        rows = measure(source, samples, others, [name.strip() for name in given.ways.split(";") if name.strip()])
    report = {"model": given.model, "dtype": given.dtype, "length": given.length, "rows": rows}
    if given.json:
        print(json.dumps(report))
        return
    for row in rows:
        line = f"{row['way']:<32} {row['bytes']:6.3f} of the bytes  {row['kl']:9.6f} nats  {row['kept']:.2f} kept"
        if row["ratio"] is not None:
            line += f"  {estimate_text(row['ratio']['value'], row['ratio']['ci95'])} of {row['way'].split()[0]}"
        print(line)


if __name__ == "__main__":
    main()

"""What types of blocks with 32 numbers lose on normal numbers; with MODEL and TEXT also the KL of a model's rounded weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moacompress.kernels.weight_blocks import WEIGHT_TYPES, dequantized
from moacompress.models.kl import kl_divergence
from moacompress.models.source import load_source
from moacompress.models.weight_rounding import ROUNDED, rounded

TYPES = ("Q8_0", "Q4_1", "Q4_0")


def relative_error(weight: torch.Tensor, name: str) -> float:
    """Returns the squared error of a rounded weight as a share of its squares."""
    kind = WEIGHT_TYPES[name]
    return float((dequantized(rounded(weight, kind), kind) - weight).square().sum() / weight.square().sum())


def logits(model: str, weights: str, text: str, tokens: int) -> torch.Tensor:
    """Returns the logits of the first tokens of a text in float32, `[tokens, vocabulary]`."""
    source = load_source(model, dtype="float32", weights=weights)
    with torch.inference_mode():
        found: torch.Tensor = source.model(source.tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]).logits[
            0
        ]
    return found


def main() -> None:
    """Prints a row for each type, or each way to round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="hub id, folder or .gguf file")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="file of prose")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text")
    given = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(4096, 1024)
    for name in TYPES:
        bits = 8 * WEIGHT_TYPES[name].nbytes / WEIGHT_TYPES[name].numbers
        print(f"{name}: {bits} bits a number, relative squared error {relative_error(weight, name):.5f}")
    if given.model is None or given.text is None:
        return
    text = Path(given.text).read_text("utf-8")
    before = logits(given.model, "dense", text, given.tokens)
    for name in ROUNDED:
        kl = kl_divergence(before, logits(given.model, name, text, given.tokens))
        print(f"{name}: KL(before || rounded) {kl:.3g} nats a token")


if __name__ == "__main__":
    main()

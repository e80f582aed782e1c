"""Writes a Llama that computes the same with other weights: rotated along the residual stream, so that none of them are codes.

Weights of a file in blocks are codes with scales, which rounding to the same blocks finds again: what it loses of them says
nothing of other weights. With a rotation Q every matrix that reads the residual stream becomes `W diag(g) Q`, g the scale of
the norm before it, and every one that writes it `Q^T W`, as in QuaRot (arXiv 2404.00456); norms then have no scale. The
output layer is a tensor of its own afterwards.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def rotate(model: Any, seed: int = 0) -> None:
    """Rotates a Llama's weights in place.

    Args:
        model: in float64.
        seed: of the rotation.
    """
    hidden, decoder = model.config.hidden_size, model.model
    drawn = torch.randn(hidden, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation, _ = torch.linalg.qr(drawn)

    def reads(layer: Any, norm: Any) -> None:
        layer.weight = torch.nn.Parameter((layer.weight * norm.weight) @ rotation, requires_grad=False)

    reads(model.lm_head, decoder.norm)
    decoder.norm.weight.fill_(1)
    decoder.embed_tokens.weight = torch.nn.Parameter(decoder.embed_tokens.weight @ rotation, requires_grad=False)
    model.config.tie_word_embeddings = False
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for one in (attention.q_proj, attention.k_proj, attention.v_proj):
            reads(one, layer.input_layernorm)
        for one in (mlp.gate_proj, mlp.up_proj):
            reads(one, layer.post_attention_layernorm)
        for one in (attention.o_proj, mlp.down_proj):
            one.weight = torch.nn.Parameter(rotation.T @ one.weight, requires_grad=False)
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)


def main() -> None:
    """Writes the model in bfloat16, and prints how far its logits are off in float64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of a Llama")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    given = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float64)
    ids = torch.arange(3, 259)[None]
    with torch.no_grad():
        before = model(ids).logits
        rotate(model)
        print(f"largest difference of a logit {float((model(ids).logits - before).abs().max()):.2g}")
    model.to(torch.bfloat16).save_pretrained(given.out)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.out)


if __name__ == "__main__":
    main()

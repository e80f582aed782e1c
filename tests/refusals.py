"""Every refusal of a compressed model that a caller of transformers' own ways can meet, with the exact sentence."""

from __future__ import annotations

import re

SENTENCES = {
    "attention weights": "output_attentions is not supported: a compressed model never makes the whole matrix",
    "another cache": (
        "a compressed model brings its own cache and cannot use a {kind}; pass no cache, or the one that the model returned"
    ),
    "a cache by name": (
        "cache_implementation='{kind}' is not supported: a compressed model brings its own cache; leave it out, as "
        "`transformers serve` does without --compile"
    ),
    "a way of generating": (
        "generating with {kind} is not supported by a compressed model; use greedy search, sampling, beam search or assisted "
        "decoding"
    ),
    "another attention": (
        "set_attn_implementation('{kind}') would ignore the plan; use moacompress.detach(model) to get the dense model back"
    ),
    "continuous batching": (
        "continuous batching and paged caches are not supported by a compressed model, whose KV heads keep different tokens; "
        "use model.generate with its own cache, as `transformers serve` does without --continuous-batching"
    ),
    "another attention when loading": (
        "attn_implementation='{kind}' would ignore the plan; leave it out, or use moacompress.detach(model) after loading to "
        "get the dense model"
    ),
    "missing weights": (
        "the compressed checkpoint lacks {kind} of its weights, or holds them in another shape, such as {name}; transformers "
        "would draw them at random, so export it again"
    ),
    "a ready-made mask": (
        "an attention mask of shape {kind} is not supported by a compressed model, whose plan is the mask; pass a 2-D one that "
        "says which tokens are real"
    ),
    "another mask": (
        "only the stock causal and sliding-window masks are supported; the model or the caller asks for another one (packed "
        "sequences, bidirectional attention, or an overlay)"
    ),
    "not causal": "is_causal=False is not supported: a plan is made for causal attention",
    "packed sequences": "packed sequences (cu_seq_lens) are not supported by a compressed model",
}
"""By what is asked for; `{kind}` and `{name}` stand for what or which."""


def sentence(of: str, kind: str = "", name: str = "") -> str:
    """Returns a refusal's sentence."""
    return SENTENCES[of].format(kind=kind, name=name)


def is_refusal(message: str) -> str | None:
    """Returns which refusal a message is, word for word; None where it is none of them."""
    for name, text in SENTENCES.items():
        pattern = re.sub(r"\\{\w+\\}", lambda _: r"[^;]+", re.escape(text))
        if re.fullmatch(pattern, message):
            return name
    return None

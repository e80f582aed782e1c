"""KVzip's score: the maximum attention that a token gets while the model repeats the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moacompress.evaluation.eviction.allocation import best_of_all
from moacompress.evaluation.eviction.baseline import LayerReading, PromptBaseline, PromptReading, check_setting
from moacompress.prompts.templates import encode_text, shared_start, template_around

BLOCK = 128
"""Queries whose scores are made at a time: so few that they stay in a processor's caches."""
REPEAT_ALL = "\n\nRepeat the previous context exactly."
"""Asks for the first chunk; these words and the next are part of the method, since they decide what is attended to."""
REPEAT_PART = "\n\nRepeat the part of the previous context exactly, starting with"
"""Asks for a later chunk; the last tokens of the chunk before it follow."""


@dataclass(frozen=True)
class KVzip(PromptBaseline):
    """KVzip (arXiv 2505.23416): keeps what the model needs to write the prompt down again.

    The user's text is repeated one chunk at a time: a request in the user's turn, the assistant's header, the chunk.
    Attention of these tokens is normalised over the sinks, the cached keys of the chunk and the fed tokens up to each
    query; the score is the maximum over all fed queries and the query heads of the group. All layers and KV heads compete
    for the bytes.

    What the chat template puts before the user's text is not repeated. By default it scores 0 beyond the sinks and is evicted,
    as in NVIDIA's kvpress; the authors' own code keeps it, and all of it serves as sinks (`template`).

    Attributes:
        chunk: tokens that are repeated at a time.
        before: how many tokens of the chunk before are part of the request for the next.
        sinks: first tokens that are always kept.
        template: keep what the chat template puts before the user's text, in place of `sinks`.
    """

    name = "kvzip"
    readings: ClassVar[int] = 2
    chunk: int = 2048
    before: int = 8
    sinks: int = 4
    template: bool = False

    def __post_init__(self) -> None:
        check_setting("chunk", self.chunk, 1)
        check_setting("before", self.before, 0)
        check_setting("sinks", self.sinks, 0)

    def prepare(self, prompt: PromptReading) -> list[Tensor]:
        """Reads the prompt again; returns the scores of each layer, `[kv_heads, n]`, infinity for the sinks."""
        opening, header = template_around(prompt.tokenizer)
        first = shared_start(opening, prompt.ids)
        kept = first if self.template else self.sinks
        found = [reading.key.new_zeros(reading.key.shape[:2]) for reading in prompt.layers]
        for begin in range(first, len(prompt.ids), self.chunk):
            end = min(begin + self.chunk, len(prompt.ids))
            request = encode_text(prompt.tokenizer, REPEAT_ALL if begin == first else REPEAT_PART, special=False)
            last = prompt.ids[max(begin - self.before, first) : begin]
            fed = [*request, *last, *header, *prompt.ids[begin:end]]
            for layer, (reading, (query, key)) in enumerate(zip(prompt.layers, prompt.read_on(fed), strict=True)):
                read = reading.key
                sinks = read[:, : min(kept, begin)]  # those before the chunk
                cached = torch.cat([sinks, read[:, begin:end]], 1)
                most = most_attention(query, cached, key, reading.scaling)
                found[layer][:, begin:end] = most[:, sinks.shape[1] :]
        for scores in found:
            scores[:, :kept] = torch.inf
        return found

    def layer_scores(self, reading: LayerReading, prepared: Any) -> Tensor:
        """Returns the maximum attention that each token got; the sinks get infinity."""
        scores: Tensor = prepared[reading.layer]
        return scores

    def allocate(self, scores: Tensor, kv_bytes: int, token_bytes: int) -> Tensor:
        """Returns the mask of the highest scores of all layers and KV heads together."""
        return best_of_all(scores, kv_bytes // token_bytes)


def most_attention(query: Tensor, cached: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Returns the most attention that cached tokens get from any of the queries, `[kv_heads, cached tokens]`.

    `query` and `key` are of the tokens that are fed, `[heads or kv_heads, fed, head_dim]`; these see the cached keys,
    `[kv_heads, cached tokens, head_dim]`, and each other up to themselves.
    """
    most = cached.new_full(cached.shape[:2], -torch.inf)
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).triu(1)
    for head, queries in enumerate(query):
        own = head * len(key) // len(query)
        for begin in range(0, len(queries), BLOCK):
            asked = queries[begin : begin + BLOCK] * scaling
            end = begin + len(asked)
            logits, repeated = asked @ cached[own].T, asked @ key[own, :end].T
            repeated[:, begin:].masked_fill_(later[: len(asked), : len(asked)], -torch.inf)
            whole = torch.logaddexp(logits.logsumexp(-1), repeated.logsumexp(-1))
            most[own] = torch.maximum(most[own], logits.sub_(whole[:, None]).amax(0))
    return most.exp()

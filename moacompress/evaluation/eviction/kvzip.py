"""KVzip's score: the most attention that a token gets as the prompt is read again, after a request to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moacompress.core.files import fingerprint
from moacompress.evaluation.eviction.allocation import best_of_all
from moacompress.evaluation.eviction.baseline import LayerReading, PromptBaseline, PromptReading, check_setting

BLOCK = 128
"""Queries whose scores are made at a time: so few that they stay in a processor's caches."""
REQUEST = "\n\nRepeat the text above, word for word.\n\n"


@dataclass(frozen=True)
class KVzip(PromptBaseline):
    """KVzip (arXiv 2505.23416): keeps what the model needs to write the prompt down again.

    The prompt is repeated a chunk at a time. Attention of a chunk's repetition is normalised over the sinks, the chunk's own
    cached tokens and the tokens of the repetition up to each query, and the score is the most that any query of any head of the
    group gives. All layers and KV heads compete for the bytes.

    Attributes:
        chunk: tokens that are repeated at a time.
        before: how many tokens before a chunk its repetition begins with.
        sinks: first tokens that are always kept.
        request: asks for the repetition.
    """

    name = "kvzip"
    readings: ClassVar[int] = 2
    chunk: int = 2048
    before: int = 8
    sinks: int = 4
    request: str = REQUEST

    def __post_init__(self) -> None:
        check_setting("chunk", self.chunk, 1)
        check_setting("before", self.before, 0)
        check_setting("sinks", self.sinks, 0)

    def prepare(self, prompt: PromptReading) -> list[Tensor]:
        """Reads the prompt again; returns the scores of each layer, `[kv_heads, n]`."""
        asked: list[int] = prompt.tokenizer(self.request, add_special_tokens=False)["input_ids"]
        found = [reading.key.new_zeros(reading.key.shape[:2]) for reading in prompt.layers]
        for begin in range(0, len(prompt.ids), self.chunk):
            end = min(begin + self.chunk, len(prompt.ids))
            fed: Sequence[int] = [*asked, *prompt.ids[max(begin - self.before, 0) : end]]
            for layer, (reading, (query, key)) in enumerate(zip(prompt.layers, prompt.read_on(fed), strict=True)):
                sinks = reading.key[:, : min(self.sinks, begin)]  # those before the chunk
                cached = torch.cat([sinks, reading.key[:, begin:end]], 1)
                most = most_attention(query, cached, key, reading.scaling)
                found[layer][:, begin:end] = most[:, sinks.shape[1] :]
        return found

    def key(self) -> str:
        """Returns what its masks depend on; with longer prompts they are others since sinks count in every chunk."""
        return fingerprint([super().key(), "sinks in every chunk"])

    def layer_scores(self, reading: LayerReading, prepared: Any) -> Tensor:
        """Returns the most attention that each token got; the sinks get infinity."""
        scores: Tensor = prepared[reading.layer].clone()
        scores[:, : self.sinks] = torch.inf
        return scores

    def allocate(self, scores: Tensor, kv_bytes: int, token_bytes: int) -> Tensor:
        """Returns the mask of the highest scores of all layers and KV heads together."""
        return best_of_all(scores, kv_bytes // token_bytes)


def most_attention(query: Tensor, cached: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Returns the most attention that cached tokens get from any of the queries, `[kv_heads, cached tokens]`.

    Args:
        query: of the tokens that are fed, `[heads, fed, head_dim]`.
        cached: keys, `[kv_heads, cached tokens, head_dim]`.
        key: of the tokens that are fed, which queries see up to themselves, `[kv_heads, fed, head_dim]`.
        scaling: factor on the scores.
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

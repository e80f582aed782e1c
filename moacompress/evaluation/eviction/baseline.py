"""What a way to evict tokens is: one class that scores the tokens of a prompt, and says which are kept within some bytes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moacompress.core.errors import UsageError
from moacompress.core.files import fingerprint
from moacompress.evaluation.eviction.allocation import best_of_each, even_counts
from moacompress.evaluation.eviction.reading import LayerReading, PromptReading

__all__ = ["Baseline", "LayerReading", "PromptBaseline", "PromptReading", "StreamBaseline", "check_setting"]


class Baseline(ABC):
    """A way to evict tokens; `PromptBaseline` or `StreamBaseline`.

    Attributes:
        name: as on the command line and in results.
        readings: how often the prompt is read before the answer.
    """

    name: ClassVar[str]
    readings: ClassVar[int] = 1

    def key(self) -> str:
        """Returns what its masks depend on: class and parameters."""
        parameters = asdict(self) if is_dataclass(self) else vars(self)
        return fingerprint([self.name, type(self).__qualname__, repr(sorted(parameters.items()))])


def check_setting(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Refuses a setting of a way to evict that is not between two numbers, these included.

    Raises:
        UsageError: it is not, or it is no number.
    """
    if not least <= value <= most:
        wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UsageError(f"{name} is {value}, and must be {wanted}")


class PromptBaseline(Baseline):
    """Evicts once, when the prompt has been read densely; what comes after it is kept."""

    def prepare(self, prompt: PromptReading) -> Any:
        """Returns what the scores need beyond the dense reading, such as a second one; by default nothing."""
        return None

    def scores(self, prompt: PromptReading, prepared: Any) -> Tensor:
        """Returns the score of every token, `[layers, kv_heads, n]`; the higher are kept.

        Args:
            prompt: as the dense model read it.
            prepared: what `prepare` returned.
        """
        found = [self.layer_scores(reading, prepared) for reading in prompt.layers]
        return torch.stack([scores.to(found[0].device) for scores in found])  # layers may lie on several devices

    @abstractmethod
    def layer_scores(self, reading: LayerReading, prepared: Any) -> Tensor:
        """Returns the score of every token in one layer, `[kv_heads, n]`."""

    def allocate(self, scores: Tensor, kv_bytes: int, token_bytes: int) -> Tensor:
        """Returns which tokens are kept, bool `[layers, kv_heads, n]`: as many as the bytes allow.

        By default every KV head keeps as many as any other, those of the highest scores; of equals the first.

        Args:
            scores: as `scores` returns them.
            kv_bytes: of all layers and KV heads together.
            token_bytes: of one token's key and value in one KV head.
        """
        layers, kv_heads, _ = scores.shape
        return best_of_each(scores, even_counts(kv_bytes // token_bytes, layers * kv_heads).view(layers, kv_heads))


class StreamBaseline(Baseline):
    """Evicts token by token, as the prompt is read and as the answer is: no more than it keeps is ever attended to.

    Before a token attends, the KV head gives up the token of the lowest score if there is no room for the new one, which is
    then attended to like the others that are kept.

    Attributes:
        by_position: whether scores depend on positions alone. What is kept is then known before anything attends, and many
            tokens are read at a time.
    """

    by_position: ClassVar[bool] = False

    @abstractmethod
    def scores(self, positions: Tensor, received: Tensor, now: int, room: Tensor) -> Tensor:
        """Returns the score of every kept token, `[kv_heads, slots]`; the lowest is evicted.

        Args:
            positions: of the kept tokens, `[kv_heads, slots]`.
            received: the attention that each has got so far, summed over the queries since it was read and averaged over
                the KV head's group, `[kv_heads, slots]`; zeros where scores are by position.
            now: position of the token that needs room.
            room: how many tokens each KV head may keep, `[kv_heads]`.
        """

    def allocate(self, kv_bytes: int, token_bytes: int, layers: int, kv_heads: int) -> Tensor:
        """Returns how many tokens each KV head keeps at most, int64 `[layers, kv_heads]`; by default all as many.

        Args:
            kv_bytes: of all layers and KV heads together.
            token_bytes: of one token's key and value in one KV head.
            layers: of the model.
            kv_heads: of a layer.
        """
        return even_counts(kv_bytes // token_bytes, layers * kv_heads).view(layers, kv_heads)

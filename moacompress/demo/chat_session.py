"""A conversation with a compressed model: one cache for all turns, and what it takes beside the dense model's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from moacompress.core.errors import DataError
from moacompress.core.tables import readable_bytes
from moacompress.models.source import context_length
from moacompress.prompts.templates import encode_text
from moacompress.rules.cost import holds_from
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.checkpoint import compressed_folder, load_checkpoint
from moacompress.runtime.compat.alternates import cache_argument, returned_cache


@dataclass(frozen=True)
class ChatTurn:
    """A question and its answer.

    Attributes:
        answer: what the model said.
        tokens: in the cache behind it, all turns together.
        new_tokens: of the answer.
        kv_bytes: that the cache holds then.
        dense_bytes: that a dense cache of as many tokens would.
        seconds: from the question to the end of the answer.
        budget: that the plan was made for, such as 25%; None where that is not a share.
        budget_from: tokens from which the plan is within it.
    """

    answer: str
    tokens: int
    new_tokens: int
    kv_bytes: int
    dense_bytes: int
    seconds: float
    budget: str | None = None
    budget_from: int | None = None

    def sentence(self) -> str:
        """Returns what it took, for people."""
        share = f"{self.kv_bytes / self.dense_bytes:.0%}"
        if self.budget_from is not None and self.tokens < self.budget_from:
            share += f"; {self.budget} from {self.budget_from:,} tokens on"
        return (
            f"{self.tokens:,} tokens; KV cache {readable_bytes(self.kv_bytes)}, dense {readable_bytes(self.dense_bytes)} "
            f"({share}); {self.new_tokens / self.seconds:.1f} tokens/s"
        )


class ChatSession:
    """A conversation with the model in a folder.

    Args:
        target: compressed checkpoint, or folder of a run.
        system: what the model is told before; empty for nothing.
        device: torch device.
        dtype: to compute in; "auto" for the checkpoint's.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.

    Raises:
        UsageError: `target` is not compressed, or another dtype.
        PlanError, ModelError: the checkpoint is damaged.
    """

    def __init__(
        self,
        target: Path,
        system: str = "",
        device: str = "cpu",
        dtype: str = "auto",
        *,
        trust_remote_code: bool = False,
    ) -> None:
        checkpoint = load_checkpoint(compressed_folder(target), dtype, device, trust_remote_code=trust_remote_code)
        self._model: Any = checkpoint.model
        self._tokenizer: Any = checkpoint.tokenizer
        self._plan = checkpoint.plan.in_dtype(str(self._model.dtype).removeprefix("torch."))
        self._system = system
        self._budget_from = holds_from(self._plan)
        self._budget = None if self._budget_from is None else ", ".join(map(str, self._plan.budget["asked"]))
        self.forget()

    def forget(self) -> None:
        """Begins a new conversation."""
        self._said: list[dict[str, str]] = [{"role": "system", "content": self._system}] if self._system else []
        self._cached: list[int] = []
        self._cache: Any = None

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> ChatTurn:
        """Asks, and waits for the answer.

        Args:
            question: what is asked.
            max_new_tokens: most tokens of the answer.
            temperature: 0 for the likeliest token always.
            on_text: receives the answer as it comes.

        Raises:
            DataError: the conversation would be longer than the model's context.
        """
        said = [*self._said, {"role": "user", "content": question}]
        ids = self._ids(said)
        if not ids:
            raise DataError("the question is empty, and the model's tokenizer puts nothing before it; ask something")
        longest = context_length(self._model)
        if longest and len(ids) + max_new_tokens > longest:
            raise DataError(
                f"the conversation has {len(ids):,} tokens and the answer may have {max_new_tokens:,}; the model takes "
                f"{longest:,}: begin a new conversation, or ask for a shorter answer"
            )
        known, cache = self._cached, self._cache
        self._cached, self._cache = [], None  # where the answer is broken off, nobody knows what the cache holds
        if not known or ids[: len(known)] != known or len(ids) == len(known):
            # the first turn, or the template says earlier ones in other tokens now; nothing is reserved, as answers are short
            cache = PlanCache(self._plan)
        prompt = torch.tensor([ids], device=self._model.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        begun = time.perf_counter()
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            num_beams=1,
            num_return_sequences=1,
            tokenizer=self._tokenizer,  # for stop strings of the model's own settings
            return_dict_in_generate=True,
            streamer=_Streamer(self._tokenizer, on_text),
            **cache_argument(cache),
            **sampling,
        )
        seconds = time.perf_counter() - begun
        sequence = out.sequences[0].tolist()
        new = sequence[len(ids) :]
        answer: str = self._tokenizer.decode(new, skip_special_tokens=True).strip()
        self._cache, self._cached = returned_cache(out), sequence[:-1]  # the last token was never fed
        self._said = [*said, {"role": "assistant", "content": answer}]
        n = len(self._cached)
        held, dense = int(self._cache.kv_bytes()), self._plan.model.dense_kv_bytes(n)
        return ChatTurn(answer, n, len(new), held, dense, seconds, self._budget, self._budget_from)

    def _ids(self, said: list[dict[str, str]]) -> list[int]:
        """Returns a conversation as tokens, up to where the model continues; the bare texts where it has no template."""
        if self._tokenizer.chat_template:
            found = self._tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
            return list(found["input_ids"])
        return encode_text(self._tokenizer, "\n\n".join(entry["content"] for entry in said))


class _Streamer(TextStreamer):
    """Hands on an answer's text as it comes."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hands on a piece."""
        self._on_text(text)

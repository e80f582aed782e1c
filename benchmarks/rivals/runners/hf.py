"""What rivals share that run a model of transformers: forwards by hand, on the installed version's own names."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from rivals.runners.engine import Job, SteppedEngine


class HfEngine(SteppedEngine):
    """A model of transformers, in bfloat16 unless `dtype` says otherwise, with the cache that it makes by itself."""

    packages: tuple[str, ...] = ("transformers", "torch")

    def __init__(self, task: Job) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(task["threads"])
        wanted: Any = getattr(torch, task.get("dtype", "bfloat16"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(task["dense"], dtype=wanted).eval()
        self.vocabulary = self.model.config.vocab_size
        known = inspect.signature(self.model.model.forward).parameters
        self._name = "cache" if "cache" in known else "_".join(("past", "key", "values"))
        self.held: Any = None
        self.tokens = 0
        self._logits: Any = None

    def new_cache(self) -> Any:
        """Returns an empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def read(self, ids: Sequence[int]) -> None:
        """As `SteppedEngine`."""
        self.held, self.tokens = self.new_cache(), 0
        self.more(ids)

    def more(self, ids: Sequence[int]) -> None:
        """As `SteppedEngine`; positions go on from the tokens that were read, whatever the cache still holds of them."""
        positions = torch.arange(self.tokens, self.tokens + len(ids))[None]
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([ids]), position_ids=positions, logits_to_keep=1, **self.argument(self.held)
            )
        self._logits = out.logits[0, -1]
        self.tokens += len(ids)

    def argument(self, held: Any) -> dict[str, Any]:
        """Returns the keywords that hand a cache to the model."""
        return {self._name: held}

    def best(self) -> int:
        """As `SteppedEngine`."""
        return int(self._logits.argmax())

    def kv_bytes(self) -> int:
        """Returns the bytes of all tensors in the cache's layers."""
        return sum(tensor_bytes(vars(layer)) for layer in self.held.layers)


def tensor_bytes(values: Any) -> int:
    """Returns the bytes of all tensors in nested containers, each piece of memory once; of wrappers those of their parts."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if hasattr(value, "__tensor_flatten__"):
                for name in value.__tensor_flatten__()[0]:
                    look(getattr(value, name))
            else:
                found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                look(part)
        elif isinstance(value, tuple | list):
            for part in value:
                look(part)

    look(values)
    return sum(found.values())

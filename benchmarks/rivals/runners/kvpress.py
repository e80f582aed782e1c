"""kvpress: its presses, which evict tokens of a prompt once it is read, as its pipeline uses them.

A press that only masks leaves all keys and values in memory: `kv_bytes` counts them, and `masked_bytes` those without a use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rivals.runners.engine import Job
from rivals.runners.hf import HfEngine


class Pressed(HfEngine):
    """A model with a press: `press` is its class, `around` one that it wraps, `ratio` what is evicted."""

    packages = ("kvpress", *HfEngine.packages)

    def __init__(self, task: Job) -> None:
        super().__init__(task)
        import kvpress

        inner = getattr(kvpress, task["press"])
        self._press: Any
        if "around" in task:
            self._press = inner(getattr(kvpress, task["around"])(compression_ratio=task["ratio"]))
        else:
            self._press = inner(
                **{task.get("ratio_name", "compression_ratio"): task["ratio"], **task.get("options", {})}
            )

    def read(self, ids: Sequence[int]) -> None:
        """Reads a prompt under the press."""
        self.held, self.tokens = self.new_cache(), len(ids)
        with torch.inference_mode(), self._press(self.model):
            self.model.model(input_ids=torch.tensor([ids]), **self.argument(self.held))

    def masked_bytes(self) -> int:
        """Returns the bytes of keys and values that the press masks."""
        found = 0
        for layer, held in zip(self.model.model.layers, self.held.layers, strict=True):
            masked = getattr(layer.self_attn, "masked_key_indices", None)
            if masked is not None:
                found += len(masked[0]) * held.keys.element_size() * (held.keys.shape[-1] + held.values.shape[-1])
        return found

    def kept(self, job: Job) -> Job:
        """Finds the kept keys among those of the same prompt without a press; a press that masks says what it masks."""
        ids = torch.tensor([job["prompt"]])
        whole, pressed = self.new_cache(), self.new_cache()
        with torch.inference_mode():
            self.model.model(input_ids=ids, **self.argument(whole))
            with self._press(self.model):
                self.model.model(input_ids=ids, **self.argument(pressed))
        found = []
        for layer, dense, left in zip(self.model.model.layers, whole.layers, pressed.layers, strict=True):
            masked = getattr(layer.self_attn, "masked_key_indices", None)
            if masked is not None:
                keep = torch.ones(dense.keys.shape[1:3], dtype=torch.bool)
                keep[masked[1], masked[2]] = False
                found.append([row.nonzero()[:, 0].tolist() for row in keep])
            else:
                found.append([positions(keys, rest) for keys, rest in zip(dense.keys[0], left.keys[0], strict=True)])
        return {"kept": found}


def positions(keys: torch.Tensor, kept: torch.Tensor) -> list[int]:
    """Returns where the kept keys, `[kept, head_dim]`, stand among all, `[tokens, head_dim]`; the first, where two are equal.

    Raises:
        ValueError: one is not among them.
    """
    where: dict[bytes, int] = {}
    for index, key in enumerate(keys.view(torch.uint8).numpy()):
        where.setdefault(key.tobytes(), index)
    try:
        return sorted(where[key.tobytes()] for key in kept.contiguous().view(torch.uint8).numpy())
    except KeyError:
        raise ValueError("a kept key is none of the prompt's: the press changes keys") from None


make = Pressed

"""A forward that gives the logits of the positions that are needed alone, whether or not the model's own forward can."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def kept_logits(model: torch.nn.Module, kept: int | torch.Tensor, **inputs: Any) -> Any:
    """Runs a causal LM of transformers, or a wrapper around one (PEFT, DDP), and returns its outputs with some logits alone.

    `kept` is how many of the last positions, at least 1, or which ones, int64 `[positions]`; `logits` are then
    `[rows, positions, vocabulary]`. A forward that takes `logits_to_keep` computes no others; of any other the rest is cut off
    afterwards.
    """
    if _can_keep(type(_inside(model)).forward):
        return model(**inputs, logits_to_keep=kept)
    outputs = model(**inputs)
    found = outputs.logits
    outputs.logits = found[:, -kept:] if isinstance(kept, int) else found[:, kept.to(found.device)]
    return outputs


def _inside(model: torch.nn.Module) -> torch.nn.Module:
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


@cache
def _can_keep(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters

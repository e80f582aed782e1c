"""Forwards of models under plans, and how far apart two results are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moacompress.rules.plan import Plan
from moacompress.runtime.compat.alternates import cache_argument, returned_cache
from moacompress.runtime.hf.attaching import attached_plan

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
"""What `generate` is asked for where rows shall end nowhere."""


def plan_of(model: Any) -> Plan:
    """Returns the plan of a model under one."""
    plan = attached_plan(model)
    assert plan is not None
    return plan


def logits(model: Any, *ids: Tensor, **given: Any) -> Tensor:
    """Returns logits without gradients, `[rows, tokens, vocabulary]`."""
    with torch.no_grad():
        found: Tensor = model(*ids, **given).logits
    return found


def after_prompt(model: Any, more: int = 1) -> tuple[Tensor, Any]:
    """Returns two rows of 50 tokens and so many more, and a cache that holds the 50 of each."""
    ids = torch.randint(3, model.config.vocab_size, (2, 50 + more), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, returned_cache(model(ids[:, :50], use_cache=True))


def in_parts(
    model: Any,
    ids: Tensor,
    sizes: Iterable[int],
    cache: Any = None,
    mask: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Returns logits of forwards over a cache that take so many tokens each, `[rows, tokens, vocabulary]`.

    Args:
        model: under a plan.
        ids: `[rows, tokens]`.
        sizes: tokens of each forward; tokens that are left are fed one by one.
        cache: None for one that the model makes.
        mask: which tokens are real, `[rows, tokens]`.
        plan: whose bytes the cache takes after every forward.
    """
    parts, begin, sizes = [], 0, [*sizes]
    for size in [*sizes, *[1] * (ids.shape[1] - sum(sizes))]:
        end = begin + size
        given: dict[str, Any] = {"use_cache": True} if cache is None else cache_argument(cache)
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            given |= {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        with torch.no_grad():
            out = model(ids[:, begin:end], **given)
        cache, begin = returned_cache(out), end
        parts.append(out.logits)
        assert plan is None or cache.used_bytes() == plan.kv_bytes(end, batch=len(ids))
    return torch.cat(parts, 1)


@contextmanager
def fed(model: Any) -> Iterator[list[int]]:
    """Yields a list that gets the number of tokens of every forward."""
    counts: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].shape[1])

    handle = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a share of the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())

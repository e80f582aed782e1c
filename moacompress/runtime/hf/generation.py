"""Methods of a model that stand in for transformers' own while it is under a plan: `generate` and what surrounds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from moacompress.core.errors import MoaCompressError, UnsupportedError
from moacompress.models.block_layers import check_no_blocks
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.compat import private_names
from moacompress.runtime.compat.alternates import CACHE
from moacompress.runtime.compat.http_errors import refusal
from moacompress.runtime.decode.context import NAME
from moacompress.runtime.hf.hooks import check_cache
from moacompress.runtime.hf.prefixes import kept_cache

MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)


def _prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Makes or checks the cache of `generate`, under the name that the model expects."""
    attachment = getattr(self, "_moacompress", None)
    if attachment is None:
        raise MoaCompressError("the plan was taken off this model by hand; use moacompress.detach(model)")
    if generation_mode not in MODES:
        raise refusal(
            f"generating with {generation_mode.value} is not supported by a compressed model; use greedy search, sampling, "
            "beam search or assisted decoding"
        )
    if generation_config.assistant_early_exit is not None:
        raise refusal(
            f"assistant_early_exit={generation_config.assistant_early_exit} is not supported by a compressed model, whose "
            "cache is that of all its layers; use prompt_lookup_num_tokens or an assistant_model"
        )
    implementation = generation_config.cache_implementation
    if implementation is not None:
        own = self.generation_config.cache_implementation == implementation
        instead = "set model.generation_config.cache_implementation to None" if own else "leave it out"
        raise refusal(
            f"cache_implementation={implementation!r} is not supported: a compressed model brings its own cache; {instead}, "
            "as `transformers serve` does without --compile"
        )
    cache = check_cache(model_kwargs.get(CACHE), attachment.own.key())
    if cache is not None and cache.get_seq_length() and generation_mode is GenerationMode.ASSISTED_GENERATION:
        raise refusal(
            "a cache that has tokens already is not supported with an assistant_model or prompt_lookup_num_tokens, with which "
            "transformers reads the whole prompt again; leave the cache out, or generate without them"
        )
    if cache is not None:
        cache._is_user_defined = True
    elif generation_config.use_cache is not False:
        new = PlanCache(attachment.own, reserve=max_cache_length)
        cache = kept_cache(self, generation_config, model_kwargs, generation_mode, batch_size, new)
        model_kwargs[CACHE] = cache
        if generation_config.is_assistant:
            cache.activate_past_recording()  # type: ignore[no-untyped-call]


def _refuse_other_attention(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    if attn_implementation != NAME:
        raise UnsupportedError(
            f"set_attn_implementation({attn_implementation!r}) would ignore the plan; use moacompress.detach(model) to get the "
            "dense model back"
        )


def _refuse_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> None:
    raise refusal(
        "continuous batching and paged caches are not supported by a compressed model, whose KV heads keep different tokens; "
        "use model.generate with its own cache, as `transformers serve` does without --continuous-batching"
    )


def _train(self: Any, requires_grad: bool = True) -> Any:
    """Is `requires_grad_` of a model some of whose weights may be in blocks."""
    if requires_grad:
        check_no_blocks(self, "get gradients")
    return type(self).requires_grad_(self, requires_grad)


def _resize(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """Is `resize_token_embeddings` of a model whose embedding or output layer may be in blocks."""
    for end in (self.get_input_embeddings(), self.get_output_embeddings()):
        if isinstance(end, torch.nn.Module):
            check_no_blocks(end, f"be given rows for {new_num_tokens} tokens (resize_token_embeddings)")
    return type(self).resize_token_embeddings(self, new_num_tokens, *args, **kwargs)


OVERRIDES: dict[str, Callable[..., Any]] = {
    private_names.PREPARE_CACHE: _prepare_cache,
    "requires_grad_": _train,
    "resize_token_embeddings": _resize,
    "set_attn_implementation": _refuse_other_attention,
    "generate_batch": _refuse_continuous_batching,
    "init_continuous_batching": _refuse_continuous_batching,
    "continuous_batching_context_manager": _refuse_continuous_batching,
}
"""Methods of a model that stand in for transformers' own while a plan is attached."""

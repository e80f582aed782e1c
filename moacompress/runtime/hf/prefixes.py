"""Keeping prefixes: a prompt that begins with an earlier prompt and its answer is read from where those end.

`transformers serve` hands `generate` the whole conversation at every turn, and `generate` drops its cache at the end of each. A
model keeps them, in bounded memory, where that is asked for: by `keep_prefixes`, or the environment variable
`MOACOMPRESS_PREFIXES`.
"""

from __future__ import annotations

import logging
import os
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from moacompress.core.arrays import Ints
from moacompress.core.errors import BudgetError, PlanError, UnsupportedError, one_line
from moacompress.models.placement import input_device
from moacompress.rules.budget import parse_bytes
from moacompress.runtime.cache.kept_prefixes import KeptPrefixes
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.compat.alternates import CACHE_NAMES, CHUNKS_CONTINUE, cache_argument

VARIABLE = "MOACOMPRESS_PREFIXES"
"""Environment variable: bytes that every model under a plan keeps prefixes in, such as `256MiB`."""
GENERATE = "generate"
"""Method of a model that is replaced while it keeps prefixes."""
LEAST_SHARED = 128
"""Tokens that prompts must begin alike with, beyond what is kept, for these to be kept by themselves."""
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_BROUGHT = {*CACHE_NAMES, "position_ids", "inputs_embeds", "custom_generate", "assistant_model"}
"""Arguments of `generate` with which a call keeps nothing."""
_KNOWN = {"attention_mask", "position_ids", "logits_to_keep", "use_cache"}
"""What forwards of `generate` are given beside tokens and a cache; anything else may change the keys of a token."""
_VARYING = ("dynamic", "longrope")
"""Rotary embeddings that turn a token by another angle in a longer prompt."""

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)


def keep_prefixes(model: Model, limit: str | int | None) -> Model:
    """Has `generate` keep the caches of prompts and answers, and continue from them.

    A prompt that begins with all tokens of an earlier prompt, or of that and its answer, is read from there on, and so is the
    third that begins with the same long text; answers are what they would be without, up to rounding. That is for one row of
    text, greedy or sampled, in eval mode; any other call of `generate` is as before. Changed weights are noticed; call it again
    after adapters, hooks or anything else have changed.

    Args:
        model: under a plan.
        limit: the most bytes to keep, such as `"256MiB"`; None to keep nothing, and to give back what was kept.

    Returns:
        The same model.

    Raises:
        PlanError: the model is under no plan.
        BudgetError: the limit is no number of bytes.
        UnsupportedError: the model's keys depend on the length of the prompt.
    """
    attachment = getattr(model, "_moacompress", None)
    if attachment is None:
        raise PlanError("prefixes are kept by a model under a plan, and this model is under none; attach one first")
    if limit is None:
        model.__dict__.pop(GENERATE, None)
        attachment.prefixes = None
        return model
    _check_rotary(model)
    attachment.prefixes = KeptPrefixes(parse_bytes(limit) if isinstance(limit, str) else limit)
    model.__dict__[GENERATE] = partial(_generate, model)
    return model


def kept_limit(model: Model) -> int | None:
    """Returns the most bytes of prefixes that a model keeps; None where it keeps none."""
    attachment = getattr(model, "_moacompress", None)
    prefixes = None if attachment is None else attachment.prefixes
    return None if prefixes is None else prefixes.limit


def limit_in_environment(model: PreTrainedModel) -> int | None:
    """Returns the bytes that the environment variable names for a model; None where it is not set.

    Raises:
        BudgetError: it names no number of bytes.
        UnsupportedError: as `keep_prefixes`.
    """
    asked = os.environ.get(VARIABLE, "").strip()
    if not asked:
        return None
    _check_rotary(model)
    try:
        return parse_bytes(asked)
    except BudgetError as error:
        raise BudgetError(f"{VARIABLE}: {error}") from error


def _check_rotary(model: PreTrainedModel) -> None:
    given = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [each.get("rope_type") for each in (given, *given.values()) if isinstance(each, dict)]
    varying = next((kind for kind in kinds if kind in _VARYING), None)
    if varying is not None:
        raise UnsupportedError(
            f"a prefix cannot be kept for rotary embeddings of the type {varying!r}, whose keys depend on the length of the "
            f"prompt; leave keep_prefixes and {VARIABLE} out for this model"
        )


class _Conversation(StoppingCriteria):
    """A call of `generate` that may continue a kept prefix, and of which prompt and answer are kept.

    As a stopping criterion it stops nothing: it is told all tokens after every step.

    `prompt`: int64 `[tokens]`.
    """

    def __init__(self, model: Any, prefixes: KeptPrefixes, prompt: Ints) -> None:
        self.model, self._prefixes, self._prompt = model, prefixes, prompt
        self._weights: tuple[Any, ...] = ()
        self._cache: PlanCache | None = None
        self._after_prompt: PlanCache | None = None
        self._ids: torch.Tensor | None = None

    def begin(self, new: PlanCache, chunk: int | None) -> PlanCache:
        """Returns the cache of the longest kept prefix of the prompt, or the empty one, and keeps what becomes of it.

        Where an earlier prompt began alike for `LEAST_SHARED` tokens more, these are read first and kept for a third.

        `chunk`: most tokens to read at once; None for no limit.
        """
        self._weights = _weights(self.model)
        found, shared = self._prefixes.longest(self._prompt, self._weights)
        cache = new if found is None else found
        read = cache.get_seq_length()
        _log.debug("%d of %d tokens of a prompt are kept", read, len(self._prompt))
        if shared - read >= LEAST_SHARED:
            ids = torch.from_numpy(self._prompt[None, read:shared]).to(input_device(self.model))
            decoder = self.model.get_decoder() or self.model.base_model
            for part in ids.split(chunk or ids.shape[1], dim=1):
                decoder(input_ids=part, use_cache=True, **cache_argument(cache))
            self._prefixes.keep(self._prompt[:shared], cache, self._weights)
        self._cache = cache
        return cache

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Takes note of the tokens so far, `[1, tokens]`, and stops nothing."""
        if self._cache is not None:
            if self._ids is None and self._cache.get_seq_length() == len(self._prompt):
                self._after_prompt = self._cache.fork()  # a copy would delay the first token
            self._ids = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def end(self) -> None:
        """Keeps the prompt, and the prompt with as much of the answer as was fed; a failure there is none of the answer's."""
        try:
            if self._after_prompt is not None:
                self._prefixes.keep(self._prompt, self._after_prompt, self._weights)
                self._after_prompt = None
            if self._cache is not None and self._ids is not None:
                fed = self._cache.get_seq_length()
                tokens = self._ids[0, :fed].cpu().numpy().astype(np.int64)
                if len(tokens) == fed:
                    self._prefixes.keep(tokens, self._cache, self._weights)
        except (MemoryError, RuntimeError) as error:  # no memory, or a forward was interrupted in its midst
            _log.warning("a prefix could not be kept: %s", one_line(error))


_running: ContextVar[_Conversation | None] = ContextVar("moacompress_conversation", default=None)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `generate` of a model that keeps prefixes."""
    generate = partial(getattr(type(model), GENERATE), model)
    prompt: Any = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    one_row = isinstance(prompt, torch.Tensor) and prompt.ndim == 2 and len(prompt) == 1 and prompt.shape[1] > 0
    brought = any(kwargs.get(name) is not None for name in _BROUGHT)
    if not one_row or len(args) > 1 or brought or model.training:
        return generate(*args, **kwargs)
    conversation = _Conversation(model, model._moacompress.prefixes, prompt[0].cpu().numpy().astype(np.int64))
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), conversation])
    token = _running.set(conversation)
    try:
        return generate(*args, **kwargs)
    finally:
        _running.reset(token)
        conversation.end()


def kept_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: GenerationMode, rows: int, new: PlanCache
) -> PlanCache:
    """Returns the cache that a call of `generate` is to have, which brings none.

    Returns:
        That of a kept prefix where there is one and the call can continue it, otherwise the empty one.
    """
    conversation = _running.get()
    if conversation is None or conversation.model is not model:
        return new
    plain = mode in _MODES and rows == 1 and (generation_config.num_return_sequences or 1) == 1
    more = {name for name, value in model_kwargs.items() if value is not None} - _KNOWN
    mask = model_kwargs.get("attention_mask")
    padded = mask is not None and not (isinstance(mask, torch.Tensor) and bool((mask != 0).all()))
    chunk = generation_config.prefill_chunk_size
    if not plain or more or padded or generation_config.is_assistant or generation_config.token_healing:
        return new
    return conversation.begin(new, chunk) if chunk is None or CHUNKS_CONTINUE else new


def _weights(model: torch.nn.Module) -> tuple[Any, ...]:
    """Returns what tells the weights of a model, and the dtype that autocast makes of them, from others.

    It changes where a weight is replaced, or written in place.
    """
    kinds = {each.device.type for each in model.parameters()}
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    weights = (
        (each.data_ptr(), 0 if each.is_inference() else each._version, each.dtype) for each in model.parameters()
    )
    return (*autocast, *weights)

"""Greedy decoding and sampling in which a step's tensors stay where they are and the host is told nothing.

`generate` of transformers asks after every token whether rows have ended. Here the token is chosen on the device, goes into
the tensors that the next step reads, and the host looks every few steps. A step is a function without arguments that reads and
writes the same tensors every time: on a GPU whose steps go into rings (`runtime.cache.ring`) it is captured as a CUDA graph and
replayed, while the host counts what the cache has taken in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moacompress.core.errors import UnsupportedError
from moacompress.models.kept_logits import kept_logits
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.cache.pool import reserved
from moacompress.runtime.compat.alternates import cache_argument
from moacompress.runtime.decode.routes import RingStep
from moacompress.runtime.hf.attaching import own_plan

LOOK_EVERY = 16
"""Steps between two looks at whether all rows have ended."""

Choose = Callable[[torch.Tensor], torch.Tensor]
"""From logits `[rows, vocabulary]` to tokens, int64 `[rows]`, on the device."""


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Returns the likeliest tokens, int64 `[rows]`, of logits `[rows, vocabulary]`."""
    return logits.argmax(-1)


class Sampling:
    """Draws tokens as `generate` of transformers does with the same state of the generator, without a word from the host.

    Args:
        temperature: the logits are divided by it.
        top_k: how many of the likeliest tokens are drawn from; None for all.
        top_p: the probability that those which are drawn from have together at least.
        generator: of the device; None for its own.

    Attributes:
        generator: see above.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self._warpers: list[Any] = []
        if temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(top_p))
        self.generator = generator

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns tokens, int64 `[rows]`, of logits `[rows, vocabulary]`.

        `torch.multinomial` divides by exponentials and takes the largest as well, and has the host check its input.
        """
        logits = logits.float()
        for warper in self._warpers:
            logits = warper(None, logits)
        drawn = logits.softmax(-1)
        return (drawn / torch.empty_like(drawn).exponential_(1, generator=self.generator)).argmax(-1)


class DeviceSteps:
    """Steps of a model under a plan, from a prompt that its cache has taken in.

    Args:
        model: under a plan.
        cache: that was made for as many tokens as there will be.
        first: first new token of every row, int64 `[rows]`.
        positions: position id of it, int64 `[rows]`.
        tokens: how many new tokens there may be.
        choose: how they are chosen.
        ends: tokens that end a row, int64 `[any]` on the device.
        pad: what a row that has ended is fed.

    Attributes:
        cache: see above.
        tokens: new tokens, int64 `[rows, any]`; written to by steps.
        ended: which rows have ended, bool `[rows]`; written to by steps.
    """

    def __init__(
        self,
        model: Any,
        cache: PlanCache,
        first: torch.Tensor,
        positions: torch.Tensor,
        tokens: int,
        choose: Choose,
        ends: torch.Tensor,
        pad: int,
    ) -> None:
        self._model, self.cache, self._choose = model, cache, choose
        rows, device = len(first), first.device
        self._ends, self._pad = ends, torch.full((rows,), pad, dtype=torch.int64, device=device)
        self.ended = torch.isin(first, ends)
        self._most, self._made = tokens, 1
        self.tokens = self._pad[:, None].repeat(1, reserved(tokens, 0))
        self.tokens[:, 0] = first
        self._token, self._positions = first[:, None].clone(), positions[:, None].clone()
        self._at = torch.ones(1, dtype=torch.int64, device=device)
        self._graph: Any = None
        self._warm = False

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        """What a step reads and writes of this; they stay where they are."""
        return self.tokens, self.ended, self._token, self._positions, self._at

    @torch.no_grad()
    def step(self) -> None:
        """Feeds the last token of every row, and chooses the next one."""
        self.cache.trust_positions(self._positions)
        logits = self._model(
            input_ids=self._token, position_ids=self._positions, use_cache=True, **cache_argument(self.cache)
        ).logits[:, -1]
        chosen = torch.where(self.ended, self._pad, self._choose(logits))
        self.ended.logical_or_(torch.isin(chosen, self._ends))
        self.tokens.index_copy_(1, self._at, chosen[:, None])
        self._token.copy_(chosen[:, None])
        self._positions.add_(1)
        self._at.add_(1)

    def advance(self) -> None:
        """Makes a step, by the graph once there is one, which is captured after one that went into rings.

        Where tokens or rings have no place for more they get it, and the next graph is of those.
        """
        full = self._made == self.tokens.shape[1]
        if full:
            more = reserved(self._most, self._made) - self._made
            self.tokens = torch.cat((self.tokens, self._pad[:, None].repeat(1, more)), 1)
        if full or (self._graph is not None and self.cache.is_full):
            self._graph, self._warm = None, False
        self._made += 1
        if self._graph is not None:
            self._graph.replay()
            self.cache.count_steps(1)
            return
        if self._warm and self._can_capture:
            self._capture()
            return
        before = self.cache.step_routes[RingStep.name]
        self.step()
        layers = len(self.cache.layers)
        self._warm = self.cache.step_routes[RingStep.name] - before == layers

    @property
    def captured(self) -> bool:
        """Whether steps are those of a graph."""
        return self._graph is not None

    @property
    def _can_capture(self) -> bool:
        return self._token.device.type == "cuda"

    def _capture(self) -> None:
        """Captures a step, which the host counts as it is, and makes it."""
        graph = torch.cuda.CUDAGraph()
        if isinstance(self._choose, Sampling) and self._choose.generator is not None:
            graph.register_generator_state(self._choose.generator)
        with torch.cuda.graph(graph):
            self.step()
        self._graph = graph
        graph.replay()


@torch.no_grad()
def generate_on_device(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    choose: Choose = greedy,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    look_every: int = LOOK_EVERY,
) -> torch.Tensor:
    """Returns prompts and new tokens, as `model.generate` does by greedy search or sampling, int64 `[rows, tokens]`.

    Of the model's generation config only the tokens that end and pad rows count: no penalties, and nothing suppressed.

    Args:
        model: under a plan.
        input_ids: prompts, padded on the left, int64 `[rows, tokens]`.
        attention_mask: which of them are real, `[rows, tokens]`; None where all are.
        max_new_tokens: how many at most.
        choose: how a token is chosen: `greedy`, or a `Sampling`.
        eos_token_id: tokens that end a row; by default those of the model's generation config.
        pad_token_id: what follows in a row that has ended; by default that of the generation config, or an end.
        look_every: steps between two looks at whether all rows have ended.

    Raises:
        UnsupportedError: the model has no plan, no token is asked for, or a prompt ends in padding.
    """
    plan = own_plan(model)
    if plan is None:
        raise UnsupportedError("generate_on_device needs a model under a plan; use model.generate for this one")
    if max_new_tokens < 1 or look_every < 1:
        raise UnsupportedError(
            f"max_new_tokens={max_new_tokens} and look_every={look_every} must be 1 at least; ask for a token or more"
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise UnsupportedError("a prompt ends in padding; pad prompts on the left (padding_side='left')")
    config, device = model.generation_config, input_ids.device
    given = config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else [*given]
    pads = pad_token_id if pad_token_id is not None else config.pad_token_id
    pad = pads if pads is not None else ends[0] if ends else 0
    length = input_ids.shape[1]
    cache = PlanCache(plan, reserve=length + max_new_tokens)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    logits = kept_logits(
        model,
        1,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=True,
        **cache_argument(cache),
    ).logits[:, -1]
    at_end = torch.tensor(ends, dtype=torch.int64, device=device)
    steps = DeviceSteps(model, cache, choose(logits), real.sum(-1), max_new_tokens, choose, at_end, pad)
    for number in range(1, max_new_tokens):
        if ends and number % look_every == 1 % look_every and bool(steps.ended.all()):
            break
        steps.advance()
    new = steps.tokens
    if ends:
        over = torch.isin(new, at_end).long().cummax(1).values.all(0)
        new = new[:, : int((~over).sum()) + 1]
    return torch.cat((input_ids, new), 1)

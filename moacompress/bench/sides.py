"""The sides of a benchmark: one set of weights under a plan, at full span, and dense, each with caches of its own.

For decoding, a cache is filled with random keys and values in place of a prompt's: what they are makes no difference to
the time, and every row has its own, so that no side reads one row's memory for another's. Every side gets the same.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from moacompress.bench.bench_request import SPARE_TOKENS, Cell
from moacompress.core.errors import MoaCompressError
from moacompress.models.kept_logits import kept_logits
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.runtime import PlanCache, attach, detach
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.compat.alternates import cache_argument, returned_cache

STATIC = "dense_static"
"""The dense model with a static cache and a compiled step: `dense_best` if it is faster than `dense`."""
MODELS = ("plan", "full_span", "dense")
"""Sides that have a model of their own."""


def make_models(model: PreTrainedModel, plan: Plan) -> dict[str, PreTrainedModel]:
    """Returns the model of every side in `MODELS`; all have the same weights in memory.

    Where layers share attention the dense model has random weights: of a checkpoint without some projections there is no
    other, and they take as long. The model that is given, under its plan, is made dense itself.
    """
    if plan.shares:
        config = copy.deepcopy(model.config)
        del config.quantization_config
        config._attn_implementation = None
        made: Any = type(model)(config)
        dense = _not_frozen(made.to(model.device, model.dtype).eval())
        full_span = attach(same_weights(dense), Plan.full(plan.model))
        return {"plan": _not_frozen(model), "full_span": full_span, "dense": dense}
    dense = _not_frozen(detach(model))
    return {
        "plan": attach(same_weights(dense), plan),
        "full_span": attach(same_weights(dense), Plan.full(plan.model)),
        "dense": dense,
    }


def _not_frozen(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model whose weights ask for gradients, as those of `from_pretrained` do.

    PyTorch multiplies a prompt's last state by frozen weights only after it has copied them: a dense model's prompts take
    longer so, and as much more memory as its head.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    return model


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of a model that has the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class FilledCache(ABC):
    """A cache that holds a cell's tokens, and can be had again as it was.

    Attributes:
        cache: the cache that the next step reads and writes.
    """

    cache: Any

    @abstractmethod
    def fresh(self) -> Any:
        """Returns the cache as it was filled; what an earlier one took in is gone."""

    def kv_bytes(self) -> int:
        """Returns the bytes of the keys and values in it as it was filled."""
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self.cache.layers)


class FilledPlanCache(FilledCache):
    """The cache of a model under a plan. Its blocks are shared with none but the cache that each turn begins with.

    Memory is taken for `room` tokens of a row. Keys and values of every layer may be given as `kv`, as `random_kv` yields them.
    """

    def __init__(
        self,
        plan: Plan,
        cell: Cell,
        room: int,
        seed: int,
        device: str,
        kv: Iterable[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.cache = PlanCache(plan, reserve=room)
        kv = random_kv(plan.model, cell, seed, device) if kv is None else kv
        for layer, (key, value) in zip(self.cache.layers, kv, strict=True):
            layer.update(key, value)
            scores = None
            if isinstance(layer, PlanCacheLayer) and layer.rules.selects:
                generator, size = torch.Generator(device).manual_seed(seed), key.shape[:3]
                scores = torch.randint(-(1 << 15), 1 << 15, size, generator=generator, dtype=torch.int16, device=device)
            layer.commit(Chunk(cell.length), scores)

    def fresh(self) -> Any:
        """Returns a copy on write of the filled cache."""
        return self.cache.fork()

    def kv_bytes(self) -> int:
        """Returns the bytes of the blocks in use."""
        return int(self.cache.used_bytes())


class FilledDynamicCache(FilledCache):
    """transformers' default cache, of a model with that config."""

    def __init__(self, config: Any, shape: ModelShape, cell: Cell, seed: int, device: str) -> None:
        self.cache = DynamicCache(config=config)
        for layer, (key, value) in enumerate(random_kv(shape, cell, seed, device)):
            self.cache.update(key, value, layer)

    def fresh(self) -> Any:
        """Returns a shallow copy: a step makes new tensors and leaves those of the filled cache alone."""
        fresh = copy.copy(self.cache)
        fresh.layers = [copy.copy(layer) for layer in self.cache.layers]
        return fresh


class FilledStaticCache(FilledCache):
    """transformers' static cache with room for so many tokens, which a compiled step writes to in place."""

    def __init__(self, config: Any, shape: ModelShape, cell: Cell, room: int, seed: int, device: str) -> None:
        self.cache = StaticCache(config=config, max_cache_len=room)
        for layer, (key, value) in enumerate(random_kv(shape, cell, seed, device)):
            self.cache.update(key, value, layer)
        counts = ("cumulative_length", "cumulative_length_int")
        self._counts = [
            {name: int(getattr(layer, name)) for name in counts if hasattr(layer, name)} for layer in self.cache.layers
        ]

    def fresh(self) -> Any:
        """Returns the same cache, with its counts as they were.

        Where the model has a window of its own, a step shifts what is in it; that stays shifted, and takes the same time.
        """
        for layer, counts in zip(self.cache.layers, self._counts, strict=True):
            for name, count in counts.items():
                current = getattr(layer, name)
                if isinstance(current, torch.Tensor):
                    current.fill_(count)  # a compiled step knows it by its address
                else:
                    setattr(layer, name, count)
        return self.cache


def random_kv(shape: ModelShape, cell: Cell, seed: int, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields keys and values of every layer, `[batch, kv_heads, length, head_dim]` each; a seed gives the same ones."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (cell.batch, shape.kv_heads, cell.length, shape.head_dim)
    dtype: torch.dtype = getattr(torch, cell.dtype)
    for _ in range(shape.layers):
        key, value = (torch.randn(size, generator=generator, dtype=dtype, device=device) for _ in range(2))
        yield key, value


def overlapping_kv(shape: ModelShape, cell: Cell, seed: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns keys and values as `random_kv` yields them, quickly, for caches that are filled many times.

    They are views of one row and a little more, in which each row begins one token after the one before: no two rows are the
    same, so that they share no blocks. All layers get the same.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens, dim = cell.length + cell.batch, shape.head_dim
    dtype: torch.dtype = getattr(torch, cell.dtype)
    views = [
        torch.randn((shape.kv_heads, tokens, dim), generator=generator, dtype=dtype, device=device).as_strided(
            (cell.batch, shape.kv_heads, cell.length, dim), (dim, tokens * dim, dim, 1)
        )
        for _ in range(2)
    ]
    return [(views[0], views[1])] * shape.layers


def filled_cache(
    side: str, model: PreTrainedModel, plan: Plan, cell: Cell, tokens: int, seed: int, device: str
) -> FilledCache:
    """Returns the cache of a side (`MODELS`, or `STATIC`) with a cell's tokens in it, and room for so many steps."""
    shape, room = plan.model, cell.length + tokens + SPARE_TOKENS
    if side == STATIC:
        return FilledStaticCache(model.config, shape, cell, room, seed, device)
    if side == "dense":
        return FilledDynamicCache(model.config, shape, cell, seed, device)
    return FilledPlanCache(plan if side == "plan" else Plan.full(shape), cell, room, seed, device)


class DecodeTurn:
    """One turn of decoding: steps of one token for every row, from a cell's length on.

    Ids are `[steps, batch, 1]`; the first step belongs to `prepare` and is not timed.
    """

    def __init__(
        self, forward: Callable[..., Any], filled: FilledCache, ids: torch.Tensor, length: int, device: str
    ) -> None:
        self.forward, self._filled, self._ids, self._device = forward, filled, ids, device
        columns = torch.arange(length, length + len(ids), device=device)
        self._positions = columns[:, None, None].expand(ids.shape).contiguous()
        self._cache: Any = None

    def use(self, cache: Any) -> None:
        """Takes the steps on this cache, once, in place of one that is put back before every turn."""
        self._cache = cache

    @property
    def steps(self) -> int:
        """Steps that `run` takes."""
        return len(self._ids) - 1

    @property
    def routes(self) -> list[str]:
        """The routes that the layers of its last steps took, the most frequent first; none for a cache that knows of none."""
        found: Counter[str] = getattr(self._cache, "step_routes", None) or Counter()
        return [name for name, _ in found.most_common()]

    def prepare(self) -> None:
        """Puts the cache back to the cell's length and takes the first step."""
        self._cache = None  # its blocks are free again before they are needed
        self._cache = self._filled.fresh()
        self._step(0)
        synchronize(self._device)

    def run(self) -> None:
        """Takes the other steps: what is timed."""
        for step in range(1, len(self._ids)):
            self._step(step)
        synchronize(self._device)

    def _step(self, step: int) -> None:
        with torch.no_grad():
            self.forward(
                input_ids=self._ids[step],
                position_ids=self._positions[step],
                use_cache=True,
                **cache_argument(self._cache),
            )


class PrefillTurn:
    """One turn of prefilling: a prompt for every row, `[batch, length]`, in one forward."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, device: str) -> None:
        self._model, self._ids, self._device = model, ids, device
        self._cache: Any = None

    def prepare(self) -> None:
        """Forgets the cache of the turn before."""
        self._cache = None

    def run(self) -> None:
        """Prefills: what is timed."""
        with torch.no_grad():
            self._cache = returned_cache(kept_logits(self._model, 1, input_ids=self._ids, use_cache=True))
        synchronize(self._device)


def random_ids(size: tuple[int, ...], vocabulary: int, seed: int, device: str) -> torch.Tensor:
    """Returns token ids, the same ones for the same seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, vocabulary, size, generator=generator).to(device)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns how many token ids a model takes."""
    embedding: Any = model.get_input_embeddings()
    if embedding is None or not getattr(embedding, "num_embeddings", 0):
        raise MoaCompressError(f"{type(model).__name__} has no table of embeddings, so no prompts can be drawn for it")
    return int(embedding.num_embeddings)

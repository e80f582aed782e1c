"""Classes of KV heads: those of one class lie side by side in the same cache blocks, so a sequence frees them together.

Every class costs vLLM a block table, and time in every step; heads of different rules in one class keep what the widest rule
sees. What gates select lies in classes of its own, whose blocks are filled one unit of 16 tokens after the other, whatever KV
heads they are of. No vLLM is needed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.core.errors import UsageError
from moacompress.kernels.kv_format import refuse_outside
from moacompress.kernels.kv_parts import KVPart
from moacompress.rules.formats import FORMATS
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SCORE_BYTES, Rule
from moacompress.rules.windows import BLOCK, Span, block_runs
from moacompress.serving.vllm.freed_blocks import FreedBlocks, freed_blocks
from moacompress.serving.vllm.selected_blocks import SelectedBlocks, selected_blocks

MOST_CLASSES = 18
"""How many classes there are at most where nobody says otherwise."""
_ALIGNMENT = 64
_SIZES = 128


@dataclass(frozen=True)
class KVHead:
    """One KV head of the model, under the plan's rule, whose `Span` has the numbers `span`."""

    layer: int
    index: int
    rule: Rule
    span: tuple[int, ...]
    key: KVPart
    value: KVPart

    @property
    def nbytes(self) -> int:
        """Bytes of its part of a block."""
        scores = BLOCK * SCORE_BYTES if self.rule.selects else 0
        return self.key.nbytes + self.value.nbytes + scores

    @property
    def select(self) -> tuple[int, ...]:
        """The numbers of its span, and of what its gate keeps."""
        return *self.span, self.rule.select_alpha, self.rule.select_beta_q


@dataclass(frozen=True)
class KVClass:
    """KV heads that share blocks.

    Attributes:
        heads: in the order in which they lie in a block.
        units: how many units a block has of the tokens that the heads' gates select; 0 where it has those of sinks and windows.
    """

    heads: tuple[KVHead, ...]
    units: int = 0

    @property
    def selected(self) -> bool:
        """Whether the blocks have the tokens that gates select."""
        return self.units > 0

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit: those of the heads' largest part of a block."""
        return max(head.nbytes for head in self.heads)

    @property
    def rules(self) -> tuple[tuple[int, ...], ...]:
        """What the blocks follow from: the different spans of its heads, ascending, or the `KVHead.select` of each."""
        if self.selected:
            return tuple(head.select for head in self.heads)
        return tuple(sorted({head.span for head in self.heads}))

    @property
    def blocks(self) -> FreedBlocks | SelectedBlocks:
        """Which blocks a sequence holds."""
        return selected_blocks(self.rules, self.units) if self.selected else freed_blocks(self.rules)

    def places(self) -> Iterator[tuple[KVHead, int]]:
        """Yields every head and the byte of a block that its keys begin at; its values follow, and scores where it selects."""
        at = 0
        for head in self.heads:
            yield head, at
            at += head.nbytes


@dataclass(frozen=True)
class KVClasses:
    """All KV heads of a model in classes, those of sinks and windows first; blocks of all have one size."""

    classes: tuple[KVClass, ...]
    block_bytes: int
    dtype: torch.dtype

    def held_bytes(self, n: int) -> int:
        """Returns the bytes that a sequence of `n` tokens holds."""
        return self.block_bytes * sum(one.blocks.held(n) for one in self.classes)


def kv_heads(plan: Plan, dtype: torch.dtype) -> list[KVHead]:
    """Returns the KV heads of a plan's model, whose cache is of some dtype, layer by layer."""
    found = []
    refuse_outside(plan.formats, "vLLM's plugin", "run the plan in transformers")
    for layer, (row, native) in enumerate(zip(plan.rules, plan.model.native_windows, strict=True)):
        for index, rule in enumerate(row):
            codes = (FORMATS[name].code for name in (rule.key_format, rule.value_format))
            key, value = (KVPart(code, plan.model.head_dim, dtype, bool(side)) for side, code in enumerate(codes))
            span = tuple(int(number) for number in rule.span(plan.min_window, native))
            found.append(KVHead(layer, index, rule, span, key, value))
    return found


def kv_classes(plan: Plan, dtype: torch.dtype, most: int = MOST_CLASSES, length: int | None = None) -> KVClasses:
    """Returns the classes, `most` of them, that take the fewest bytes for a sequence of a length, or of the plan's longest.

    Heads are laid into blocks, those that keep most first. All blocks have one size, and many are tried out.

    Raises:
        UsageError: `most` is less than the model's different sliding windows, for heads of two share no blocks, or leaves none
            for what gates select.
    """
    n, heads = length or plan.stated_lengths[-1], kv_heads(plan, dtype)
    natives = len({head.span[-1] for head in heads})
    kinds = natives + plan.selects
    if most < kinds:
        gates = ", and tokens that gates select" if plan.selects else ""
        raise UsageError(
            f"{most} classes of KV heads are too few: the model has {natives} different sliding windows{gates}; give more"
        )
    heads.sort(key=lambda head: (head.span[-1], -freed_blocks((head.span,)).held(n), head.span, head.nbytes))
    sizes, kind = np.array([head.nbytes for head in heads]), [head.span[-1] for head in heads]
    (front, sinks), (window, _) = block_runs(np.int64(n), Span(*np.array([head.span for head in heads], np.int64).T))
    blocks = -(-n // BLOCK)

    def held(some: list[int]) -> int:
        gap = sinks[some].max()
        return int(blocks - front[some].min() - max(window[some].min() - gap, 0))

    best: tuple[int, int, int, list[KVClass]] | None = None
    for size, selecting in product(_sizes(sizes, most), _selecting(heads)):
        windows = _packed(sizes.tolist(), kind, size)
        count = len(windows) + len(selecting)
        if count > most and (best is not None or size < sizes.sum() or len(selecting) > 1):
            continue
        chosen = [KVClass(some, size // max(head.nbytes for head in some)) for some in selecting]
        taken = size * (sum(map(held, windows)) + sum(one.blocks.held(n) for one in chosen))
        classes = [KVClass(tuple(heads[index] for index in some)) for some in windows]
        if best is None or (taken, count, size) < best[:3]:
            best = taken, count, size, [*classes, *chosen]
    assert best is not None  # a block for all heads of one kind is large enough
    return KVClasses(tuple(best[3]), best[2], dtype)


def _selecting(heads: Sequence[KVHead]) -> list[list[tuple[KVHead, ...]]]:
    """Returns ways to put the KV heads that select into classes: all in one, and those of each size in one."""
    there = [head for head in heads if head.rule.selects]
    sizes = sorted({head.nbytes for head in there})
    ways = [[tuple(there)], [tuple(head for head in there if head.nbytes == size) for size in sizes]]
    return ways[: len(sizes)] if there else [[]]


def _sizes(sizes: Ints, most: int) -> list[int]:
    """Returns the sizes of a block that are tried out, ascending: sums of some first heads, and of all."""
    whole = int(sizes.sum())
    sums = {-(-max(int(one), int(sizes.max())) // _ALIGNMENT) * _ALIGNMENT for one in sizes.cumsum()}
    wanted = sorted(size for size in sums if whole <= size * most)
    return [*wanted[:: -(-len(wanted) // _SIZES) or 1], -(-whole // _ALIGNMENT) * _ALIGNMENT]


def _packed(sizes: list[int], kinds: list[int], size: int) -> list[list[int]]:
    """Returns heads, by their numbers, in blocks of `size` bytes: each has the first that is left and the next ones that fit.

    Heads of different kinds share no block.

    A head that keeps less than those before it costs nothing there, so room is filled with what comes later.
    """
    left, found = [*range(len(sizes))], []
    while left:
        some, room, rest = list[int](), size, list[int]()
        for index in left:
            fits = sizes[index] <= room and kinds[index] == kinds[left[0]]
            (some if fits else rest).append(index)
            room -= sizes[index] if fits else 0
        found.append(some)
        left = rest
    return found

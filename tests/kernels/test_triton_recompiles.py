"""How often Triton compiles a kernel: once for a model and a plan, whatever the lengths, counts and widths."""

from __future__ import annotations

import inspect
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.kernels.arguments import CacheView, SelectedView, as_tensors
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.triton.work_lists import UNIT, to_device
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests.kernels import test_selecting
from tests.runtime.test_ring import DIM, MIN_WINDOW, SCORES, Pair

CPU = torch.device("cpu")


class Variants:
    """Notes what kernels that the interpreter runs would be compiled for.

    Attributes:
        keys: by the names of the kernels.
    """

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend

        from moacompress.kernels.triton import append_kernels, decode_kernels, prefill_kernels, select_kernels

        self.keys: defaultdict[str, set[Any]] = defaultdict(set)
        self.kernels = (
            *(append_kernels.append, append_kernels.append_next, decode_kernels.split, decode_kernels.merge),
            *(prefill_kernels.attend_chunk, select_kernels.select, select_kernels.move),
        )
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.hooks = [self._hook(kernel, backend) for kernel in self.kernels]

    def _hook(self, kernel: Any, backend: Any) -> Callable[..., None]:
        from triton.runtime.jit import JITFunction, create_function_from_signature

        compiled = JITFunction(kernel.fn, **kernel.kwargs)
        specialise = create_function_from_signature(compiled.signature, compiled.params, backend)

        def note(*given: Any, **constants: Any) -> None:
            _, found, options = specialise(*given, **constants)
            self.keys[kernel.fn.__name__].add((tuple(found), str(options)))

        kernel.add_pre_run_hook(note)
        return note

    def stop(self) -> None:
        for kernel, hook in zip(self.kernels, self.hooks, strict=True):
            kernel.pre_run_hooks.remove(hook)

    def of(self, *kernels: str) -> int:
        """Returns the most variants of a kernel that was launched; all of these were, and no others."""
        assert self.keys.keys() == set(kernels)
        return max(map(len, self.keys.values()))


@pytest.fixture
def interpreted(use_backend: Callable[[str], Any]) -> Any:
    """The kernels by the interpreter, with a card or without."""
    return use_backend("triton")


@pytest.fixture
def variants(interpreted: Any) -> Iterator[Variants]:
    """Of the kernels of the test."""
    found = Variants()
    yield found
    found.stop()


def test_numbers_that_may_be_one_have_no_methods(variants: Variants) -> None:
    """A 1 is a constant to Triton unless it is told otherwise, and a constant cannot be cast by `to`, as with one KV head."""
    for kernel in variants.kernels:
        cast = set(re.findall(r"\b([a-z]\w*)\.to\(", inspect.getsource(kernel.fn)))
        numbers = {name for name in kernel.arg_names if name.islower()}
        assert cast & numbers <= set(kernel.kwargs["do_not_specialize"] or ())


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 16), (17, 0, 5)], ids=str)
def test_lists_begin_at_whole_units(sizes: tuple[int, ...]) -> None:
    arrays = [np.arange(size) for size in sizes]
    for found, array in zip(to_device(arrays, CPU), arrays, strict=True):
        assert found.tolist() == array.tolist()
        assert found.storage_offset() * found.element_size() % UNIT == 0


def in_a_row(case: Any) -> Any:
    """The same with numbers that lie side by side, as those of a model do for every length."""
    return replace(case, **{name: getattr(case, name).contiguous() for name in ("query", "key", "value")})


SIZES = {"rows": 2, "kv_heads": 2, "group": 2, "dim": 16, "value_dim": 16, "rules": [(4, 20, 0), (16, 0, 500)]}
SIZES |= {"min_window": 16, "native_window": 0, "softcap": 0.0, "logits": False, "cuts": 0}


def test_decode_steps(interpreted: Any, random_case: Callable[..., Any], variants: Variants) -> None:
    """One for each pair of formats."""
    for past in (1, 16, 17, 32, 250, 333):
        case = random_case(past, torch.float32, past=past, tokens=1, formats=[(0, 0), (1, 2)], **SIZES)
        in_a_row(case).decoded(interpreted)
    assert len(variants.keys["split"]) == 2
    assert len(variants.keys["merge"]) == 1


def test_chunks(interpreted: Any, random_case: Callable[..., Any], variants: Variants) -> None:
    """Two: what is not finite is looked at again."""
    for past, tokens in ((1, 1), (17, 16), (64, 33), (250, 2)):
        case = random_case(tokens, torch.float32, past=past, tokens=tokens, formats=[(0, 0)] * 2, **SIZES)
        in_a_row(case).keeping(random.Random(past)).prefilled(interpreted)
    assert variants.of("attend_chunk") == 2


def test_tokens_that_are_written(interpreted: Any, variants: Variants) -> None:
    parts = KVPart(1, 16, torch.float32), KVPart(2, 16, torch.float32, values=True)
    memory = [part.new(8, CPU) for part in parts]
    for columns, count in ((1, 1), (16, 16), (17, 17), (33, 5)):
        chunk, slots = torch.randn(1, 2, columns, 16), torch.arange(count)
        interpreted.append(parts, chunk, chunk, keys=memory[:1], values=memory[1:], sources=slots, slots=slots)
    assert variants.of("append") == 1


def test_tokens_that_are_selected_in_tables(interpreted: Any, variants: Variants) -> None:
    """Tables of windows and of selected tokens grow as they like."""
    rules = RuleTable.of([Rule(4, 20, 0, select_alpha=9)], MIN_WINDOW)
    pool = test_selecting.Pool(rules, torch.float32)
    for segment in (*pool.keys, *pool.values):
        segment.zero_()
    for length, width, selected in ((60, 4, 1), (97, 9, 2), (113, 8, 9)):
        interpreted.decode_selecting(
            torch.randn(2, 2, 16),
            cache=CacheView(pool.keys, pool.values, pool.table[..., :width].contiguous(), 16),
            selected=SelectedView(pool.selected[..., :selected].contiguous(), pool.scores),
            lengths=torch.tensor([length, length - 7]),
            rules=as_tensors(rules),
            scores=SCORES,
        )
    assert len(variants.keys["select"]) == 1
    assert len(variants.keys["merge"]) == 1
    assert len(variants.keys["split"]) == 1


class InterpretedPair(Pair):
    """One whose chunks are written by the kernels too."""

    def plainly(self) -> AbstractContextManager[object]:
        return nullcontext()


def test_steps_in_rings(interpreted: Any, variants: Variants) -> None:
    """Chunks of any length between them, and rings of any size; copies of selected tokens, too."""
    rules = RuleTable.of([Rule(4, 0, 0, select_alpha=5), Rule(4, 0, 300, select_alpha=17)], MIN_WINDOW)
    counts = []
    for reserve, prompt in ((None, 30), (200, 24), (512, 33)):
        pair = InterpretedPair(rules, 1, 0, reserve)
        layer = pair.layers[0]
        del pair.layers[1:]
        for tokens in (prompt, 16, 1):
            pair.chunk(tokens)
            key, value, scores = pair.tokens(1)
            layer.update(key, value)
            assert scores is not None
            assert layer.step_in_ring(torch.randn(1, 4, 1, DIM), SCORES, scores[:, :, 0], interpreted) is not None
        counts.append({name: len(found) for name, found in variants.keys.items()})
    assert counts[0].keys() >= {"append", "append_next", "select", "move", "split", "merge"}
    assert counts[0] == counts[1] == counts[2]
    assert counts[0].pop("split") == 2  # selected tokens are those of rows with one KV head
    assert set(counts[0].values()) == {1}, variants.keys

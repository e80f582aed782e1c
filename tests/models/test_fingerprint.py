"""The fingerprint of weights: every number counts, and loads of one checkpoint agree."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moacompress.core.errors import ModelError
from moacompress.models import fingerprint
from moacompress.models.fingerprint import weights_fingerprint
from moacompress.models.source import load_source, model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach
from moacompress.runtime.linear import use_kernels

PLANS = Path(__file__).resolve().parents[2] / "docs" / "plans"


class Made(nn.Module):
    """A module of known numbers, with a tied tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.arange(6000).reshape(60, 100) / 512 - 3)
        self.b = nn.Linear(3, 5)
        self.b.weight.data = torch.arange(15).reshape(5, 3) / 8.0
        self.b.bias.data = torch.arange(5) / -4.0
        self.c = self.b


def test_numbers_names_and_shapes_count() -> None:
    def module(name: str, *shape: int) -> nn.Module:
        made = nn.Module()
        made.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        return made

    kinds = [module("a", 2, 6), module("b", 2, 6), module("a", 6, 2), module("a", 12), module("a", 0)]
    kinds[0].get_parameter("a").data[1, 5] += 0.01
    kinds.append(module("a", 2, 6))
    assert len({weights_fingerprint(kind) for kind in kinds}) == len(kinds)


def test_dtypes_agree_where_they_hold_the_checkpoint(tiny_model: Callable[..., Any]) -> None:
    def loaded(dtype: torch.dtype, *by_way_of: torch.dtype) -> str:
        model = tiny_model("llama")
        for step in (*by_way_of, dtype):
            model.to(step)
        return weights_fingerprint(model)

    single, half = torch.float32, torch.bfloat16
    assert loaded(half) == loaded(single) == loaded(half, single) == loaded(single, half) == loaded(torch.float64)
    exact = Made()  # all its numbers are whole or few binary places
    exact.a.data = exact.a.data.to(half).to(single)
    before = weights_fingerprint(exact)
    assert weights_fingerprint(exact.to(torch.float16)) == before


def test_what_has_no_one_form_has_one_fingerprint() -> None:
    """NaNs with other payloads and signs, signed zeros and numbers below the normal range."""

    def changed_bits(made: Made, bits: list[int]) -> Made:
        made.a.data[0, : len(bits)] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
        return made

    def signed(bits: int) -> int:
        return bits - (1 << 32) if bits >= 1 << 31 else bits

    nans = [signed(bits) for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)]
    zeros = [signed(bits) for bits in (0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007F0000)]
    for alike in (nans, zeros):
        assert len({weights_fingerprint(changed_bits(Made(), [bits])) for bits in alike}) == 1
    infinite = [signed(bits) for bits in (0x7F800000, 0xFF800000)]
    assert len({weights_fingerprint(changed_bits(Made(), [bits])) for bits in (nans[0], zeros[0], *infinite)}) == 4
    made = changed_bits(Made(), [nans[4], zeros[1], infinite[1]])
    assert weights_fingerprint(made) == weights_fingerprint(made.to(torch.bfloat16))


def test_tied_weights_are_as_equal_ones(tiny_model: Callable[..., Any]) -> None:
    tied, apart = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama", tie_word_embeddings=False)
    apart.load_state_dict(tied.state_dict())
    assert weights_fingerprint(tied) == weights_fingerprint(apart)
    apart.lm_head.weight.data[3, 3] += 1
    assert weights_fingerprint(tied) != weights_fingerprint(apart)


def test_the_layout_in_memory_does_not_count() -> None:
    made = Made()
    made.a.data = made.a.data.t().contiguous().t()
    assert not made.a.is_contiguous()
    assert weights_fingerprint(made) == weights_fingerprint(Made())
    spread = Made()
    spread.a.data = torch.zeros(120, 100)[::2].copy_(spread.a.data)
    assert weights_fingerprint(spread) == weights_fingerprint(Made())


def test_kernels_and_plans_do_not_count(tiny_model: Callable[..., Any], random_plan: Callable[..., Plan]) -> None:
    model = tiny_model("llama")
    before = weights_fingerprint(model)
    use_kernels(model)
    assert weights_fingerprint(model) == before
    attach(model, random_plan(model_shape(model), 1))
    assert weights_fingerprint(model) == before
    assert weights_fingerprint(detach(model)) == before


def test_saved_buffers_count() -> None:
    def module(values: torch.Tensor, persistent: bool = True) -> nn.Module:
        made = Made()
        made.register_buffer("bias", values, persistent=persistent)
        return made

    ones = torch.ones(3)
    assert weights_fingerprint(module(ones)) == weights_fingerprint(module(ones.to(torch.bfloat16)))
    assert weights_fingerprint(module(ones)) != weights_fingerprint(module(2 * ones))
    assert weights_fingerprint(module(ones, persistent=False)) == weights_fingerprint(Made())
    whole = {weights_fingerprint(module(torch.tensor(numbers))) for numbers in ([1, 2], [2, 1], [True, False])}
    assert len(whole) == 3


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        made = Made()
    with pytest.raises(ModelError, match="not all in memory: a is on the device 'meta', and no device map"):
        weights_fingerprint(made)


def test_threads_do_not_change_it() -> None:
    """The hash is of chunks of a fixed size, whoever computes them."""
    big = nn.Module()
    big.a = nn.Parameter((torch.arange(2 * fingerprint.CHUNK + 5) % 251).to(torch.bfloat16))
    assert weights_fingerprint(big) == "2-649cec2a7168b720"
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert weights_fingerprint(big) == "2-649cec2a7168b720"
    finally:
        torch.set_num_threads(threads)
    big.a.data[-1] += 1
    assert weights_fingerprint(big) != "2-649cec2a7168b720"


def test_few_chunks_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "CHUNK", 1 << 8)
    lock, held, most = threading.Lock(), 0, 0

    def count(function: Callable[[Any], Any], change: int) -> Callable[[Any], Any]:
        def counted(data: Any) -> Any:
            nonlocal held, most
            found = function(data)
            with lock:
                held += change
                most = max(most, held)
            return found

        return counted

    monkeypatch.setattr(fingerprint, "_flat_array", count(fingerprint._flat_array, 1))
    monkeypatch.setattr(fingerprint, "_hash", count(fingerprint._hash, -1))
    big = nn.Module()
    big.a = nn.Parameter(torch.zeros(1 << 16))
    weights_fingerprint(big)
    assert held == 0
    assert 1 <= most <= fingerprint.QUEUED * torch.get_num_threads() + 1


@pytest.mark.real
@pytest.mark.parametrize("model", ["smollm2", pytest.param("gemma", marks=pytest.mark.heavy)])
def test_published_plans_know_their_model(model: str, request: pytest.FixtureRequest) -> None:
    source = load_source(request.getfixturevalue(model))
    files = sorted(PLANS.glob(f"{model}*.json"))
    assert files
    for file in files:
        Plan.load(file).check_model(source.shape, weights=True)

"""Cases that are given a device: every tensor of theirs is there, laid out as it was, and what is written comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moacompress.kernels import dispatch
from moacompress.kernels.arguments import TransientTokens
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.triton.triton_backend import TritonBackend
from tests import gpu
from tests.kernels import test_append, test_selecting, test_triton
from tests.on_device import Copies, OnDevice
from tests.pretend_device import KIND, launch_there


@pytest.fixture
def on_device(
    use_backend: Callable[[str], Any], pretend_device: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Triton's kernels on the device that is not there: given a tensor of the CPU, they fail."""
    use_backend("triton")
    launch_there(monkeypatch)
    found = OnDevice(f"{KIND}:0")
    monkeypatch.setattr(dispatch, "_backends", {**dispatch._backends, found.name: found})
    dispatch.forget()
    with pretend_device():
        yield found


@pytest.mark.parametrize("formats", [None, "any"])
def test_decode_and_prefill(formats: str | None, on_device: OnDevice, random_case: Any, close: Any) -> None:
    case = random_case(211, torch.float32, tokens=5, past=60, rows=2, cuts=2, logits=True, formats=formats, dim=16)
    close(case.decoded(on_device), case.decoded(REFERENCE), torch.float32)
    case = case.keeping(random.Random(0))
    assert isinstance(case.transient, TransientTokens)
    close(case.prefilled(on_device), case.prefilled(REFERENCE), torch.float32)


def test_gradients(on_device: OnDevice, random_case: Any) -> None:
    test_triton.test_gradients_are_the_references(40, on_device, random_case)


def test_tokens_are_written(on_device: OnDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 4):  # of which the second writes values alone
        test_append.test_bytes_are_those_of_the_definition(seed, on_device, monkeypatch)


def test_tokens_are_selected_and_moved(
    on_device: OnDevice, kernels_cannot_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_selecting, "TOKENS", 60)
    given: Callable[[str], Any] = {"triton": on_device, "cpu": None}.__getitem__
    test_selecting.test_triton_selects_to_the_bit(1, "triton", given, kernels_cannot_run)
    test_selecting.test_tokens_are_moved_with_their_scores("triton", given)


def test_a_kernel_that_is_given_a_tensor_of_the_cpu_fails(on_device: OnDevice, random_case: Any) -> None:
    case = random_case(3, torch.float32, tokens=1, past=40)
    there = Copies(on_device.device)
    with pytest.raises(RuntimeError, match="(is given a tensor of the CPU|on the same device)"):
        TritonBackend().decode(
            there.of(case.query[:, :, 0]), cache=case.cache, lengths=case.past, rules=case.rules, scores=case.scores
        )


def test_which_tests_run_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has the interpreter, or a GPU, and is told by its arguments which."""
    for arguments, asked in (
        (["-m", "not heavy"], False),
        (["-m", "heavy and not gpu"], False),
        (["tests", "-m", "gpu and not heavy"], True),
        (["-mgpu"], True),
    ):
        monkeypatch.setenv(gpu.VARIABLE, "")
        gpu.begin(arguments)
        assert gpu.asked() == asked, arguments

"""Models under plans, their decode steps, and the calls that these make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moacompress.kernels import dispatch
from moacompress.kernels.cpu import cpu_backend
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach
from moacompress.runtime.decode import all_layers
from tests.pretend_device import launch_there
from tests.runtime.forwards import in_parts


@pytest.fixture
def token_ids() -> Callable[..., torch.Tensor]:
    """Returns a function that draws token ids: `token_ids(rows, length)`."""

    def draw(rows: int, length: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, 160, (rows, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's cache is: on the CPU, for Triton's interpreter, and on a GPU."""
    return str(request.param)


@pytest.fixture
def compiled_kernels(kernels_cannot_run: Callable[[str | None], None]) -> None:
    """Skips a test where the compiled kernels do not run; see `kernels_cannot_run`."""
    if dispatch.chosen().name != "cpu":
        kernels_cannot_run(dispatch.chosen().reason)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Has `torch.compile` know no graphs of other tests, nor other tests those of this one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(tiny_model: Any, random_plan: Any) -> Callable[..., PreTrainedModel]:
    """Makes a tiny model of a family under a plan, a random one of a seed or what makes one for it, with nothing trained."""

    def make(
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        plan: int | Callable[[Any], Plan] = 3,
        **config: Any,
    ) -> PreTrainedModel:
        made = tiny_model(family, **config).to(dtype)
        return attach(made, random_plan(model_shape(made), plan) if isinstance(plan, int) else plan(made))

    return make


@pytest.fixture
def steps() -> Callable[..., torch.Tensor]:
    """Returns logits of some steps of a model after a prompt of 50 tokens, `[rows, count, vocabulary]`."""

    def run(model: PreTrainedModel, rows: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(3, model.config.vocab_size, (rows, 50 + count), generator=generator)
        return in_parts(model, ids, [50])[:, 50:]

    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts calls for all layers, readings of layers and of caches: a dictionary that tests may clear."""
    found = {"steps": 0, "layers": 0, "caches": 0, "cache": 0}

    def counted(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **rest: Any) -> Any:
            found[name] += 1
            return own(*arguments, **rest)

        return call

    for name, kind, of in (
        ("steps", cpu_backend._CpuCaches, "step"),
        ("layers", CpuBackend, "read_layers"),
        ("caches", cpu_backend._CpuLayers, "read_caches"),
        ("cache", cpu_backend._CpuCaches, "read_again"),
    ):
        monkeypatch.setattr(kind, of, counted(name, getattr(kind, of)))
    return found


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch, steps: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns logits of steps with each layer doing its part by itself."""

    def run(*arguments: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(all_layers.Stack, "begin", lambda *nothing: None)
            return steps(*arguments)

    return run


class _OnPretendDevice:
    """Triton's kernels, which take tensors on the pretended device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moacompress.kernels.triton import triton_backend

        self.patch = monkeypatch
        launch_there(monkeypatch, cpu_too=True)
        monkeypatch.setattr(triton_backend.TritonBackend, "supports", lambda backend, device, dtype: True)

    def forbid_copies(self) -> None:
        """From now on what sends numbers from the host fails."""
        from moacompress.kernels.triton import ring_steps

        self.patch.setattr(ring_steps, "to_device", None)
        self.patch.setattr(torch, "from_numpy", None)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> _OnPretendDevice:
    return _OnPretendDevice(monkeypatch)

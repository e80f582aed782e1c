"""Decoding whose tokens are chosen on the device, beside transformers' own `generate`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moacompress
from moacompress.core.errors import UnsupportedError
from moacompress.models.source import model_shape
from moacompress.rules.share import Share
from moacompress.runtime import PlanCache, generate_on_device
from moacompress.runtime.cache import pool, ring
from moacompress.runtime.hf import ops
from moacompress.runtime.hf.device_generation import DeviceSteps, Sampling, greedy
from tests import plan_kinds
from tests.pretend_device import KIND
from tests.runtime.forwards import GREEDY, plan_of

PLANS: dict[str, Callable[[Any], Any]] = {
    "spans": lambda model: plan_kinds.random_plan(model_shape(model), 1),
    "formats": lambda model: plan_kinds.random_plan(model_shape(model), 1, formats=True),
    "gates": lambda model: plan_kinds.gated_plan(model, 1),
    "shares": lambda model: plan_kinds.with_shares(plan_kinds.windows(model), (None, Share(0, (1, 0)))),
}
NO_ENDS = torch.tensor([], dtype=torch.int64)


@pytest.fixture
def under_plan(model: Callable[..., Any]) -> Callable[[str], Any]:
    return lambda kind: model(plan=PLANS[kind], num_hidden_layers=2)


def prompts(model: Any, *padding: int, length: int = 40) -> dict[str, Any]:
    """Returns prompts of which so many tokens are padding."""
    ids = torch.randint(10, model.config.vocab_size, (len(padding), length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_places_for_tokens_come_as_they_are_needed(
    under_plan: Callable[[str], Any], use_backend: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = under_plan("spans")
    given = prompts(model, 0, 7)
    wanted = model.generate(**given, **GREEDY, max_new_tokens=50)
    use_backend("reference")
    monkeypatch.setattr(pool, "AT_ONCE", 10)
    monkeypatch.setattr(ring, "AHEAD", 7)
    assert torch.equal(generate_on_device(model, **given, max_new_tokens=50, eos_token_id=[]), wanted)
    end = int(wanted[0, 65])
    wanted = model.generate(**given, **{**GREEDY, "eos_token_id": end}, max_new_tokens=50)
    ends = [end, int(wanted[1, 70])]
    found = generate_on_device(model, **given, max_new_tokens=10**9, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(found[0, :66], wanted[0, :66])
    assert 66 <= found.shape[1] <= 90


def test_graphs_are_captured_again_where_rings_are_full(
    under_plan: Callable[[str], Any], triton: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in for a graph makes a plain step, and sees to it that there is a place for its token."""
    model = under_plan("spans")
    given = prompts(model, 0, length=20)
    wanted = model.generate(**given, **GREEDY, max_new_tokens=24)
    captures = []

    def capture(steps: DeviceSteps) -> None:
        captures.append(steps)
        steps.step()
        steps._graph = SimpleNamespace(replay=lambda: replay(steps))

    def replay(steps: DeviceSteps) -> None:
        assert not steps.cache.is_full
        steps.step()

    monkeypatch.setattr(DeviceSteps, "_can_capture", True)
    monkeypatch.setattr(DeviceSteps, "_capture", capture)
    monkeypatch.setattr(PlanCache, "count_steps", lambda cache, steps: None)  # the stand-in's step is counted as it is
    for at_once, ahead, least in ((8, 7, 3), (pool.AT_ONCE, 7, 1)):
        monkeypatch.setattr(pool, "AT_ONCE", at_once)
        monkeypatch.setattr(ring, "AHEAD", ahead)
        captures.clear()
        assert torch.equal(generate_on_device(model, **given, max_new_tokens=24, eos_token_id=[]), wanted)
        assert (len(captures) >= least) if least > 1 else len(captures) == 1


@pytest.mark.parametrize(("kind", "look_every"), [("formats", 1), ("gates", 3), ("shares", 100)])
def test_rows_end_as_they_do_in_transformers(kind: str, look_every: int, under_plan: Callable[[str], Any]) -> None:
    model = under_plan(kind)
    given = prompts(model, 0, 7, 3)
    free = model.generate(**given, max_new_tokens=20, do_sample=False)[:, 40:]
    ends = sorted({int(free[0, 3]), int(free[1, 9]), int(free[2, 6])})
    for eos in (ends, ends[:1]):
        asked = {**given, "max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": 0}
        wanted = model.generate(**asked, do_sample=False)
        assert torch.equal(generate_on_device(model, **asked, look_every=look_every), wanted)
    assert wanted.shape[1] <= 60


@pytest.mark.parametrize("drawn", [{"temperature": 0.7, "top_k": 9}, {"temperature": 1.3, "top_p": 0.8}], ids=str)
def test_sampling_is_transformers(drawn: dict[str, Any], under_plan: Callable[[str], Any]) -> None:
    model = under_plan("spans")
    given = prompts(model, 0, 7)
    torch.manual_seed(1)
    kept = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, **drawn}
    wanted = model.generate(**given, max_new_tokens=20, do_sample=True, **kept)
    torch.manual_seed(1)
    assert torch.equal(generate_on_device(model, **given, max_new_tokens=20, choose=Sampling(**drawn)), wanted)
    seeded = [Sampling(generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    choices = [generate_on_device(model, **given, max_new_tokens=20, choose=choose) for choose in seeded]
    assert torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2])


def test_what_cannot_be_is_refused(under_plan: Callable[[str], Any], tiny_model: Callable[..., Any]) -> None:
    model = under_plan("spans")
    given = prompts(model, 0, 7)
    with pytest.raises(UnsupportedError, match="max_new_tokens=0"):
        generate_on_device(model, **given, max_new_tokens=0)
    with pytest.raises(UnsupportedError, match="on the left"):
        generate_on_device(model, given["input_ids"], given["attention_mask"].flip(1), max_new_tokens=3)
    with pytest.raises(UnsupportedError, match="under a plan"):
        generate_on_device(tiny_model("llama"), **given, max_new_tokens=3)


def steps_of(model: Any, given: dict[str, torch.Tensor], tokens: int) -> DeviceSteps:
    """Returns steps after prompts without padding."""
    cache = PlanCache(plan_of(model), reserve=20 + tokens)
    first = model(given["input_ids"], cache=cache).logits[:, -1].argmax(-1)
    lengths = torch.full_like(first, given["input_ids"].shape[1])
    return DeviceSteps(model, cache, first, lengths, tokens, greedy, NO_ENDS.to(first.device), 0)


class _Addresses:
    """A kernel that notes where the tensors that it is given are, but for those of the token alone."""

    passing = ("Query", "Key", "Value", "GateScores", "Out")

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: Any, **constants: Any) -> None:
            names = zip(self.arg_names, given, strict=False)
            kept = [
                each.data_ptr() if isinstance(each, torch.Tensor) else each
                for name, each in names
                if name not in self.passing
            ]
            self.seen.append((grid, kept, sorted(constants.items())))
            self.kernel[grid](*given, **constants)

        return launch


@pytest.mark.parametrize("kind", [pytest.param("shares", marks=pytest.mark.heavy), "gates"])
def test_a_steps_tensors_stay_where_they_are(
    kind: str,
    under_plan: Callable[[str], Any],
    triton: Any,
    use_backend: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over ten steps: what the step function reads and writes, and every argument of every kernel but the token's own."""
    from moacompress.kernels.triton import append_kernels, decode_kernels, select_kernels

    model = under_plan(kind)
    given = prompts(model, 0, length=20)
    with torch.no_grad():
        steps = steps_of(model, given, 12)
    steps.step()
    kernels = []
    for module, name in (
        (append_kernels, "append_next"),
        (decode_kernels, "split"),
        (decode_kernels, "merge"),
        (select_kernels, "select"),
    ):
        kernels.append(_Addresses(getattr(module, name)))
        monkeypatch.setattr(module, name, kernels[-1])
    places = [each.data_ptr() for each in steps.held]
    launches = []
    for _ in range(10):
        before = [len(kernel.seen) for kernel in kernels]
        steps.step()
        assert [each.data_ptr() for each in steps.held] == places
        launches.append([kernel.seen[begin:] for kernel, begin in zip(kernels, before, strict=True)])
    assert launches[0][1]
    assert all(each == launches[0] for each in launches)
    use_backend("reference")
    wanted = model.generate(**given, max_new_tokens=12, do_sample=False)[:, 20:]  # which may end
    assert wanted.shape[1] > 5
    assert torch.equal(steps.tokens[:, : wanted.shape[1]], wanted)


@pytest.mark.parametrize("kind", ["shares", "gates", pytest.param("formats", marks=pytest.mark.heavy)])
def test_a_step_asks_the_host_for_nothing(
    kind: str, triton: Any, launched: Any, under_plan: Callable[[str], Any], pretend_device: Any
) -> None:
    """Through a whole model: no copy to the host, and none from it of what rings need, once they are made."""
    model = under_plan(kind)
    plan, given = plan_of(model), prompts(model, 0, length=20)
    wanted = model.generate(**given, max_new_tokens=4, do_sample=False)
    moacompress.detach(model)
    with pretend_device() as device, torch.no_grad():
        model.to(KIND)
        moacompress.attach(model, plan)
        there = {name: each.to(KIND) for name, each in given.items()}
        steps = steps_of(model, there, 4)
        steps.advance()
        launched.forbid_copies()
        for _ in range(2):
            waits = len(device.waits)
            steps.advance()
            assert device.waits[waits:] == []
            assert not device.doubles
        assert torch.equal(steps.tokens.cpu(), wanted[:, 20:])


def test_nothing_else_captures_a_step(under_plan: Callable[[str], Any]) -> None:
    """What the host does in a step would be left out: `generate` is told so of caches, and compilers of every operator."""
    cache = PlanCache(plan_of(under_plan("shares")))
    assert not cache.is_compileable
    assert not any(layer.is_compileable for layer in cache.layers)
    names = re.findall(r"define\(\s*\"(\w+)\(", inspect.getsource(ops))
    assert {"begin", "attend", "step_layer"} <= {*names}
    for name in names:
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.moacompress, name).default.tags, name


def test_steps_that_the_device_made_are_counted(under_plan: Callable[[str], Any], triton: Any) -> None:
    """As if twice a step had been replayed: lengths, columns and blocks are those of a cache that was fed the tokens."""
    model = under_plan("shares")
    given = prompts(model, 0, length=20)
    with torch.no_grad():
        steps, fed = (steps_of(model, given, 9) for _ in range(2))
        for each in (steps, fed):
            each.step()
        steps.cache.count_steps(2)
        for _ in range(2):
            fed.step()
    caches = [each.cache for each in (steps, fed)]
    assert len({cache.get_seq_length() for cache in caches}) == 1
    assert len({cache.used_bytes() for cache in caches}) == 1
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert ours.lengths.tolist() == theirs.lengths.tolist() == [23]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PLANS)
def test_a_captured_step_is_the_step(kind: str, under_plan: Callable[[str], Any]) -> None:
    model = under_plan(kind).to("cuda", torch.bfloat16)
    given = {name: each.to("cuda") for name, each in prompts(model, 0, 7).items()}
    wanted = model.generate(**given, max_new_tokens=40, do_sample=False)
    assert torch.equal(generate_on_device(model, **given, max_new_tokens=40), wanted)

"""A decode step through all layers in one call: to the bit what the layers do one by one, wherever nothing else is in them."""

from __future__ import annotations

import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import Rotary
from moacompress.kernels.cpu import cpu_backend, library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import few_rows
from moacompress.runtime.compat.private_names import NORMS
from moacompress.runtime.decode import all_layers, fused
from moacompress.runtime.decode.routes import first_route
from tests.runtime.forwards import after_prompt, logits

pytestmark = pytest.mark.usefixtures("compiled_kernels")


@pytest.mark.parametrize(
    ("family", "dtype", "rows"),
    [
        ("llama", torch.float32, 3),
        ("llama", torch.bfloat16, -1),
        ("mistral", torch.bfloat16, 1),
        ("mistral", torch.float16, 0),
        ("qwen2", torch.float32, 0),
        ("qwen2", torch.float16, 3),
    ],
)
def test_it_is_to_the_bit_what_the_layers_do_one_by_one(family, dtype, rows, model, calls, one_by_one, steps):
    """With 0 rows for as many as are few, and -1 for one more."""
    made, most = model(family, dtype), few_rows(torch.zeros(1, dtype=dtype))
    rows = rows if rows > 0 else most - rows
    found = steps(made, rows, 40)
    few = rows <= most
    assert calls["layers"] == calls["caches"] == few
    assert calls["steps"] == few * (40 + calls["cache"])  # where there was no room a call was made again
    assert calls["cache"] > 0 or not few
    calls["steps"] = 0
    assert torch.equal(one_by_one(made, rows, 40), found)
    assert calls["steps"] == 0


def test_layers_that_differ_go_one_by_one(model, calls, steps):
    made = model()
    for name in NORMS:
        getattr(made.model.layers[1], name).variance_epsilon = 0.5
    steps(made, 2, 40)
    assert calls["steps"] == 0


def test_what_comes_between_layers_is_refused(model):
    made = model()
    own = made.model.layers[1].forward

    class Changing(nn.Module):
        def forward(self, hidden, **rest):
            return own(hidden * 2, **rest)

    (ids, cache), layers = after_prompt(made), made.model.layers
    with torch.no_grad():
        run = all_layers.StackStep(all_layers.Stack(fused.read_layers), tuple(layers), cache)
        hidden, rotary = torch.randn(2, 1, made.config.hidden_size), made.model.rotary_emb(torch.zeros(1), ids[:, 50:])
        out = run.step(layers[0], hidden, None, rotary, first_route)
        assert run.step(layers[1], out, None, rotary, first_route) is out
        with pytest.raises(UnsupportedError, match="between two decoder layers"):
            run.step(layers[1], out * 2, None, rotary, first_route)


def test_gradients_are_not_lost(model, calls):
    made = model()
    ids, cache = after_prompt(made)
    made.model.layers[1].mlp.up_proj.weight.requires_grad_()
    made(ids[:, 50:], cache=cache).logits.sum().backward()
    assert calls["steps"] == 0
    assert made.model.layers[1].mlp.up_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "error", "layers"),
    [("step_layers", KeyboardInterrupt, 3), ("step_layers", RuntimeError, 1), ("step_layer", KeyboardInterrupt, 3)],
)
def test_an_interrupted_call_leaves_a_cache_that_is_refused(name, error, layers, model, monkeypatch):
    """A signal is delivered when the call returns: the token is in the cache, and nothing has counted it."""
    made = model(num_hidden_layers=layers)
    ids, cache = after_prompt(made, 3)
    kind, name = (cpu_backend._CpuCaches, "step") if name == "step_layers" else (CpuBackend, name)
    own = getattr(kind, name)

    def interrupted(*arguments, **rest):
        own(*arguments, **rest)
        raise error

    with torch.no_grad():
        with monkeypatch.context() as patch:
            if kind is CpuBackend:
                patch.setattr(all_layers.Stack, "begin", lambda *nothing: None)
            made(ids[:, 50:51], cache=cache)
            patch.setattr(kind, name, interrupted)
            with pytest.raises(error):
                made(ids[:, 51:52], cache=cache)
        for use in (lambda: made(ids[:, 52:], cache=cache), cache.fork, lambda: pickle.dumps(cache)):
            with pytest.raises(UnsupportedError, match="middle of a forward"):
                use()
        cache.reset()
        made(ids[:, :50], cache=cache)
        made(ids[:, 50:51], cache=cache)


def test_an_interrupt_between_two_locks_holds_none(model):
    _, cache = after_prompt(model())

    class Interrupting:
        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *error):
            pass

    last = SimpleNamespace(lock=Interrupting())
    with pytest.raises(KeyboardInterrupt), all_layers._all_locked([*cache.layers, last]):
        pass

    def is_free(lock):
        found = lock.acquire(timeout=5)
        if found:
            lock.release()
        return found

    with ThreadPoolExecutor(1) as pool:
        assert all(pool.map(is_free, [layer.lock for layer in cache.layers]))


def test_a_cache_that_is_kept_does_not_keep_the_weights(model):
    made = model()
    ids, cache = after_prompt(made)
    logits(made, ids[:, 50:], cache=cache)
    assert cache.sealed_layers is not None
    weight = weakref.ref(made.model.layers[1].mlp.up_proj.weight)
    bound = cache.sealed_layers.bound
    del made
    gc.collect()
    assert weight() is None
    with pytest.raises(RuntimeError, match="are gone"):
        bound.step(torch.zeros(2, 1, 8), Rotary(*(torch.zeros(1, 1, 2),) * 2), 0)


def test_what_was_read_is_let_go(model, monkeypatch):
    forgotten = []
    for kind in ("layers", "caches"):
        own = getattr(library, f"forget_{kind}")

        def forget(number, own=own, kind=kind):
            forgotten.append(kind)
            own(number)

        monkeypatch.setattr(library, f"forget_{kind}", forget)
    made = model()
    ids, cache = after_prompt(made)
    logits(made, ids[:, 50:], cache=cache)
    number = cache.sealed_layers.bound.number
    assert forgotten == []
    cache.reset()
    gc.collect()
    assert forgotten == ["caches"]
    with pytest.raises(RuntimeError, match=f"no caches of the number {number}"):
        torch.ops.moacompress_cpu.step_layers(torch.zeros(2, 1, 8), *(torch.zeros(1, 1, 2),) * 2, number, 0)
    del made, cache
    gc.collect()
    assert forgotten == ["caches", "layers"]

"""A decode step through all layers in one call: to the bit what the layers do one by one, wherever nothing else is in them."""

from __future__ import annotations

import copy
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
from moacompress.rules.plan import Plan
from moacompress.runtime import PlanCache, attach, detach
from moacompress.runtime.compat.private_names import NORMS
from moacompress.runtime.decode import all_layers, fused
from moacompress.runtime.decode.routes import first_route

pytestmark = pytest.mark.usefixtures("compiled_kernels")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 0, -1], ids=["1", "3", "few", "more"])
def test_it_is_to_the_bit_what_the_layers_do_one_by_one(family, dtype, rows, model, calls, one_by_one, steps):
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


def test_the_first_token_is_for_the_layers(model, calls):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 30))
    cache = PlanCache(made._moacompress.plan)
    with torch.no_grad():
        found = torch.cat([made(ids[:, i : i + 1], cache=cache).logits for i in range(30)], 1)
        expected = made(ids, use_cache=False).logits
    assert calls["steps"] - calls["cache"] == 29  # there is no memory before it
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "way",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "lookup", "sampling"],
)
def test_generate_uses_it(way, model, calls, monkeypatch):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (1 if "prompt_lookup_num_tokens" in way else 2, 40))

    def generate():
        torch.manual_seed(3)
        return made.generate(ids, max_new_tokens=30, min_new_tokens=30, **{"do_sample": False} | way)

    found, used = generate(), calls["steps"]
    assert used > 0
    monkeypatch.setattr(all_layers.Stack, "begin", lambda *nothing: None)
    assert torch.equal(generate(), found)
    assert calls["steps"] == used


def test_padding_in_the_cache(model, calls, monkeypatch):
    """Which tokens of a prompt are real does not matter to a step after it, as long as the step's own are."""
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 60))
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0

    def run():
        with torch.no_grad():
            cache = made(ids[:, :50], attention_mask=mask[:, :50]).cache
            rows = [made(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache).logits for i in range(50, 60)]
        return torch.cat(rows, 1)

    found = run()
    assert calls["steps"] - calls["cache"] == 10
    monkeypatch.setattr(all_layers.Stack, "begin", lambda *nothing: None)
    assert torch.equal(run(), found)


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

    ids = torch.randint(3, made.config.vocab_size, (2, 51))
    layers = made.model.layers
    with torch.no_grad():
        cache = made(ids[:, :50]).cache
        run = all_layers.StackStep(all_layers.Stack(fused.read_layers), tuple(layers), cache)
        hidden, rotary = torch.randn(2, 1, made.config.hidden_size), made.model.rotary_emb(torch.zeros(1), ids[:, 50:])
        out = run.step(layers[0], hidden, None, rotary, first_route)
        assert run.step(layers[1], out, None, rotary, first_route) is out
        with pytest.raises(UnsupportedError, match="between two decoder layers"):
            run.step(layers[1], out * 2, None, rotary, first_route)


def test_gradients_are_not_lost(model, calls):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 51))
    with torch.no_grad():
        cache = made(ids[:, :50]).cache
    made.model.layers[1].mlp.up_proj.weight.requires_grad_()
    made(ids[:, 50:], cache=cache).logits.sum().backward()
    assert calls["steps"] == 0
    assert made.model.layers[1].mlp.up_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["step_layers", "step_layer"])
def test_an_interrupted_call_leaves_a_cache_that_is_refused(name, error, layers, model, monkeypatch):
    """A signal is delivered when the call returns: the token is in the cache, and nothing has counted it."""
    made = model(num_hidden_layers=layers)
    ids = torch.randint(3, made.config.vocab_size, (2, 53))
    kind, name = (cpu_backend._CpuCaches, "step") if name == "step_layers" else (CpuBackend, name)
    own = getattr(kind, name)

    def interrupted(*arguments, **rest):
        own(*arguments, **rest)
        raise error

    with torch.no_grad():
        cache = made(ids[:, :50]).cache
        with monkeypatch.context() as patch:
            if kind is CpuBackend:
                patch.setattr(all_layers.Stack, "begin", lambda *nothing: None)
            made(ids[:, 50:51], cache=cache)
            patch.setattr(kind, name, interrupted)
            with pytest.raises(error):
                made(ids[:, 51:52], cache=cache)
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="middle of a forward"):
                made(ids[:, 52:], cache=cache)
        cache.reset()
        made(ids[:, :50], cache=cache)
        made(ids[:, 50:51], cache=cache)


def test_an_interrupt_between_two_locks_holds_none(model):
    made = model()
    with torch.no_grad():
        cache = made(torch.randint(3, made.config.vocab_size, (2, 50))).cache

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


def test_a_square_weight_that_is_turned_is_seen(model, calls, one_by_one, steps):
    made = model()
    steps(made, 2, 40)
    weight = made.model.layers[1].self_attn.o_proj.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.t()
    found = steps(made, 2, 40)
    assert (found - one_by_one(made, 2, 40)).abs().max() < 1e-5


def test_other_devices_are_left_to_the_layers(model):
    made = model()
    with torch.no_grad():
        cache = made(torch.randint(3, made.config.vocab_size, (2, 50))).cache
    run = all_layers.StackStep(all_layers.Stack(fused.read_layers), tuple(made.model.layers), cache)
    hidden = torch.empty(2, 1, made.config.hidden_size, device="meta")
    assert run.step(made.model.layers[0], hidden, None, (torch.zeros(1, 1, 2),) * 2, first_route) is None


def test_layers_that_are_compiled_one_by_one(model, calls, one_by_one, steps):
    made = model()
    expected = steps(made, 2, 3)
    calls["steps"] = 0
    for layer in made.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert (steps(made, 2, 3) - expected).abs().max() < 2e-5 * expected.abs().max()
    assert calls["steps"] == 0


def test_a_cache_that_is_kept_does_not_keep_the_weights(model):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 51))
    with torch.no_grad():
        cache = made(ids[:, :50]).cache
        made(ids[:, 50:], cache=cache)
    assert cache.sealed_layers is not None
    weight = weakref.ref(made.model.layers[1].mlp.up_proj.weight)
    bound = cache.sealed_layers.bound
    del made
    gc.collect()
    assert weight() is None
    with pytest.raises(RuntimeError, match="are gone"):
        bound.step(torch.zeros(2, 1, 8), Rotary(*(torch.zeros(1, 1, 2),) * 2), 0)


def test_other_rows_are_refused(model):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 52))
    with torch.no_grad():
        cache = made(ids[:, :50]).cache
        made(ids[:, 50:51], cache=cache)
        with pytest.raises(UnsupportedError, match="the cache holds 2 rows, the input has 1"):
            made(ids[:1, 51:], cache=cache)


def test_forks_in_threads(model, calls):
    """They share the model and the blocks of a prefix."""
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 50))
    with torch.no_grad():
        prefix = made(ids).cache
        made(ids[:, :1], cache=prefix.fork())

    def go_on(seed):
        tokens = torch.randint(3, made.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            cache = prefix.fork()
            return torch.cat([made(tokens[:, i : i + 1], cache=cache).logits for i in range(60)], 1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(go_on, [*range(6), *range(6)]))
    assert calls["steps"] > 0
    for seed in range(6):
        assert torch.equal(found[seed], found[seed + 6])
        assert torch.equal(found[seed], go_on(seed))


def test_copies_and_detaching(model, calls, steps):
    made = model()
    found = steps(made, 2, 40)
    other = copy.deepcopy(made)
    assert torch.equal(steps(other, 2, 40), found)
    assert calls["layers"] == 2
    decoder = next(iter(other.model._forward_pre_hooks.values()))
    assert pickle.loads(pickle.dumps(decoder.stack))._last is None
    plan = made._moacompress.plan
    detach(made)
    calls["steps"] = 0
    dense = steps(made, 2, 40)
    assert calls["steps"] == 0
    attach(made, Plan.full(plan.model))
    assert (steps(made, 2, 40) - dense).abs().max() < 2e-5 * dense.abs().max()
    attach(made, plan)
    assert torch.equal(steps(made, 2, 40), found)


def test_what_was_read_is_let_go(model, monkeypatch):
    forgotten = []
    for kind in ("layers", "caches"):
        own = getattr(library, f"forget_{kind}")

        def forget(number, own=own, kind=kind):
            forgotten.append(kind)
            own(number)

        monkeypatch.setattr(library, f"forget_{kind}", forget)
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 51))
    with torch.no_grad():
        cache = made(ids[:, :50]).cache
        made(ids[:, 50:], cache=cache)
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

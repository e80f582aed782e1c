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
from moacompress.kernels.backend import Rotary
from moacompress.kernels.cpu import cpu_backend, library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.models.modules import attention_modules
from moacompress.rules.plan import Plan
from moacompress.runtime import PlanCache, attach, detach
from moacompress.runtime.decode import all_layers, fused
from moacompress.runtime.decode.routes import first_route
from moacompress.runtime.hf.compat import NORMS
from moacompress.runtime.linear import FEW_ROWS, pack_weights

pytestmark = pytest.mark.usefixtures("compiled_kernels")


@pytest.fixture
def calls(monkeypatch):
    """Counts calls for all layers, readings of layers and of caches: a dictionary that tests may clear."""
    found = {"steps": 0, "layers": 0, "caches": 0, "cache": 0}

    def counted(name, own):
        def call(*arguments, **rest):
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
def one_by_one(monkeypatch, steps):
    """Returns logits of steps with each layer doing its part by itself."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(all_layers.Stack, "begin", lambda *nothing: None)
            return steps(*arguments)

    return run


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
def test_it_is_to_the_bit_what_the_layers_do_one_by_one(family, dtype, rows, model, calls, one_by_one, steps):
    made = model(family, dtype)
    found = steps(made, rows, 40)
    few = rows <= FEW_ROWS
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


CHANGES = {
    "hook on a layer": lambda model: model.model.layers[1].register_forward_hook(lambda *arguments: None),
    "hook before a layer": lambda model: model.model.layers[0].register_forward_pre_hook(lambda *arguments: None),
    "hook on attention": lambda model: attention_modules(model)[1].register_forward_pre_hook(lambda *arguments: None),
    "hook on a product": lambda model: model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *arguments: None),
    "another forward": lambda model: setattr(model.model.layers[1], "forward", model.model.layers[1].forward),
    "another product": lambda model: setattr(
        model.model.layers[1].mlp, "up_proj", nn.Sequential(model.model.layers[1].mlp.up_proj)
    ),
    "another layer": lambda model: model.model.layers.__setitem__(1, Around(model.model.layers[1]).eval()),
    "attention in training": lambda model: attention_modules(model)[1].train(),
    "another class of a layer": lambda model: other_class(model.model.layers[1]),
    "another class of a feed-forward": lambda model: other_class(model.model.layers[1].mlp),
    "another class of a product": lambda model: other_class(model.model.layers[1].mlp.up_proj),
    "compiled": lambda model: model.model.layers[1].mlp.compile(backend="eager"),
    "another kind of tensor": lambda model: setattr(
        model.model.layers[1].mlp.up_proj, "weight", other_tensor(model.model.layers[1].mlp.up_proj.weight)
    ),
    "a weight that is not as it was": lambda model: setattr(
        model.model.layers[1].mlp.up_proj.weight, "data", model.model.layers[1].mlp.up_proj.weight.t().contiguous().t()
    ),
}


class Other(torch.Tensor):
    """Stands for the tensors of quantizers."""


def other_class(module):
    """A subclass that does something to what comes in, and undoes it."""

    class Other(type(module)):
        def forward(self, x, *arguments, **rest):
            return super().forward(x * 1, *arguments, **rest)

    module.__class__ = Other


def other_tensor(weight):
    return nn.Parameter(weight.detach().as_subclass(Other), requires_grad=False)


class Around(nn.Module):
    """A decoder layer inside another module."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *arguments, **rest):
        return self.layer(*arguments, **rest)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_two_steps_is_seen(change, model, calls):
    """In the midst of a generation, with the same cache."""
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 60))
    with torch.no_grad():
        expected = made(ids, use_cache=False).logits[:, 50:]
        cache = made(ids[:, :50]).cache
        found = [made(ids[:, 50 + i : 51 + i], cache=cache).logits for i in range(3)]
        assert calls["steps"] - calls["cache"] == 3
        calls.update(steps=0, cache=0)
        change(made)
        found += [made(ids[:, 50 + i : 51 + i], cache=cache).logits for i in range(3, 10)]
    assert calls["steps"] == (change is CHANGES["a weight that is not as it was"])  # that only the call itself sees
    assert (torch.cat(found, 1) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaRMSNorm", "LlamaAttention", "LlamaDecoderLayer"])
def test_another_forward_in_a_class_is_seen(name, model, calls, monkeypatch):
    """As libraries do that bring their own kernels: before a model is loaded, or in the midst of a generation."""
    from transformers.models.llama import modeling_llama

    made, seen = model(), []
    kind = getattr(modeling_llama, name)
    own = kind.forward

    def other(self, *arguments, **rest):
        seen.append(self)
        return own(self, *arguments, **rest)

    ids = torch.randint(3, made.config.vocab_size, (2, 60))
    with torch.no_grad():
        expected = made(ids, use_cache=False).logits[:, 50:]
        cache = made(ids[:, :50]).cache
        found = [made(ids[:, 50 + i : 51 + i], cache=cache).logits for i in range(3)]
        monkeypatch.setattr(kind, "forward", other)
        steps_before = calls["steps"]
        found += [made(ids[:, 50 + i : 51 + i], cache=cache).logits for i in range(3, 10)]
        assert len(seen) >= 7 * made.config.num_hidden_layers
        assert (torch.cat(found, 1) - expected).abs().max() < 2e-5 * expected.abs().max()
        plan = made._moacompress.plan
        detach(made)
        seen.clear()
        cache = attach(made, plan)(ids[:, :50]).cache
        assert seen
        seen.clear()
        made(ids[:, 50:51], cache=cache)
        assert len(seen) >= made.config.num_hidden_layers
    assert calls["steps"] == steps_before


def test_hooks_on_all_modules_are_seen(model, calls):
    made, seen = model(), []
    ids = torch.randint(3, made.config.vocab_size, (2, 53))
    with torch.no_grad():
        cache = made(ids[:, :50]).cache
        made(ids[:, 50:51], cache=cache)
        calls.update(steps=0)
        with nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module)):
            made(ids[:, 51:52], cache=cache)
        assert calls["steps"] == 0
        assert made.model.layers[1].mlp.act_fn in seen
        made(ids[:, 52:], cache=cache)
        assert calls["steps"] > 0


def test_other_numbers_are_read_anew(model, calls, one_by_one, steps):
    made = model()
    steps(made, 2, 40)
    for change in (
        lambda layer: layer.mlp.down_proj.weight.data.mul_(2),
        lambda layer: setattr(layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data * 2),
        lambda layer: setattr(layer.mlp, "gate_proj", copy.deepcopy(layer.mlp.gate_proj)),
        lambda layer: setattr(layer.self_attn.o_proj, "weight", nn.Parameter(layer.self_attn.o_proj.weight * 2, False)),
        lambda layer: pack_weights(layer),
    ):
        change(made.model.layers[1])
        before = calls["steps"]
        found = steps(made, 2, 40)
        assert calls["steps"] > before
        assert torch.equal(one_by_one(made, 2, 40), found)
    made.half()
    found = steps(made, 2, 40)
    assert found.dtype == torch.float16
    assert torch.equal(one_by_one(made, 2, 40), found)


def test_layers_that_differ_go_one_by_one(model, calls, steps):
    made = model()
    for name in NORMS:
        getattr(made.model.layers[1], name).variance_epsilon = 0.5
    steps(made, 2, 40)
    assert calls["steps"] == 0


def test_fewer_layers_are_run_if_the_configuration_says_so(model, calls):
    made = model()
    made.config.num_hidden_layers -= 1
    cache = PlanCache(made._moacompress.plan)
    ids = torch.randint(3, made.config.vocab_size, (2, 30))
    with torch.no_grad():
        made(ids, cache=cache)
        with pytest.raises(UnsupportedError, match="middle of a forward"):
            made(ids[:, :1], cache=cache)
    assert calls["steps"] == 0


def test_hidden_states_are_those_of_every_layer(model, calls):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 51))
    with torch.no_grad():
        expected = made(ids, use_cache=False, output_hidden_states=True).hidden_states
        cache = made(ids[:, :50]).cache
        found = made(ids[:, 50:], cache=cache, output_hidden_states=True).hidden_states
    assert calls["steps"] == 0
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other[:, -1:]).abs().max() < 2e-5 * other.abs().max()


@pytest.mark.parametrize("asked", ["prompt", "step"])
def test_after_hidden_states_all_layers_are_one_call_again(asked, model, calls):
    """The hooks that capture them stay on the layers, and do nothing in other forwards."""
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 70))
    captured = [*range(53, 55), *range(60, 62)]
    with torch.no_grad():
        expected = model()(ids, use_cache=False, output_hidden_states=True)
        cache = made(ids[:, :50], output_hidden_states=asked == "prompt").cache
        for at in range(50, 70):
            before = calls["steps"] - calls["cache"]
            found = made(ids[:, at : at + 1], cache=cache, output_hidden_states=at in captured)
            assert calls["steps"] - calls["cache"] - before == (at not in captured)
            assert (found.logits[:, 0] - expected.logits[:, at]).abs().max() < 2e-5 * expected.logits.abs().max()
            if at not in captured:
                assert found.hidden_states is None
                continue
            for mine, other in zip(found.hidden_states, expected.hidden_states, strict=True):
                assert (mine[:, 0] - other[:, at]).abs().max() < 2e-5 * other.abs().max()
    assert calls["layers"] == 1  # nothing was read anew


def test_after_hidden_states_steps_are_to_the_bit_what_they_were(model, steps):
    made = model()
    expected = steps(made, 2, 40)
    made.generate(
        torch.randint(3, 160, (2, 30)), max_new_tokens=5, output_hidden_states=True, return_dict_in_generate=True
    )
    assert torch.equal(steps(made, 2, 40), expected)


@pytest.mark.parametrize("place", ["", "self_attn", "mlp", "mlp.up_proj", "input_layernorm"])
@pytest.mark.parametrize("first", ["hook", "hidden states"])
def test_other_hooks_are_seen_beside_those_that_capture(first, place, model, calls):
    made, seen = model(), []
    ids = torch.randint(3, made.config.vocab_size, (2, 60))
    part = made.model.layers[1].get_submodule(place)
    with torch.no_grad():
        expected = made(ids, use_cache=False).logits[:, 50:]
        cache = made(ids[:, :50]).cache
        found = [made(ids[:, 50:51], cache=cache).logits]
        actions = [
            lambda: part.register_forward_hook(lambda module, *rest: seen.append(module)),
            lambda: made(ids, use_cache=False, output_hidden_states=True),
        ]
        handles = [action() for action in (actions if first == "hook" else reversed(actions))]
        seen.clear()
        calls.update(steps=0)
        found += [made(ids[:, at : at + 1], cache=cache).logits for at in range(51, 54)]
        assert calls["steps"] == 0
        assert seen == [part] * 3
        handles[0 if first == "hook" else 1].remove()
        found += [made(ids[:, at : at + 1], cache=cache).logits for at in range(54, 60)]
    assert calls["steps"] - calls["cache"] == 6
    assert len(seen) == 3
    assert (torch.cat(found, 1) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_hidden_states_in_one_thread_and_none_in_another(model, calls):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 50))
    with torch.no_grad():
        prefix = made(ids).cache

    def go_on(captured):
        with torch.no_grad():
            cache = prefix.fork()
            outs = [made(ids[:, i : i + 1], cache=cache, output_hidden_states=captured) for i in range(40)]
        return torch.cat([out.hidden_states[-2] if captured else out.logits for out in outs], 1)

    expected = [go_on(captured) for captured in (False, True)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(go_on, [False, True] * 3))
    assert all(torch.equal(one, expected[number % 2]) for number, one in enumerate(found))


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
@pytest.mark.parametrize("name", ["step_layers", "step_layer", "step_hidden"])
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
            if name == "step_hidden":
                patch.setattr(fused, "_layer", lambda *nothing: None)
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
    assert cache.reading is not None
    weight = weakref.ref(made.model.layers[1].mlp.up_proj.weight)
    bound = cache.reading.bound
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
        number = cache.reading.bound.number
        assert forgotten == []
        cache.reset()
        gc.collect()
        assert forgotten == ["caches"]
        with pytest.raises(RuntimeError, match=f"no caches of the number {number}"):
            torch.ops.moacompress_cpu.step_layers(torch.zeros(2, 1, 8), *(torch.zeros(1, 1, 2),) * 2, number, 0)
    del made, cache
    gc.collect()
    assert forgotten == ["caches", "layers"]

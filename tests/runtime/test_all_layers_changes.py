"""A call for all layers sees what changes them between two decode steps: other modules, hooks, hidden states asked for."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from moacompress.models.modules import attention_modules
from moacompress.runtime.linear import use_kernels
from tests.runtime.forwards import after_prompt, difference, in_parts, logits

pytestmark = pytest.mark.usefixtures("compiled_kernels")


CHANGES = {
    "hook on attention": lambda model: attention_modules(model)[1].register_forward_pre_hook(lambda *arguments: None),
    "another class of a layer": lambda model: other_class(model.model.layers[1]),
    "attention in training": lambda model: attention_modules(model)[1].train(),
    "a compiled part": lambda model: model.model.layers[1].mlp.compile(backend="eager"),
    "compiled layers": lambda model: [layer.compile(backend="eager", fullgraph=True) for layer in model.model.layers],
    "another kind of tensor": lambda model: setattr(
        model.model.layers[1].mlp.up_proj, "weight", other_tensor(model.model.layers[1].mlp.up_proj.weight)
    ),
    "a weight that is not as it was": lambda model: setattr(
        model.model.layers[1].mlp.up_proj.weight, "data", model.model.layers[1].mlp.up_proj.weight.t().contiguous().t()
    ),
}
"""What changes no number; `test_replaced_parts.py` has what does."""


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


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_two_steps_is_seen(change, model, calls):
    """In the midst of a generation, with the same cache."""
    made = model()
    ids, cache = after_prompt(made, 10)
    expected = logits(made, ids, use_cache=False)[:, 50:]
    found = [in_parts(made, ids[:, 50:53], [], cache)]
    assert calls["steps"] - calls["cache"] == 3
    calls.update(steps=0, cache=0)
    change(made)
    found.append(in_parts(made, ids[:, 53:], [], cache))
    assert calls["steps"] == (change is CHANGES["a weight that is not as it was"])  # that only the call itself sees
    assert difference(torch.cat(found, 1), expected) < 2e-5


def test_hooks_on_all_modules_are_seen(model, calls):
    made, seen = model(), []
    ids, cache = after_prompt(made, 3)
    with torch.no_grad():
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
        lambda layer: use_kernels(layer),
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


def test_after_hidden_states_all_layers_are_one_call_again(model, calls):
    """The hooks that capture them stay on the layers, and do nothing in other forwards."""
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 70))
    captured = [*range(53, 55), *range(60, 62)]
    with torch.no_grad():
        expected = model()(ids, use_cache=False, output_hidden_states=True)
        cache = made(ids[:, :50], output_hidden_states=True).cache
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
    assert calls["layers"] == 1  # nothing was read again


@pytest.mark.parametrize(
    ("first", "place"), [("hook", ""), ("hidden states", "self_attn"), ("hidden states", "mlp.up_proj")]
)
def test_other_hooks_are_seen_beside_those_that_capture(first, place, model, calls):
    made, seen = model(), []
    part = made.model.layers[1].get_submodule(place)
    ids, cache = after_prompt(made, 10)
    expected = logits(made, ids, use_cache=False)[:, 50:]
    found = [in_parts(made, ids[:, 50:51], [], cache)]
    actions = [
        lambda: part.register_forward_hook(lambda module, *rest: seen.append(module)),
        lambda: logits(made, ids, use_cache=False, output_hidden_states=True),
    ]
    handles = [action() for action in (actions if first == "hook" else reversed(actions))]
    seen.clear()
    calls.update(steps=0)
    found.append(in_parts(made, ids[:, 51:54], [], cache))
    assert calls["steps"] == 0
    assert seen == [part] * 3
    handles[0 if first == "hook" else 1].remove()
    found.append(in_parts(made, ids[:, 54:], [], cache))
    assert calls["steps"] - calls["cache"] == 6
    assert len(seen) == 3
    assert difference(torch.cat(found, 1), expected) < 2e-5


def test_hidden_states_in_one_thread_and_none_in_another(model, calls):
    made = model()
    ids, prefix = after_prompt(made, 0)

    def go_on(captured):
        with torch.no_grad():
            cache = prefix.fork()
            outs = [made(ids[:, i : i + 1], cache=cache, output_hidden_states=captured) for i in range(40)]
        return torch.cat([out.hidden_states[-2] if captured else out.logits for out in outs], 1)

    expected = [go_on(captured) for captured in (False, True)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(go_on, [False, True] * 3))
    assert all(torch.equal(one, expected[number % 2]) for number, one in enumerate(found))

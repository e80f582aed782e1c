"""Kernels and patches of others, in the place of what a decoder layer is made of: steps run them as prompts do."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from moacompress.runtime import attach, detach
from tests.runtime.forwards import difference, in_parts, logits

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
Replace = Callable[[pytest.MonkeyPatch, Any, str, Any], None]


def doubled(own: Callable[..., Any]) -> Callable[..., Any]:
    def other(query: Any, key: Any, *rest: Any, **more: Any) -> Any:
        query, key = own(query, key, *rest, **more)
        return query * 1.5, key

    return other


def doubled_rotary(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
    patch.setattr(home, "apply_rotary_pos_emb", doubled(home.apply_rotary_pos_emb))


def doubled_rotary_of_a_layer(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
    """As the package `kernels` does."""
    funcs = model.model.layers[1].self_attn.__dict__.get("_kernel_funcs")
    if funcs is None:
        pytest.skip("the package is not installed")
    (func,) = funcs.values()
    own = doubled(func.forward)
    patch.setattr(func, "forward", MethodType(lambda self, *rest, **more: own(*rest, **more), func), raising=False)


def other_halves(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
    own = home.rotate_half
    patch.setattr(home, "rotate_half", lambda x: own(x) * 1.5)


def of_class(part: str, name: str = "forward") -> Replace:
    def replace(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
        kind = getattr(home, prefix + part)
        own = getattr(kind, name)
        patch.setattr(kind, name, changed(own), raising=False)

    return replace


def of_torch(kind: type[nn.Module], name: str = "forward") -> Replace:
    def replace(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
        patch.setattr(kind, name, changed(getattr(kind, name)))

    return replace


def of_activation(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
    kind = type(model.model.layers[0].mlp.act_fn)
    patch.setattr(kind, "forward", changed(kind.forward))


def of_instance(path: str) -> Replace:
    def replace(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
        module = model.get_submodule(path)
        own = module.forward
        patch.setattr(module, "forward", lambda *rest, **more: times(own(*rest, **more)), raising=False)

    return replace


def of_our_class(path: str) -> Replace:
    """As who patches `type(module).forward`, whatever that is."""

    def replace(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
        kind = type(model.get_submodule(path))
        patch.setattr(kind, "forward", changed(kind.forward))

    return replace


class Scaled(nn.Module):
    """A module inside another one."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, *rest: Any, **more: Any) -> Any:
        return times(self.own(*rest, **more))


def wrapped(path: str) -> Replace:
    def replace(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
        model.set_submodule(path, Scaled(model.get_submodule(path)).eval())

    return replace


def subclassed(path: str) -> Replace:
    def replace(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
        module = model.get_submodule(path)
        module.__class__ = type("Other", (type(module),), {"forward": changed(type(module).forward)})

    return replace


def hooked(path: str, before: bool = False) -> Replace:
    def replace(patch: pytest.MonkeyPatch, home: Any, prefix: str, model: Any) -> None:
        module = model.get_submodule(path)
        if before:
            module.register_forward_pre_hook(lambda module, given: (given[0] * 1.1, *given[1:]))
        else:
            module.register_forward_hook(lambda module, given, made: times(made))

    return replace


def changed(own: Any) -> Any:
    return lambda self, *rest, **more: times(own(self, *rest, **more))


def times(made: Any) -> Any:
    return (made[0] * 1.1, *made[1:]) if isinstance(made, tuple) else made * 1.1


PARTS: dict[Callable[[str], Replace], tuple[str, ...]] = {
    of_instance: ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".self_attn.q_proj", ".mlp.down_proj"),
    hooked: (
        "",
        ".self_attn",
        ".mlp",
        ".mlp.act_fn",
        ".post_attention_layernorm",
        ".self_attn.k_proj",
        ".mlp.down_proj",
    ),
    wrapped: ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".self_attn.q_proj", ".self_attn.o_proj"),
    subclassed: (".mlp", ".mlp.up_proj", ".post_attention_layernorm"),
}
"""Parts of a layer that are changed in each way."""
REPLACED: dict[str, Replace] = {
    "rotary": doubled_rotary,
    "rotary of a layer": doubled_rotary_of_a_layer,
    "halves": other_halves,
    "activation": of_activation,
    "linear": of_torch(nn.Linear),
    **{part: of_class(part) for part in ("RMSNorm", "MLP", "Attention", "DecoderLayer")},
    **{f"call of {part}": of_class(part, "__call__") for part in ("RMSNorm", "MLP", "Attention", "DecoderLayer")},
    **{f"{kind.__name__} {path}": kind(f"model.layers.1{path}") for kind, paths in PARTS.items() for path in paths},
    **{f"hook before {part}": hooked(f"model.layers.1.{part}", before=True) for part in ("mlp", "self_attn.v_proj")},
    "class of a layer": of_our_class("model.layers.1"),
    "class of attention": of_our_class("model.layers.1.self_attn"),
}


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("name", REPLACED)
def test_steps_run_what_prompts_run(name: str, model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One family each, and before a plan is put on or between two steps, so that all have their turn."""
    turn = [*REPLACED].index(name)
    family, before_plan = [*FAMILIES][turn % 3], turn % 2 == 0
    made, ids = model(family), token_ids(2, 60)
    home = import_module(f"transformers.models.{family}.modeling_{family}")
    plan = made._moacompress.plan
    with torch.no_grad():
        before = made(ids, use_cache=False).logits[:, -1]
        if before_plan:
            detach(made)
        else:
            in_parts(made, ids[:, :41], [40])
        REPLACED[name](monkeypatch, home, FAMILIES[family], made)
        if before_plan:
            attach(made, plan)
        expected = made(ids, use_cache=False).logits[:, 50:]
    assert difference(expected[:, -1], before) > 1e-3, "it must matter"
    assert difference(in_parts(made, ids, [50])[:, 50:], expected) < 5e-5
    detach(made)


@pytest.mark.usefixtures("compiled_kernels")
def test_own_parts_are_one_call_again(model: Any, calls: dict[str, int], token_ids: Any) -> None:
    made, ids = model(), token_ids(2, 60)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        doubled_rotary(patch, import_module("transformers.models.llama.modeling_llama"), "Llama", made)
        cache = made(ids[:, :50]).cache
        made(ids[:, 50:51], cache=cache)
        assert calls["steps"] == 0
    with torch.no_grad():
        made(ids[:, 51:52], cache=cache)
    assert calls["steps"] > 0


@pytest.mark.heavy
@pytest.mark.usefixtures("compiled_kernels", "fresh_dynamo")
def test_compiled_steps_see_another_rotary(model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, ids = model(), token_ids(2, 60)
    step = torch.compile(made, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        step(ids[:, 50:51], cache=made(ids[:, :50]).cache)
        doubled_rotary(monkeypatch, import_module("transformers.models.llama.modeling_llama"), "Llama", made)
        found = in_parts(step, ids[:, 50:], [], made(ids[:, :50]).cache)
    assert difference(found, logits(made, ids, use_cache=False)[:, 50:]) < 5e-5

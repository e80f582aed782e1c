"""How a private name is looked for: whether it is there, and whether it still is what moacompress takes it for.

Nothing but the standard library is needed to import this module, so that it can say what others lack.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

Check: TypeAlias = Callable[[Any, str], str | None]
"""Takes what holds a name (a module or a class) and its last part; returns what is wrong, or None.

An error that it raises is what is wrong, too: an `AttributeError` that the name is missing.
"""


def find(name: str) -> Any:
    """Returns what a dotted path names; modules on the way are imported."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            if not inspect.ismodule(found):
                raise
            try:
                found = importlib.import_module(path)
            except ModuleNotFoundError as error:
                raise AttributeError(f"{found.__name__} has no {part}") from error
    return found


def is_there(holder: Any, attribute: str) -> str | None:
    """The holder has the name."""
    getattr(holder, attribute)
    return None


def takes(*parameters: str) -> Check:
    """The name is a function, or a method, that takes these parameters by their names."""

    def check(holder: Any, attribute: str) -> str | None:
        return _lacking("takes no", parameters, inspect.signature(getattr(holder, attribute)).parameters)

    return check


def has(*members: str) -> Check:
    """The name is a class, or a dictionary, that has these members."""

    def check(holder: Any, attribute: str) -> str | None:
        found = getattr(holder, attribute)
        return _lacking("has no", members, found if isinstance(found, dict) else dir(found))

    return check


def _lacking(command: str, wanted: tuple[str, ...], found: Any) -> str | None:
    lost = [name for name in wanted if name not in found]
    return f"{command} {', '.join(lost)}" if lost else None


def both(first: Check, second: Check) -> Check:
    """What is wrong by the first check or, where nothing is, by the second."""
    return lambda holder, attribute: first(holder, attribute) or second(holder, attribute)


def is_a(kind: type) -> Check:
    """The name is an object of this class."""

    def check(holder: Any, attribute: str) -> str | None:
        found = getattr(holder, attribute)
        return None if isinstance(found, kind) else f"is a {type(found).__name__}, not a {kind.__name__}"

    return check


def on_instance(holder: Any, attribute: str) -> str | None:
    """Objects of the class have the name."""
    return is_there(holder(), attribute)


def says(*words: str) -> Check:
    """The name is a function whose code has these words: attributes that it sets or keywords that it hands on."""

    def check(holder: Any, attribute: str) -> str | None:
        return _lacking("does not say", words, {*words_of(getattr(holder, attribute))})

    return check


def words_of(function: Any) -> Iterator[str]:
    """Yields the names and constants in a function's code, keywords of its calls included."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    if code is None:
        return
    yield from code.co_names
    for constant in code.co_consts:
        yield from constant if isinstance(constant, tuple) else (constant,)  # keywords of a call are a tuple


def is_read_by_generate(but: str) -> Check:
    """Some method of `generate`, but for this one, reads the attribute of a cache: nothing but their code tells that."""

    def check(holder: Any, attribute: str) -> str | None:
        methods = vars(find("transformers.generation.utils.GenerationMixin"))
        asked = any(attribute in words_of(method) for name, method in methods.items() if name != but)
        return None if asked else "is missing (no method of generate asks for it)"

    return check


def is_of_models(holder: Any, attribute: str) -> str | None:
    """A model, of which the parameters take no memory, has the name, and a dictionary under it."""
    import torch

    config = _tiny(find("transformers.models.llama.modeling_llama.LlamaConfig"))
    with torch.device("meta"):
        model = find("transformers.models.llama.modeling_llama.LlamaForCausalLM")(config)
    return None if isinstance(getattr(model, attribute), dict) else "is not a dictionary"


def _tiny(config: Any) -> Any:
    return config(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=8,
        bos_token_id=None,
        eos_token_id=None,
    )


def layer_part(prefix: str, parts: tuple[str, ...], forward: tuple[str, ...]) -> Check:
    """The name is a class of a family's decoder layer.

    Args:
        prefix: what the names of the family's classes begin with.
        parts: submodules and attributes of one.
        forward: the parameters of its forward that come first, in this order.
    """

    def check(holder: Any, attribute: str) -> str | None:
        import torch

        kind = getattr(holder, attribute)
        with torch.device("meta"):
            layer = getattr(holder, f"{prefix}DecoderLayer")(_tiny(getattr(holder, f"{prefix}Config")), 0)
        found = next((part for part in layer.modules() if type(part) is kind), None)
        if found is None:
            return f"is no part of a {prefix}DecoderLayer"
        begins = tuple(inspect.signature(kind.forward).parameters)[1 : 1 + len(forward)]
        if begins != forward:
            return f"has a forward that begins with {', '.join(begins)}, not {', '.join(forward)}"
        return _lacking("has no", parts, {*vars(found), *found._modules, *found._parameters})

    return check


def is_the_call_of_layers(holder: Any, attribute: str) -> str | None:
    """A decoder layer is called by it."""
    layer = find("transformers.models.llama.modeling_llama.LlamaDecoderLayer")
    return (
        None
        if getattr(layer, attribute) is getattr(holder, attribute)
        else "is not what a LlamaDecoderLayer is called by"
    )


def is_of_own_spec(holder: Any, attribute: str) -> str | None:
    """Modules that have been imported have it, this one too."""
    return is_there(importlib.import_module(__name__).__spec__, attribute)


def is_idle(holder: Any, attribute: str) -> str | None:
    """The collector of captured states is empty where no forward runs."""
    return "says that something is captured where no forward runs" if getattr(holder, attribute).get() else None


def hook_is_told(holder: Any, attribute: str) -> str | None:
    """The hook that it puts on a module is told by the names that it sees: those of the function itself."""
    import torch

    module = torch.nn.Identity()
    install = getattr(holder, attribute)
    install(module, "hidden_states", 0)
    hooks = [*module._forward_hooks.values()]
    told = len(hooks) == 1 and getattr(hooks[0], "__globals__", None) is install.__globals__
    return None if told else "puts another hook on a module"


def counts_hooks(holder: Any, attribute: str) -> str | None:
    """The number grows with every hook that is put on a module."""
    import torch

    before = getattr(holder, attribute)
    torch.nn.Identity().register_forward_hook(lambda *call: None)
    return None if getattr(holder, attribute) > before else "does not grow with every hook"


def counts_writes(holder: Any, attribute: str) -> str | None:
    """The number grows whenever a tensor is written in place."""
    import torch

    tensor = torch.zeros(1)
    before = getattr(tensor, attribute)
    tensor.add_(1)
    return None if getattr(tensor, attribute) > before else "does not grow when a tensor is written"


def is_onednns(holder: Any, attribute: str) -> str | None:
    """The name is an operator, where oneDNN is there."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return None
    return None if callable(getattr(holder, attribute)) else "is no operator"

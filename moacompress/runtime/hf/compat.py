"""Every private name of transformers and torch that moacompress leans on, each with what it is for and a check.

Private here is also what is public and undocumented: what may move in any release, and nobody is told. All of it stands in this
one list, whichever package uses it, so `check` can say which of them another version has taken away or given another form.

Objects come from `take`, names of methods and attributes are constants here; an attribute of an object at hand, such as a
module's `_parameters`, is written where it is used. This module can be imported whatever is missing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, TypeAlias

from moacompress.core.errors import UnsupportedError, one_line

Check: TypeAlias = Callable[[Any, str], str | None]
"""Takes what holds a name (a module or a class) and its last part; returns what is wrong, or None.

An error that it raises is what is wrong, too: an `AttributeError` that the name is missing.
"""

PACKAGES = ("transformers", "torch")
IMPLEMENTATION = "_attn_implementation_internal"
"""Attribute of a config that names its attention, and not that of its parts."""
FROM_CONFIG = "_from_config"
"""Class method of a model that every `from_config` ends in."""
MISSING_WEIGHTS = "_move_missing_keys_from_meta_to_device"
"""Method of a model that makes room for the weights that no file held, before they are drawn at random."""
PREPARE_CACHE = "_prepare_cache_for_generation"
"""Method of a model that makes the cache of `generate`."""
COMPILED_CALL = "_compiled_call_impl"
"""What a module has in its own dictionary after `module.compile()`."""
QUANTIZERS = "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING"
QUANTIZATION_CONFIGS = "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING"
ACTIVE_COLLECTOR = "transformers.utils.output_capturing._active_collector"
OUTPUT_CAPTURING = "transformers.utils.output_capturing.install_output_capuring_hook"
CAUSAL_MASK = "transformers.masking_utils.causal_mask_function"
SLIDING_OVERLAY = "transformers.masking_utils.sliding_window_overlay"
BLOCKS_OVERLAY = "transformers.masking_utils.blockwise_overlay"
ACTIVATIONS = "transformers.activations.ACT2FN"
FORWARD_HOOKS = "torch.nn.modules.module._global_forward_hooks"
FORWARD_PRE_HOOKS = "torch.nn.modules.module._global_forward_pre_hooks"
LOOKUP_BACKEND = "torch._dynamo.backends.registry.lookup_backend"
COUNTERS = "torch._dynamo.utils.counters"

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
"""Models of transformers whose layers are known part by part, and what the names of their classes begin with."""
PROJECTIONS, FEED_FORWARD = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
ROTARY = ("apply_rotary_pos_emb", "rotate_half")
"""Functions beside a family's classes that turn its queries and keys."""


@functools.cache
def _causal_mask() -> Any:
    return take(CAUSAL_MASK)


def is_stock_mask(function: Callable[..., Any], local_size: int | None) -> bool:
    """Returns whether a mask function is transformers' causal one, or that with a sliding window of `local_size` tokens."""
    causal, overlay = _causal_mask(), SLIDING_OVERLAY.rpartition(".")[2]
    if function is causal:
        return True
    # transformers composes a sliding mask as and_masks(window overlay, causal): a closure over just these two
    parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    functions = parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else ()
    name = getattr(functions[0], "__qualname__", "") if functions else ""
    return local_size is not None and len(functions) == 2 and name.startswith(overlay) and functions[1] is causal


def image_blocks(function: Callable[..., Any]) -> list[Any] | None:
    """Returns, of a mask in which the tokens of an image see each other both ways, the block of each token, -1 for text.

    None for any other mask: beside such blocks there are only the causal mask and a sliding window.
    """
    causal, overlay = _causal_mask(), SLIDING_OVERLAY.rpartition(".")[2]
    found = []
    for part in _mask_parts(function):
        name = getattr(part, "__qualname__", "")
        if name.startswith(BLOCKS_OVERLAY.rpartition(".")[2]):
            found += [cell.cell_contents for cell in part.__closure__ or ()]
        elif part is not causal and not name.startswith(overlay):
            return None
    return found or None


def _mask_parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Returns the mask functions that one is composed of: transformers' compositions close over a tuple of them."""
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if len(held) == 1 and isinstance(held[0], tuple):
        return [part for composed in held[0] for part in _mask_parts(composed)]
    return [function]


def _is_there(holder: Any, attribute: str) -> str | None:
    getattr(holder, attribute)
    return None


@dataclass(frozen=True)
class PrivateName:
    """A name that moacompress leans on.

    Attributes:
        name: as a dotted path.
        use: what it is for.
        check: says whether it still is what is leaned on; by default, whether it is there.
    """

    name: str
    use: str
    check: Check = _is_there

    def problem(self) -> str | None:
        """Returns what is wrong with it in the versions that are installed, or None."""
        owner, _, attribute = self.name.rpartition(".")
        try:
            return self.check(_find(owner), attribute)
        except (AttributeError, ImportError) as error:
            return f"is missing ({one_line(error)})"
        except Exception as error:  # what has another form fails in whatever way
            return f"has another form ({type(error).__name__}: {one_line(error)})"


@dataclass(frozen=True)
class Broken:
    """A name that is missing, or is not what moacompress takes it for.

    Attributes:
        name: as a dotted path.
        use: what it is for.
        problem: what is wrong with it.
    """

    name: str
    use: str
    problem: str

    def __str__(self) -> str:
        return f"{self.name} {self.problem}; it is for {self.use}"


def check() -> list[Broken]:
    """Returns the names that the installed versions lack, or have in another form; none where all is well."""
    found = ((entry, entry.problem()) for entry in NAMES)
    return [Broken(entry.name, entry.use, problem) for entry, problem in found if problem is not None]


def take(name: str) -> Any:
    """Returns the object of a name in `NAMES`.

    Raises:
        UnsupportedError: the installed version does not have it.
    """
    entry = next(entry for entry in NAMES if entry.name == name)
    try:
        return _find(name)
    except (AttributeError, ImportError) as error:
        broken = Broken(name, entry.use, f"is missing ({one_line(error)})")
        raise UnsupportedError(f"{broken}; {remedy()}") from error


def installed() -> str:
    """Returns the installed versions of what the names are of: "transformers 5.24.0 / torch 2.13.0"."""
    return " / ".join(f"{package} {_version(package)}" for package in PACKAGES)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def remedy() -> str:
    """Returns what to do where a name is broken: which versions to install."""
    try:
        wanted = [text for text in requires("moacompress") or () if text.startswith(PACKAGES) and ";" not in text]
    except PackageNotFoundError:
        wanted = []
    tested = " ".join(f"'{text}'" for text in wanted) or "those in moacompress's pyproject.toml"
    return f"{installed()} is here; install what moacompress is tested with: {tested}"


def _find(name: str) -> Any:
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


def _takes(*parameters: str) -> Check:
    """The name is a function, or a method, that takes these parameters by their names."""

    def check(holder: Any, attribute: str) -> str | None:
        return _lacking("takes no", parameters, inspect.signature(getattr(holder, attribute)).parameters)

    return check


def _has(*members: str) -> Check:
    """The name is a class, or a dictionary, that has these members."""

    def check(holder: Any, attribute: str) -> str | None:
        found = getattr(holder, attribute)
        return _lacking("has no", members, found if isinstance(found, dict) else dir(found))

    return check


def _lacking(verb: str, wanted: tuple[str, ...], found: Any) -> str | None:
    lost = [name for name in wanted if name not in found]
    return f"{verb} {', '.join(lost)}" if lost else None


def _is_a(kind: type) -> Check:
    """The name is an object of this class."""

    def check(holder: Any, attribute: str) -> str | None:
        found = getattr(holder, attribute)
        return None if isinstance(found, kind) else f"is a {type(found).__name__}, not a {kind.__name__}"

    return check


def _on_instance(holder: Any, attribute: str) -> str | None:
    """Objects of the class have the name."""
    return _is_there(holder(), attribute)


def _says(*words: str) -> Check:
    """The name is a function whose code has these words: attributes that it sets or keywords that it hands on."""

    def check(holder: Any, attribute: str) -> str | None:
        return _lacking("does not say", words, {*_words(getattr(holder, attribute))})

    return check


def _words(function: Any) -> Iterator[str]:
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    if code is None:
        return
    yield from code.co_names
    for constant in code.co_consts:
        yield from constant if isinstance(constant, tuple) else (constant,)  # keywords of a call are a tuple


def _is_read_by_generate(holder: Any, attribute: str) -> str | None:
    """A cache that says so is handed back by `generate`; nothing but a look at its methods tells that it asks."""
    methods = vars(_find("transformers.generation.utils.GenerationMixin"))
    asked = any(attribute in _words(method) for name, method in methods.items() if name != PREPARE_CACHE)
    return None if asked else "is missing (no method of generate asks for it)"


def _is_of_models(holder: Any, attribute: str) -> str | None:
    """A model, of which the parameters take no memory, has the name, and a dictionary under it."""
    import torch

    config = _tiny(_find("transformers.models.llama.modeling_llama.LlamaConfig"))
    with torch.device("meta"):
        model = _find("transformers.models.llama.modeling_llama.LlamaForCausalLM")(config)
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


def _layer_part(prefix: str, parts: tuple[str, ...], forward: tuple[str, ...]) -> Check:
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


def _is_of_own_spec(holder: Any, attribute: str) -> str | None:
    """Modules that have been imported have it, this one too."""
    return _is_there(importlib.import_module(__name__).__spec__, attribute)


def _is_idle(holder: Any, attribute: str) -> str | None:
    return "says that something is captured where no forward runs" if getattr(holder, attribute).get() else None


def _hook_is_told(holder: Any, attribute: str) -> str | None:
    """The hook that it puts on a module is told by the names that it sees: those of the function itself."""
    import torch

    module = torch.nn.Identity()
    install = getattr(holder, attribute)
    install(module, "hidden_states", 0)
    hooks = [*module._forward_hooks.values()]
    told = len(hooks) == 1 and getattr(hooks[0], "__globals__", None) is install.__globals__
    return None if told else "puts another hook on a module"


def _is_named_in_masks(holder: Any, attribute: str) -> str | None:
    made = getattr(holder, attribute)(4).__qualname__
    return None if made.startswith(attribute) else f"makes a function that is called {made}"


def _is_told_from_others(holder: Any, attribute: str) -> str | None:
    made = getattr(holder, attribute)(4)
    told = is_stock_mask(made, 4) and not is_stock_mask(made, None) and not is_stock_mask(lambda *at: True, 4)
    return None if told else "is not told from other masks"


def _holds_blocks(holder: Any, attribute: str) -> str | None:
    import torch

    ids = torch.tensor([[-1, 0]])
    mask = _find("transformers.masking_utils.or_masks")(_causal_mask(), getattr(holder, attribute)(ids))
    found = image_blocks(mask)
    return None if found is not None and len(found) == 1 and found[0] is ids else "does not hold its blocks"


def _counts_hooks(holder: Any, attribute: str) -> str | None:
    import torch

    before = getattr(holder, attribute)
    torch.nn.Identity().register_forward_hook(lambda *call: None)
    return None if getattr(holder, attribute) > before else "does not grow with every hook"


def _counts_writes(holder: Any, attribute: str) -> str | None:
    import torch

    tensor = torch.zeros(1)
    before = getattr(tensor, attribute)
    tensor.add_(1)
    return None if getattr(tensor, attribute) > before else "does not grow when a tensor is written"


def _is_onednns(holder: Any, attribute: str) -> str | None:
    import torch

    if not torch.backends.mkldnn.is_available():  # then nothing is packed
        return None
    return None if callable(getattr(holder, attribute)) else "is no operator"


_MODEL = "transformers.modeling_utils.PreTrainedModel"
_CONFIG = "transformers.configuration_utils.PreTrainedConfig"
_QUANTIZER = "transformers.quantizers.base.HfQuantizer"
_QUANTIZATION = "transformers.utils.quantization_config.QuantizationConfigMixin"
_GENERATION = "transformers.generation.utils.GenerationMixin"
_CACHES = "transformers.cache_utils"
_MODULE = "torch.nn.Module"

_LOADING = (
    PrivateName("transformers.modeling_utils.PreTrainedModel", "registering once something is taken from its module"),
    PrivateName(
        "importlib.machinery.ModuleSpec._initializing",
        "registering while transformers is being imported",
        _is_of_own_spec,
    ),
    PrivateName("transformers.quantizers.auto.register_quantizer", "loading compressed checkpoints", _takes("name")),
    PrivateName(
        "transformers.quantizers.auto.register_quantization_config",
        "reading a compressed checkpoint's config",
        _takes("method"),
    ),
    PrivateName(QUANTIZERS, "telling whether transformers knows compressed checkpoints", _is_a(dict)),
    PrivateName(
        QUANTIZATION_CONFIGS, "telling whether transformers knows the configs of compressed checkpoints", _is_a(dict)
    ),
    PrivateName(
        f"{_QUANTIZER}._process_model_before_weight_loading", "putting a plan on a model", _takes("model", "kwargs")
    ),
    PrivateName(
        f"{_QUANTIZER}._process_model_after_weight_loading",
        "float conversions of a loaded model",
        _takes("model", "kwargs"),
    ),
    PrivateName(
        f"{_QUANTIZER}.preprocess_model",
        "taking the marks of a quantized model off",
        _says("is_quantized", "quantization_method"),
    ),
    PrivateName(f"{_QUANTIZER}.update_attn_implementation", "refusing another attention", _takes("config")),
    PrivateName(f"{_QUANTIZATION}.from_dict", "reading a config", _takes("config_dict", "return_unused_kwargs")),
    PrivateName(f"{_QUANTIZATION}.to_diff_dict", "writing a config"),
    PrivateName(
        f"{_MODEL}.from_pretrained", "checking the headers of files before tensors are read", _says("checkpoint_files")
    ),
    PrivateName(f"{_MODEL}.{FROM_CONFIG}", "refusing to build a dense model instead", _takes("config", "kwargs")),
    PrivateName(f"{_MODEL}.{MISSING_WEIGHTS}", "refusing checkpoints that lack weights", _takes("missing_keys")),
    PrivateName(f"{_MODEL}._keys_to_ignore_on_load_missing", "telling which weights a checkpoint must hold"),
    PrivateName(f"{_MODEL}.all_tied_weights_keys", "telling which weights are stored once", _is_of_models),
    PrivateName(f"{_MODEL}._supports_attention_backend", "telling which models can be compressed"),
    PrivateName(f"{_MODEL}._supports_sdpa", "the attention that `detach` gives back"),
    PrivateName(f"{_MODEL}.set_attn_implementation", "refusing another attention", _takes("attn_implementation")),
    PrivateName(f"{_MODEL}.get_decoder", "the module whose inputs are checked"),
    PrivateName(f"{_CONFIG}._attn_implementation", "telling which attention a model runs"),
    PrivateName(f"{_CONFIG}.{IMPLEMENTATION}", "telling which attention one part of a model runs", _on_instance),
    PrivateName(f"{_CONFIG}.get_text_config", "the shape of a model", _takes("decoder")),
)

_MASKS_AND_CAPTURING = (
    PrivateName(CAUSAL_MASK, "telling the stock masks"),
    PrivateName(SLIDING_OVERLAY, "telling the stock sliding mask by its name", _is_named_in_masks),
    PrivateName(
        "transformers.masking_utils.sliding_window_causal_mask_function",
        "telling the stock sliding mask by what it is made of",
        _is_told_from_others,
    ),
    PrivateName(BLOCKS_OVERLAY, "telling images in a mask", _holds_blocks),
    PrivateName(
        "transformers.masking_utils.create_sliding_window_causal_mask", "telling models that apply their windows"
    ),
    PrivateName(
        "transformers.masking_utils.sdpa_mask",
        "what is handed to a mask function",
        _takes("mask_function", "attention_mask", "q_length", "use_vmap", "local_size"),
    ),
    PrivateName(ACTIVE_COLLECTOR, "telling whether hidden states are captured", _is_idle),
    PrivateName(OUTPUT_CAPTURING, "telling the hooks that capture them", _hook_is_told),
    PrivateName("transformers.modeling_outputs.MoeModelOutputWithPast", "profiling models with experts"),
)

_GENERATING = (
    PrivateName(
        f"{_GENERATION}.{PREPARE_CACHE}",
        "giving `generate` a plan's cache",
        _takes("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    ),
    PrivateName(f"{_GENERATION}.generate_batch", "refusing continuous batching"),
    PrivateName(f"{_GENERATION}.init_continuous_batching", "refusing continuous batching"),
    PrivateName(f"{_GENERATION}.continuous_batching_context_manager", "refusing continuous batching"),
    PrivateName(
        "transformers.generation.configuration_utils.GenerationMode",
        "refusing other ways to generate",
        _has("GREEDY_SEARCH", "SAMPLE", "BEAM_SEARCH", "BEAM_SAMPLE", "ASSISTED_GENERATION"),
    ),
    PrivateName(
        "transformers.generation.configuration_utils.GenerationConfig.is_assistant", "assisted decoding", _on_instance
    ),
    PrivateName(f"{_CACHES}.Cache._is_user_defined", "a cache that outlives `generate`", _is_read_by_generate),
)

_CACHE_METHODS = {
    "Cache": {
        "__init__": ("layers",),
        "update": ("key_states", "value_states", "layer_idx"),
        "get_seq_length": (),
        "crop": ("tokens_to_remove",),
        "reorder_cache": ("beam_idx",),
        "batch_select_indices": ("indices",),
        "batch_repeat_interleave": ("repeats",),
        "activate_past_recording": (),
        "reset": (),
    },
    "CacheLayerMixin": {
        "lazy_initialization": ("key_states", "value_states"),
        "update": ("key_states", "value_states"),
        "get_mask_sizes": ("query_length",),
        "get_seq_length": (),
        "get_max_length": (),
        "reorder_cache": ("beam_idx",),
        "offload": (),
        "prefetch": (),
        "reset": (),
    },
    # what a cache asks of its layers and their base class does not have
    "DynamicSlidingWindowLayer": {
        "crop": ("tokens_to_remove",),
        "batch_select_indices": ("indices",),
        "batch_repeat_interleave": ("repeats",),
        "activate_past_recording": (),
    },
}

_CACHING = (
    *(
        PrivateName(f"{_CACHES}.{kind}.{method}", "the cache under a plan", _takes(*parameters))
        for kind, methods in _CACHE_METHODS.items()
        for method, parameters in methods.items()
    ),
    PrivateName(f"{_CACHES}.Cache.batch_size", "the cache under a plan"),
    PrivateName(f"{_CACHES}.CacheLayerMixin.is_compileable", "saying that `generate` is not to compile by itself"),
    PrivateName(f"{_CACHES}.CacheLayerMixin.is_croppable", "saying when drafts can be taken back"),
    PrivateName(f"{_CACHES}.CacheLayerMixin.supports_early_init", "saying that memory is taken with the first tokens"),
)

_LAYER_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Attention": (
        (*PROJECTIONS, "o_proj", "config", "layer_idx", "head_dim", "scaling", "is_causal"),
        ("hidden_states", "position_embeddings", "attention_mask"),
    ),
    "DecoderLayer": (("self_attn", "mlp", *NORMS), ("hidden_states", "attention_mask")),
    "MLP": ((*FEED_FORWARD, "act_fn"), ()),
    "RMSNorm": (("weight", "variance_epsilon"), ()),
}
"""Classes of a family, by the ends of their names: what one has, and what its forward takes first."""

_LAYERS = (
    *(
        PrivateName(
            f"transformers.models.{family}.modeling_{family}.{prefix}{kind}",
            "a decoder layer in one call",
            _layer_part(prefix, *parts),
        )
        for family, prefix in FAMILIES.items()
        for kind, parts in _LAYER_PARTS.items()
    ),
    *(
        PrivateName(
            f"transformers.models.{family}.modeling_{family}.{name}",
            "telling other kernels' rotary embeddings from its own",
        )
        for family in FAMILIES
        for name in ROTARY
    ),
    PrivateName(ACTIVATIONS, "telling a layer's activation", _has("silu", "swish")),
    PrivateName(FORWARD_HOOKS, "telling whether something runs around every module", _is_a(dict)),
    PrivateName(FORWARD_PRE_HOOKS, "telling whether something runs before every module", _is_a(dict)),
    PrivateName(f"{_MODULE}._modules", "what a layer is made of", _on_instance),
    PrivateName(f"{_MODULE}._parameters", "what a layer is made of", _on_instance),
    PrivateName(f"{_MODULE}._forward_hooks", "telling whether something runs after a module", _on_instance),
    PrivateName(f"{_MODULE}._forward_pre_hooks", "telling whether something runs before a module", _on_instance),
    PrivateName(f"{_MODULE}.{COMPILED_CALL}", "telling whether something runs in a module's place"),
    PrivateName("torch.utils.hooks.RemovableHandle.next_id", "telling whether hooks were put anywhere", _counts_hooks),
)

_TENSORS = (
    PrivateName(f"{_MODULE}._apply", "dropping packed weights that are moved", _takes("fn")),
    PrivateName("torch.Tensor._version", "telling whether a packed weight was changed", _counts_writes),
    PrivateName("torch.ops.mkldnn._reorder_linear_weight", "packing weights", _is_onednns),
    PrivateName("torch.ops.mkldnn._linear_pointwise", "products with packed weights", _is_onednns),
    PrivateName("torch.library.get_ctx", "sizes that a compiled model does not know"),
    PrivateName("torch._library.fake_impl.FakeImplCtx.new_dynamic_size", "sizes that a compiled model does not know"),
    PrivateName("torch.utils._python_dispatch.TorchDispatchMode", "the memory of profiling"),
    PrivateName("torch.utils._pytree.tree_iter", "the memory of profiling", _takes("tree")),
    PrivateName("torch._dynamo.reset", "compiling anew for every length that is timed"),
    PrivateName("torch._dynamo.mark_static", "a compiled graph that is not for one number of rows"),
    PrivateName(LOOKUP_BACKEND, "counting the graphs of a compiled step", _takes("compiler_fn")),
    PrivateName(COUNTERS, "counting the graph breaks of a compiled step", _is_a(dict)),
)

NAMES = (*_LOADING, *_MASKS_AND_CAPTURING, *_GENERATING, *_CACHING, *_LAYERS, *_TENSORS)
"""All of them."""

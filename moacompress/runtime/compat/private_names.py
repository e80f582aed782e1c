"""Every private name of transformers and torch that moacompress leans on, each with what it is for and a check.

Private here is also what is public and undocumented: what may move in any release, and nobody is told. All of it stands in this
one list, whichever package uses it, so `check` can say which of them another version has taken away or given another form.

Objects come from `take`, names of methods and attributes are constants here; an attribute of an object at hand, such as a
module's `_parameters`, is written where it is used. This module can be imported whatever is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from moacompress.core.errors import UnsupportedError, one_line
from moacompress.runtime.compat import checks, mask_functions, versions
from moacompress.runtime.compat.alternates import CACHE, CHOOSE_ATTENTION
from moacompress.runtime.compat.mask_functions import BLOCKS_OVERLAY, CAUSAL_MASK, SLIDING_OVERLAY

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
ACTIVATIONS = "transformers.activations.ACT2FN"
LAYER_CALL = "transformers.modeling_layers.GradientCheckpointingLayer.__call__"
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
    check: checks.Check = checks.is_there

    def problem(self) -> str | None:
        """Returns what is wrong with it in the versions that are installed, or None."""
        owner, _, attribute = self.name.rpartition(".")
        try:
            return self.check(checks.find(owner), attribute)
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


def resolve(name: str) -> Any:
    """Returns the object of a name in `NAMES`.

    Raises:
        UnsupportedError: the installed version does not have it.
    """
    entry = next(entry for entry in NAMES if entry.name == name)
    try:
        return checks.find(name)
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
        wanted = [text for text in requires("moacompress") or () if text.startswith("torch") and ";" not in text]
    except PackageNotFoundError:
        wanted = []
    tested = " ".join(f"'{text}'" for text in (*wanted, versions.requirement()))
    return f"{installed()} is here; install what moacompress is tested with: {tested}"


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
        checks.is_of_own_spec,
    ),
    PrivateName(
        "transformers.quantizers.auto.register_quantizer", "loading compressed checkpoints", checks.takes("name")
    ),
    PrivateName(
        "transformers.quantizers.auto.register_quantization_config",
        "reading a compressed checkpoint's config",
        checks.takes("method"),
    ),
    PrivateName(QUANTIZERS, "telling whether transformers knows compressed checkpoints", checks.is_a(dict)),
    PrivateName(
        QUANTIZATION_CONFIGS,
        "telling whether transformers knows the configs of compressed checkpoints",
        checks.is_a(dict),
    ),
    PrivateName(
        f"{_QUANTIZER}._process_model_before_weight_loading",
        "putting a plan on a model",
        checks.takes("model", "kwargs"),
    ),
    PrivateName(
        f"{_QUANTIZER}._process_model_after_weight_loading",
        "float conversions of a loaded model",
        checks.takes("model", "kwargs"),
    ),
    PrivateName(
        f"{_QUANTIZER}.preprocess_model",
        "taking the marks of a quantized model off",
        checks.says("is_quantized", "quantization_method"),
    ),
    PrivateName(f"{_QUANTIZER}.{CHOOSE_ATTENTION}", "refusing another attention", checks.takes("config")),
    PrivateName(f"{_QUANTIZATION}.from_dict", "reading a config", checks.takes("config_dict", "return_unused_kwargs")),
    PrivateName(f"{_QUANTIZATION}.to_diff_dict", "writing a config"),
    PrivateName(
        f"{_MODEL}.from_pretrained",
        "checking the headers of files before tensors are read",
        checks.says("checkpoint_files"),
    ),
    PrivateName(f"{_MODEL}.{FROM_CONFIG}", "refusing to build a dense model instead", checks.takes("config", "kwargs")),
    PrivateName(f"{_MODEL}.{MISSING_WEIGHTS}", "refusing checkpoints that lack weights", checks.takes("missing_keys")),
    PrivateName(f"{_MODEL}._keys_to_ignore_on_load_missing", "telling which weights a checkpoint must hold"),
    PrivateName(f"{_MODEL}.all_tied_weights_keys", "telling which weights are stored once", checks.is_of_models),
    PrivateName(f"{_MODEL}._supports_attention_backend", "telling which models can be compressed"),
    PrivateName(f"{_MODEL}._supports_sdpa", "the attention that `detach` gives back"),
    PrivateName(f"{_MODEL}.set_attn_implementation", "refusing another attention", checks.takes("attn_implementation")),
    PrivateName(f"{_MODEL}.resize_token_embeddings", "refusing rows of blocks", checks.takes("new_num_tokens")),
    PrivateName(f"{_MODULE}.requires_grad_", "refusing gradients of blocks", checks.takes("requires_grad")),
    PrivateName(f"{_MODEL}.get_decoder", "the module whose inputs are checked"),
    PrivateName(f"{_CONFIG}._attn_implementation", "telling which attention a model runs"),
    PrivateName(f"{_CONFIG}.{IMPLEMENTATION}", "telling which attention one part of a model runs", checks.on_instance),
    PrivateName(f"{_CONFIG}.get_text_config", "the shape of a model", checks.takes("decoder")),
)

_MASKS_AND_CAPTURING = (
    PrivateName(CAUSAL_MASK, "telling the stock masks"),
    PrivateName(SLIDING_OVERLAY, "telling the stock sliding mask by its name", mask_functions.is_named_in_masks),
    PrivateName(
        "transformers.masking_utils.sliding_window_causal_mask_function",
        "telling the stock sliding mask by what it is made of",
        mask_functions.is_told_from_others,
    ),
    PrivateName(BLOCKS_OVERLAY, "telling images in a mask", mask_functions.holds_blocks),
    PrivateName(
        "transformers.masking_utils.create_sliding_window_causal_mask", "telling models that apply their windows"
    ),
    PrivateName(
        "transformers.masking_utils.sdpa_mask",
        "what is handed to a mask function",
        checks.takes("mask_function", "attention_mask", "q_length", "use_vmap", "local_size"),
    ),
    PrivateName(ACTIVE_COLLECTOR, "telling whether hidden states are captured", checks.is_idle),
    PrivateName(OUTPUT_CAPTURING, "telling the hooks that capture them", checks.hook_is_told),
    PrivateName("transformers.modeling_outputs.MoeModelOutputWithPast", "profiling models with experts"),
)

_GENERATING = (
    PrivateName(
        f"{_GENERATION}.{PREPARE_CACHE}",
        "giving `generate` a plan's cache",
        checks.both(
            checks.takes("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
            checks.says(CACHE),
        ),
    ),
    PrivateName(f"{_GENERATION}.generate_batch", "refusing continuous batching"),
    PrivateName(f"{_GENERATION}.init_continuous_batching", "refusing continuous batching"),
    PrivateName(f"{_GENERATION}.continuous_batching_context_manager", "refusing continuous batching"),
    PrivateName(
        "transformers.generation.configuration_utils.GenerationMode",
        "refusing other ways to generate",
        checks.has("GREEDY_SEARCH", "SAMPLE", "BEAM_SEARCH", "BEAM_SAMPLE", "ASSISTED_GENERATION"),
    ),
    PrivateName(
        "transformers.generation.configuration_utils.GenerationConfig.is_assistant",
        "assisted decoding",
        checks.on_instance,
    ),
    PrivateName(
        f"{_CACHES}.Cache._is_user_defined",
        "a cache that outlives `generate`",
        checks.is_read_by_generate(PREPARE_CACHE),
    ),
)

_CACHE_ARGUMENT = (
    PrivateName(
        "transformers.models.llama.modeling_llama.LlamaForCausalLM.forward",
        "handing a cache to a model, which swallows an argument of another name",
        checks.takes(CACHE),
    ),
    PrivateName(
        "transformers.modeling_outputs.CausalLMOutputWithPast", "the cache that a model returns", checks.has(CACHE)
    ),
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
        PrivateName(f"{_CACHES}.{kind}.{method}", "the cache under a plan", checks.takes(*parameters))
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
            checks.layer_part(prefix, *parts),
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
    PrivateName(LAYER_CALL, "telling other calls of a decoder layer from its own", checks.is_the_call_of_layers),
    PrivateName(ACTIVATIONS, "telling a layer's activation", checks.has("silu", "swish")),
    PrivateName(FORWARD_HOOKS, "telling whether something runs around every module", checks.is_a(dict)),
    PrivateName(FORWARD_PRE_HOOKS, "telling whether something runs before every module", checks.is_a(dict)),
    PrivateName(f"{_MODULE}._modules", "what a layer is made of", checks.on_instance),
    PrivateName(f"{_MODULE}._parameters", "what a layer is made of", checks.on_instance),
    PrivateName(f"{_MODULE}._forward_hooks", "telling whether something runs after a module", checks.on_instance),
    PrivateName(f"{_MODULE}._forward_pre_hooks", "telling whether something runs before a module", checks.on_instance),
    PrivateName(f"{_MODULE}.{COMPILED_CALL}", "telling whether something runs in a module's place"),
    PrivateName(
        "torch.utils.hooks.RemovableHandle.next_id", "telling whether hooks were put anywhere", checks.counts_hooks
    ),
)

_TENSORS = (
    PrivateName(
        "torch.Tensor._version", "telling whether weights that made a cache were changed", checks.counts_writes
    ),
    PrivateName("torch.ops.mkldnn._linear_pointwise", "products of many rows in float32 on AMD", checks.is_onednns),
    PrivateName("torch.ops.mkldnn._is_mkldnn_bf16_supported", "products of many rows in bfloat16", checks.is_onednns),
    PrivateName("torch.ops.mkldnn._is_mkldnn_fp16_supported", "products of many rows in float16", checks.is_onednns),
    PrivateName(
        "torch.autograd.forward_ad._current_level",
        "telling whether derivatives are taken in forward mode",
        checks.is_a(int),
    ),
    PrivateName(
        "torch._C._are_functorch_transforms_active", "telling whether a product is differentiated by torch.func"
    ),
    PrivateName("torch.library.get_ctx", "sizes that a compiled model does not know"),
    PrivateName("torch._library.fake_impl.FakeImplCtx.new_dynamic_size", "sizes that a compiled model does not know"),
    PrivateName("torch.utils._python_dispatch.TorchDispatchMode", "the memory of profiling"),
    PrivateName("torch.utils._pytree.tree_iter", "the memory of profiling", checks.takes("tree")),
    PrivateName("torch._dynamo.reset", "compiling from scratch for every length that is timed"),
    PrivateName("torch._dynamo.mark_static", "a compiled graph that is not for one number of rows"),
    PrivateName(LOOKUP_BACKEND, "counting the graphs of a compiled step", checks.takes("compiler_fn")),
    PrivateName(COUNTERS, "counting the graph breaks of a compiled step", checks.is_a(dict)),
)

NAMES = (*_LOADING, *_MASKS_AND_CAPTURING, *_GENERATING, *_CACHE_ARGUMENT, *_CACHING, *_LAYERS, *_TENSORS)
"""All of them."""

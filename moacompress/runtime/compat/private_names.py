"""Every private name of transformers and torch that moacompress leans on, each with what it is for.

Private here is also what is public and undocumented: what may move in any release, and nobody is told. All of it stands in this
one list, whichever package uses it, so `check` says by name what another version has taken away.

Objects come from `resolve`, names of methods and attributes are constants here; an attribute of an object at hand, such as a
module's `_parameters`, is written where it is used. This module can be imported whatever is missing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from moacompress.core.errors import UnsupportedError, one_line
from moacompress.runtime.compat import versions
from moacompress.runtime.compat.alternates import CACHE, CHOOSE_ATTENTION

logger = logging.getLogger(__name__)

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
KERNEL_FUNCS = "_kernel_funcs"
"""What a module has there for functions that the package `kernels` may replace: a module of each, by name."""
QUANTIZERS = "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING"
QUANTIZATION_CONFIGS = "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING"
CAUSAL_MASK = "transformers.masking_utils.causal_mask_function"
SLIDING_OVERLAY = "transformers.masking_utils.sliding_window_overlay"
BLOCKS_OVERLAY = "transformers.masking_utils.blockwise_overlay"
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
ON_NEW_OBJECTS = (IMPLEMENTATION, "is_assistant", "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks")
"""Attributes that every object has, and its class does not."""
ON_OBJECTS = ("all_tied_weights_keys", "_is_user_defined")
"""Attributes that objects in use alone have, so that they cannot be looked for."""


@dataclass(frozen=True)
class PrivateName:
    """A name that moacompress leans on.

    Attributes:
        name: as a dotted path.
        use: what it is for.
        needs: parameters of the function, or members of the class or dictionary, that are leaned on too.
    """

    name: str
    use: str
    needs: tuple[str, ...] = ()

    @staticmethod
    def parse(text: str, use: str) -> PrivateName:
        """Returns the name of "path" or "path(need, need)"."""
        name, _, needs = text.removesuffix(")").partition("(")
        return PrivateName(name, use, tuple(needs.split(", ")) if needs else ())

    def problem(self) -> str | None:
        """Returns what is wrong with it in the versions that are installed, or None."""
        owner, _, attribute = self.name.rpartition(".")
        if attribute in ON_OBJECTS:
            return None
        try:
            holder = find(owner)
            found = getattr(holder() if attribute in ON_NEW_OBJECTS else holder, attribute)
        except (AttributeError, ImportError, TypeError) as error:
            return f"is missing ({one_line(error)})"
        if isinstance(found, dict):
            members: Any = found
        else:
            members = (
                dir(found) if inspect.isclass(found) else inspect.signature(found).parameters if self.needs else ()
            )
        lost = [name for name in self.needs if name not in members]
        return f"has no {', '.join(lost)}" if lost else None


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


def check() -> list[Broken]:
    """Returns the names that the installed versions lack; none where all is well."""
    found = ((entry, entry.problem()) for entry in NAMES)
    return [Broken(entry.name, entry.use, problem) for entry, problem in found if problem is not None]


def resolve(name: str) -> Any:
    """Returns the object of a name in `NAMES`.

    Raises:
        UnsupportedError: the installed version does not have it.
    """
    entry = next(entry for entry in NAMES if entry.name == name)
    try:
        return find(name)
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


@functools.cache
def check_installed() -> None:
    """Looks, once per process, whether the installed transformers can be run with; a tested one can.

    Of any other one every private name is looked for, and where all are there a warning says that it is untested.

    Raises:
        UnsupportedError: some are missing.
    """
    here = versions.installed()
    if versions.is_tested(here):
        return
    broken = check()
    if broken:
        more = f", and {len(broken) - 1} more (see `moacompress doctor`)" if len(broken) > 1 else ""
        raise UnsupportedError(
            f"moacompress does not run with transformers {here}, which it is not tested with: {broken[0]}{more}; {remedy()}"
        )
    logger.warning(
        "transformers %s is installed and moacompress is tested with %s; all that it leans on is there, so it goes ahead: run "
        "`moacompress doctor` for details, or pip install '%s'",
        here,
        versions.tested_range(),
        versions.requirement(),
    )


_MODEL = "transformers.modeling_utils.PreTrainedModel"
_CONFIG = "transformers.configuration_utils.PreTrainedConfig"
_QUANTIZER = "transformers.quantizers.base.HfQuantizer"
_QUANTIZATION = "transformers.utils.quantization_config.QuantizationConfigMixin"
_GENERATION = "transformers.generation.utils.GenerationMixin"
_MODULE = "torch.nn.Module"

_USES = {
    _MODEL: "registering once something is taken from its module",
    "importlib.machinery.__spec__._initializing": "registering while transformers is being imported",
    "transformers.quantizers.auto.register_quantizer(name)": "loading compressed checkpoints",
    "transformers.quantizers.auto.register_quantization_config(method)": "reading a compressed checkpoint's config",
    QUANTIZERS: "telling whether transformers knows compressed checkpoints",
    QUANTIZATION_CONFIGS: "telling whether transformers knows the configs of compressed checkpoints",
    f"{_QUANTIZER}._process_model_before_weight_loading(model, kwargs)": "putting a plan on a model",
    f"{_QUANTIZER}._process_model_after_weight_loading(model, kwargs)": "float conversions of a loaded model",
    f"{_QUANTIZER}.preprocess_model": "taking the marks of a quantized model off",
    f"{_QUANTIZER}.{CHOOSE_ATTENTION}(config)": "refusing another attention",
    f"{_QUANTIZATION}.from_dict(config_dict, return_unused_kwargs)": "reading a config",
    f"{_QUANTIZATION}.to_diff_dict": "writing a config",
    f"{_MODEL}.from_pretrained": "checking the headers of files before tensors are read",
    f"{_MODEL}.{FROM_CONFIG}(config, kwargs)": "refusing to build a dense model instead",
    f"{_MODEL}.{MISSING_WEIGHTS}(missing_keys)": "refusing checkpoints that lack weights",
    f"{_MODEL}._keys_to_ignore_on_load_missing": "telling which weights a checkpoint must hold",
    f"{_MODEL}.all_tied_weights_keys": "telling which weights are stored once",
    f"{_MODEL}._supports_attention_backend": "telling which models can be compressed",
    f"{_MODEL}._supports_sdpa": "the attention that `detach` gives back",
    f"{_MODEL}.set_attn_implementation(attn_implementation)": "refusing another attention",
    f"{_MODEL}.resize_token_embeddings(new_num_tokens)": "refusing rows of blocks",
    f"{_MODULE}.requires_grad_(requires_grad)": "refusing gradients of blocks",
    f"{_MODEL}.get_decoder": "the module whose inputs are checked",
    f"{_CONFIG}._attn_implementation": "telling which attention a model runs",
    f"{_CONFIG}.{IMPLEMENTATION}": "telling which attention one part of a model runs",
    f"{_CONFIG}.get_text_config(decoder)": "the shape of a model",
    CAUSAL_MASK: "telling the stock masks",
    SLIDING_OVERLAY: "telling the stock sliding mask by its name",
    "transformers.masking_utils.sliding_window_causal_mask_function": "telling the stock sliding mask by what it is made of",
    BLOCKS_OVERLAY: "telling images in a mask",
    "transformers.masking_utils.create_sliding_window_causal_mask": "telling models that apply their windows",
    "transformers.masking_utils.sdpa_mask(mask_function, attention_mask, q_length, use_vmap, local_size)": (
        "what is handed to a mask function"
    ),
    ACTIVE_COLLECTOR: "telling whether hidden states are captured",
    OUTPUT_CAPTURING: "telling the hooks that capture them",
    "transformers.modeling_outputs.MoeModelOutputWithPast": "profiling models with experts",
    f"{_GENERATION}.{PREPARE_CACHE}"
    "(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)": "giving `generate` a plan's cache",
    f"{_GENERATION}.generate_batch": "refusing continuous batching",
    f"{_GENERATION}.init_continuous_batching": "refusing continuous batching",
    f"{_GENERATION}.continuous_batching_context_manager": "refusing continuous batching",
    "transformers.generation.configuration_utils.GenerationMode"
    "(GREEDY_SEARCH, SAMPLE, BEAM_SEARCH, BEAM_SAMPLE, ASSISTED_GENERATION)": "refusing other ways to generate",
    "transformers.generation.configuration_utils.GenerationConfig.is_assistant": "assisted decoding",
    "transformers.cache_utils.Cache._is_user_defined": "a cache that outlives `generate`",
    f"transformers.models.llama.modeling_llama.LlamaForCausalLM.forward({CACHE})": (
        "handing a cache to a model, which swallows an argument of another name"
    ),
    f"transformers.modeling_outputs.CausalLMOutputWithPast({CACHE})": "the cache that a model returns",
    **{
        f"transformers.cache_utils.{method}": "the cache under a plan"
        for method in (
            "Cache.__init__(layers)",
            "Cache.update(key_states, value_states, layer_idx)",
            "Cache.get_seq_length",
            "Cache.crop(tokens_to_remove)",
            "Cache.reorder_cache(beam_idx)",
            "Cache.batch_select_indices(indices)",
            "Cache.batch_repeat_interleave(repeats)",
            "Cache.activate_past_recording",
            "Cache.reset",
            "Cache.batch_size",
            "CacheLayerMixin.lazy_initialization(key_states, value_states)",
            "CacheLayerMixin.update(key_states, value_states)",
            "CacheLayerMixin.get_mask_sizes(query_length)",
            "CacheLayerMixin.get_seq_length",
            "CacheLayerMixin.get_max_length",
            "CacheLayerMixin.reorder_cache(beam_idx)",
            "CacheLayerMixin.offload",
            "CacheLayerMixin.prefetch",
            "CacheLayerMixin.reset",
            "CacheLayerMixin.is_compileable",
            "CacheLayerMixin.is_croppable",
            "CacheLayerMixin.supports_early_init",
            # what a cache asks of its layers and their base class does not have
            "DynamicSlidingWindowLayer.crop(tokens_to_remove)",
            "DynamicSlidingWindowLayer.batch_select_indices(indices)",
            "DynamicSlidingWindowLayer.batch_repeat_interleave(repeats)",
            "DynamicSlidingWindowLayer.activate_past_recording",
        )
    },
    LAYER_CALL: "telling other calls of a decoder layer from its own",
    f"{ACTIVATIONS}(silu, swish)": "telling a layer's activation",
    FORWARD_HOOKS: "telling whether something runs around every module",
    FORWARD_PRE_HOOKS: "telling whether something runs before every module",
    f"{_MODULE}._modules": "what a layer is made of",
    f"{_MODULE}._parameters": "what a layer is made of",
    f"{_MODULE}._forward_hooks": "telling whether something runs after a module",
    f"{_MODULE}._forward_pre_hooks": "telling whether something runs before a module",
    f"{_MODULE}.{COMPILED_CALL}": "telling whether something runs in a module's place",
    "torch.utils.hooks.RemovableHandle.next_id": "telling whether hooks were put anywhere",
    **{
        f"transformers.models.{family}.modeling_{family}.{name}": "a decoder layer in one call"
        for family, prefix in FAMILIES.items()
        for name in (
            f"{prefix}DecoderLayer.forward(hidden_states, attention_mask)",
            *(f"{prefix}{part}" for part in ("Attention", "MLP", "RMSNorm")),
            *ROTARY,
        )
    },
    "torch.Tensor._version": "telling whether weights that made a cache were changed",
    "torch.ops.mkldnn._linear_pointwise": "products of many rows in float32 on AMD",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "products of many rows in bfloat16",
    "torch.ops.mkldnn._is_mkldnn_fp16_supported": "products of many rows in float16",
    "torch.autograd.forward_ad._current_level": "telling whether derivatives are taken in forward mode",
    "torch._C._are_functorch_transforms_active": "telling whether a product is differentiated by torch.func",
    "torch.library.get_ctx": "sizes that a compiled model does not know",
    "torch._library.fake_impl.FakeImplCtx.new_dynamic_size": "sizes that a compiled model does not know",
    "torch.utils._python_dispatch.TorchDispatchMode": "the memory of profiling",
    "torch.utils._pytree.tree_iter(tree)": "the memory of profiling",
    "torch._dynamo.reset": "compiling from scratch for every length that is timed",
    "torch._dynamo.mark_static": "a compiled graph that is not for one number of rows",
    f"{LOOKUP_BACKEND}(compiler_fn)": "counting the graphs of a compiled step",
    COUNTERS: "counting the graph breaks of a compiled step",
}
"""What each name is for; in brackets the parameters of a function, or the members of another object, that are leaned on too."""
NAMES = tuple(PrivateName.parse(*entry) for entry in _USES.items())

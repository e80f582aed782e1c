"""Source models: what MODEL may be, its shape, its weights fingerprint, and whether it can be compressed.

MODEL is a hub id, a folder, or a `.gguf` file. Code from a repository never runs unless `trust_remote_code` is asked
for.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.artefacts import read_json
from moacompress.errors import MoaCompressError, ModelError, one_line
from moacompress.plan import DTYPE_BYTES, ModelShape
from moacompress.support import config_problems, native_windows, quantization_method, size_problems, stored_problems
from moacompress.weight_files import weight_problems

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moacompress.recipe import Recipe

logger = logging.getLogger(__name__)

FINGERPRINT_SAMPLES = 1024
"""Numbers read from every tensor for the weights fingerprint."""


@dataclass
class SourceModel:
    """A loaded causal LM with its tokenizer.

    Attributes:
        model: the dense model, in eval mode, weights frozen.
        tokenizer: its tokenizer.
        source: MODEL as given, folders and files made absolute.
        shape: what a plan must know of it.
        context: longest sequence the model was made for, tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    shape: ModelShape
    context: int


def load_source(
    source: str | Path, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> SourceModel:
    """Loads MODEL dense.

    Args:
        source: hub id, folder, or `.gguf` file.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own (float32 for `.gguf`).
        device: torch device, such as "cpu" or "cuda".
        trust_remote_code: run modelling code that comes with the model.

    Raises:
        ModelError: not a model, one that can not be compressed, or one whose files are damaged or pickles.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name, arguments = locate_source(source)
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPE_BYTES)}")
    if arguments and dtype == "auto":
        dtype = "float32"
    arguments["trust_remote_code"] = trust_remote_code
    try:
        if "gguf_file" not in arguments:
            config = AutoConfig.from_pretrained(name, **arguments)
            problems = [*stored_problems(config), *config_problems(config), *weight_problems(Path(name))]
            if problems:
                raise ModelError(f"{source} can not be used: {problems[0]}")
            arguments["use_safetensors"] = True  # a pickle can run code when it is opened
        wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, output_loading_info=True, **arguments)
        model, info = loaded
        arguments.pop("use_safetensors", None)
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
    except MoaCompressError:
        raise
    except ImportError as error:
        raise ModelError(f"{source} needs a package that is not installed: {error}") from error
    except Exception as error:  # damaged files raise whatever their parsers raise
        raise ModelError(
            f"{source} is not a causal language model that transformers can load: {one_line(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of its weights, such as {missing[0]}, which would be drawn at random"
        )
    if quantization_method(model.config) is not None:
        # transformers keeps the GGUF mark on the dequantized model and would refuse to save it
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    model.to(device).eval().requires_grad_(False)
    shape = model_shape(model)
    context = int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 0)
    place = str(Path(source).resolve()) if "gguf_file" in arguments else name
    return SourceModel(model, tokenizer, place, shape, context)


def load_for(recipe: Recipe, source: str | Path | SourceModel) -> SourceModel:
    """Returns MODEL loaded as a recipe says, its weights packed where there is memory for it, and a loaded model as it is.

    Errors are those of `load_source`.
    """
    if isinstance(source, SourceModel):
        return source
    loaded = load_source(source, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code)
    from moacompress.runtime.packing import pack_where_it_fits

    pack_where_it_fits(loaded.model)
    return loaded


def locate_source(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Returns the name and the arguments that transformers' `from_pretrained` takes for MODEL.

    Raises:
        ModelError: a path that is neither a model folder nor a `.gguf` file.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{source} is a folder without config.json, not a model")
        return str(path.resolve()), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{source} does not exist")
        return str(path.resolve().parent), {"gguf_file": path.name}
    if path.exists():
        raise ModelError(f"{source} is neither a model folder nor a .gguf file")
    return str(source), {}


def is_compressed(folder: Path) -> bool:
    """Returns whether `folder` holds the config of a compressed checkpoint; no weights and no plan are read.

    Raises:
        ArtefactError: its config.json is not JSON.
    """
    path = folder / "config.json"
    config = read_json(path, "config") if path.is_file() else None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == "moacompress"


def config_shape(config: Any, *, dtype: str, fingerprint: str = "") -> ModelShape:
    """Returns the shape that a transformers config describes.

    Raises:
        ModelError: the config lacks what a decoder with KV heads has.
    """
    text = config.get_text_config(decoder=True)
    problems = size_problems(text)
    if problems:
        raise ModelError(f"{getattr(text, 'model_type', 'the model')} {problems[0]}")
    try:
        layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    except Exception as error:  # a config's properties raise whatever they like
        name = getattr(config, "model_type", "the model")
        raise ModelError(f"{name} is not a decoder with attention heads: {one_line(error)}") from error
    return ModelShape(
        model_type=str(text.model_type),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        native_windows=tuple(native_windows(text, layers)),
        weights_fingerprint=fingerprint,
    )


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Returns the shape of a loaded model, fingerprint included.

    Raises:
        ModelError: the model's attention is not one that moacompress can replace.
    """
    check_supported(model)
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"the model's dtype {dtype} is not one of {', '.join(DTYPE_BYTES)}")
    return config_shape(model.config, dtype=dtype, fingerprint=weights_fingerprint(model))


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the self-attention module of every decoder layer, in layer order."""
    found: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        if layer is not None and "Attention" in type(module).__name__ and hasattr(module, "config"):
            found.setdefault(int(layer), module)
    return [found[index] for index in sorted(found)]


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the decoder layers in order: the modules that hold one attention module each, as a direct child."""
    attention = {id(module): index for index, module in enumerate(attention_modules(model))}
    found = {
        attention[id(child)]: module
        for module in model.modules()
        for child in module.children()
        if id(child) in attention
    }
    return [found[index] for index in sorted(found)]


def check_supported(model: PreTrainedModel) -> None:
    """Refuses a model whose attention moacompress can not replace.

    Raises:
        ModelError: says what in the model is not supported.
    """
    problems = config_problems(model.config) or module_problems(model)
    if problems:
        raise ModelError(problems[0])


def module_problems(model: PreTrainedModel) -> list[str]:
    """Returns what in the modules of a model can not be compressed, one sentence each; weights may be on "meta".

    Args:
        model: a model whose config has no `config_problems`.
    """
    config = model.config.get_text_config(decoder=True)
    name = config.model_type
    if not model.can_generate():
        return [f"{name} is not a decoder-only causal language model"]
    if not getattr(model, "_supports_attention_backend", False):
        base = model.base_model
        alibi = any("alibi" in attribute and callable(getattr(base, attribute)) for attribute in dir(base))
        return [
            f"{name} {'adds ALiBi biases to the scores and ' if alibi else ''}does not dispatch its attention through "
            "transformers' attention interface, so moacompress can not replace it"
        ]
    decoder: Any = model.get_decoder()
    if not hasattr(decoder, "config"):
        return [f"{name} gives a {type(decoder).__name__} as its decoder, so moacompress can not bring its cache"]
    modules = attention_modules(model)
    if len(modules) != config.num_hidden_layers:
        return [f"{name} has attention in {len(modules)} of {config.num_hidden_layers} layers; all need it"]
    if any(getattr(module, "is_causal", True) is False for module in modules):
        return [f"{name} attends in both directions, so no key can be dropped; only causal models work"]
    return [*_uneven_projections(name, config, modules), *_windows_of_its_own(name, config, decoder)]


def _uneven_projections(name: str, config: Any, modules: list[torch.nn.Module]) -> list[str]:
    """A plan knows one number of KV heads, and one size of keys and values."""
    shape = config_shape(config, dtype="float32")
    for layer, module in enumerate(modules):
        for kind in ("k_proj", "v_proj"):
            width = getattr(getattr(module, kind, None), "out_features", None)
            if width is not None and width != shape.kv_heads * shape.head_dim:
                return [
                    f"{name} has other KV heads in layer {layer}: its {kind} gives {width} numbers a token, not "
                    f"{shape.kv_heads} KV heads of {shape.head_dim}; all layers need the same"
                ]
    return []


def _windows_of_its_own(name: str, config: Any, decoder: Any) -> list[str]:
    """A plan trusts the windows in the config, so the model must apply them through transformers' masks."""
    windows = native_windows(config, config.num_hidden_layers)
    module = sys.modules.get(type(decoder).__module__)
    if all(window is None for window in windows) or hasattr(module, "create_sliding_window_causal_mask"):
        return []
    return [
        f"{name} has a sliding_window of {config.sliding_window} in its config, which it does not apply through "
        "transformers' masks, so what its layers see is not known"
    ]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Returns a short hash of the weights: names, shapes and a spread sample of each tensor, rounded to bfloat16.

    Rounding makes a float32 and a bfloat16 load of one checkpoint agree. At most `FINGERPRINT_SAMPLES` numbers of a
    tensor are read, so it takes well under a second for any model.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // FINGERPRINT_SAMPLES)
        sample = flat[::step][:FINGERPRINT_SAMPLES].to(torch.bfloat16).cpu()
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]

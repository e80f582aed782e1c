"""Source models: what MODEL may be, its shape, and whether it can be compressed.

MODEL is a hub id, a folder, or a `.gguf` file. Code from a repository never runs unless `trust_remote_code` is asked
for.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.artefact_names import DENSE_FOLDER, MODEL_FOLDER, PLAN_FILE, PROFILE_FOLDER, RECIPE_FILE
from moacompress.core.errors import ArtefactError, MoaCompressError, ModelError, UsageError, did_you_mean, one_line
from moacompress.core.files import read_json
from moacompress.models.fingerprint import weights_fingerprint
from moacompress.models.gguf_config import complete_config
from moacompress.models.gguf_model import check_all_read, load_gguf
from moacompress.models.gguf_reading import reading_once
from moacompress.models.hub import hub_arguments, index_of, is_hub_name
from moacompress.models.modules import check_supported
from moacompress.models.placement import checked_placement, is_device_map
from moacompress.models.shape import config_shape
from moacompress.models.support import TORCHAO, config_problems, quantization_method, stored_problems
from moacompress.models.weight_files import (
    ADAPTER_FILE,
    check_index,
    gguf_dtype,
    stored_dtype,
    tokenizer_problems,
    weight_problems,
)
from moacompress.rules.formats import DTYPE_BYTES, dtype_name
from moacompress.rules.model_shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


KEEP, DENSE = "keep", "dense"
"""What becomes of weights that a file has in blocks: they stay as they are, or become floats."""
ROUNDING = ("int8", "int4")
"""What weights can be rounded to as they are loaded."""
GGUF_PACKAGES = ("accelerate", "gguf")
"""What transformers needs to load a `.gguf` file; the extra `demo` brings them."""


@dataclass
class SourceModel:
    """A loaded causal LM with its tokenizer.

    Attributes:
        model: the dense model, in eval mode, weights frozen.
        tokenizer: its tokenizer.
        source: MODEL as given, folders and files made absolute.
        shape: what a plan must know of it; its dtype is the checkpoint's own, whatever the model computes in.
        context: longest sequence the model was made for, tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    shape: ModelShape
    context: int

    @property
    def computes_in(self) -> str:
        """The dtype of the loaded weights; what is measured depends on it, bytes go by that of `shape`."""
        return dtype_name(str(self.model.dtype))


def load_source(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    weights: str = KEEP,
    head_weights: str | None = None,
    trust_remote_code: bool = False,
) -> SourceModel:
    """Loads MODEL without a plan.

    Args:
        source: hub id, folder, or `.gguf` file.
        dtype: what the model computes in: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own; that of a
            `.gguf` file is `weight_files.gguf_dtype`.
        device: torch device, such as "cpu" or "cuda", or a device map, see `placement`.
        weights: "keep" for the blocks of a `.gguf` file as they are, where layers can multiply with them (`gguf_model`);
            "dense" for floats; "int8" or "int4" to round those of linear layers to blocks (`weight_rounding`).
        head_weights: "int8" or "int4" for embedding and output layer, where `weights` rounds; None leaves them.
        trust_remote_code: run modelling code that comes with the model.

    Raises:
        UsageError: weights that are nothing of the kind; a device that is not here, a device map that is none, or one beside
            weights that are rounded or in blocks.
        ModelError: not a model, one that cannot be compressed, or one whose files are damaged or pickles.
    """
    placed = checked_placement(device)
    name, arguments = locate_source(source)
    dtype = dtype_name(dtype)
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPE_BYTES)}")
    if weights not in (KEEP, DENSE, *ROUNDING):
        raise UsageError(f"weights {weights!r} is not one of {', '.join((KEEP, DENSE, *ROUNDING))}")
    is_gguf = "gguf_file" in arguments
    if placed:
        _check_can_place(device, weights, is_gguf)
    arguments["trust_remote_code"] = trust_remote_code
    try:
        with reading_once() if is_gguf else contextlib.nullcontext():
            own: str | None
            if is_gguf:
                model, missing, own = _load_gguf(str(source), name, arguments, dtype, weights == KEEP)
            else:
                model, missing, own = _load_folder(str(source), name, arguments, dtype, placed)
            tokenizer = _tokenizer(name, arguments)
    except MoaCompressError:
        raise
    except ImportError as error:
        raise ModelError(f"{source} needs a package that is not installed: {error}") from error
    except Exception as error:  # damaged files raise whatever their parsers raise
        reason = f"{one_line(error).rstrip('.')}{_if_name_only(source)}"
        raise ModelError(f"{source} is not a causal language model that transformers can load: {reason}") from error
    if getattr(model, "peft_config", None):  # on the hub, or beside a .gguf file
        raise ModelError(
            f"{source} has an adapter beside its weights ({ADAPTER_FILE}), which a checkpoint would leave out; merge it with "
            "PEFT's merge_and_unload and save the model, or move the adapter's files away"
        )
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of its weights, such as {missing[0]}, which would be drawn at random"
        )
    if quantization_method(model.config) == TORCHAO:
        from moacompress.models.torchao_weights import with_floats

        model = with_floats(model, trust_remote_code)
    if quantization_method(model.config) is not None:
        # the mark stays on a model that was dequantized, and transformers would refuse to save it
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    exact: SourceModel | None = None
    rounds = weights in ROUNDING
    if own is not None and loses_bits(own, dtype, rounds) and not placed and (rounds or not is_gguf):
        kinds: dict[str, Any] = {"weights": weights, "head_weights": head_weights}
        exact = load_source(source, dtype=own, trust_remote_code=trust_remote_code, **kinds)
    if rounds:
        from moacompress.models.weight_rounding import round_like, round_weights

        if exact is not None:
            round_like(model, exact.model)
        else:
            round_weights(model, weights, head_weights)
    if not placed:
        model.to(device)
    model.eval().requires_grad_(False)
    shape = model_shape(model, own)
    if exact is not None:
        shape = replace(shape, weights_fingerprint=exact.shape.weights_fingerprint)
    context = context_length(model)
    place = str(Path(name) / arguments["gguf_file"]) if is_gguf else name
    return SourceModel(model, tokenizer, place, shape, context)


def _load_folder(
    source: str, name: str, arguments: dict[str, Any], dtype: str, placed: dict[str, Any]
) -> tuple[Any, list[str], str | None]:
    """Returns the model of a folder or a name on the hub, the weights that it lacks, and its own dtype where that is known."""
    from transformers import AutoConfig

    folder, trust_remote_code = Path(name), arguments["trust_remote_code"]
    check_family(folder, trust_remote_code)
    config = AutoConfig.from_pretrained(name, **arguments)
    problems = [*stored_problems(config), *config_problems(config), *weight_problems(folder)]
    if folder.is_dir() and not trust_remote_code:
        problems += tokenizer_problems(folder)
    if problems:
        raise ModelError(f"{source} cannot be used: {problems[0]}")
    if not folder.is_dir() and (index := index_of(name, arguments)) is not None:
        check_index(index)
    own = dtype_name(str(config.dtype)) if config.dtype is not None else stored_dtype(folder)
    more = {"use_safetensors": True, **arguments, **placed}  # a pickle can run code when it is opened
    return (*_from_pretrained(name, dtype, more), own)


def _load_gguf(source: str, name: str, arguments: dict[str, Any], dtype: str, keep: bool) -> tuple[Any, list[str], str]:
    """Returns the model of a `.gguf` file, with blocks as they are if `keep`, the weights that it lacks, and its own dtype."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig

    file, reader = Path(source), GGUFReader(source)
    own = gguf_dtype(reader)
    dtype = own if dtype == "auto" else dtype
    config = AutoConfig.from_pretrained(name, **arguments)
    complete_config(config, reader, file)
    if problems := config_problems(config):
        raise ModelError(f"{source} cannot be used: {problems[0]}")
    model, missing = load_gguf(file, reader, config, getattr(torch, dtype)) if keep else None, list[str]()
    if model is None:
        model, missing = _from_pretrained(name, dtype, {"config": config, **arguments})
    check_all_read(file, reader, model)
    return model, missing, own


def _from_pretrained(name: str, dtype: str, arguments: dict[str, Any]) -> tuple[Any, list[str]]:
    """Returns a model as transformers loads it, and the weights that were not in its files."""
    import torch
    from transformers import AutoModelForCausalLM

    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, output_loading_info=True, **arguments)
    return loaded[0], sorted(loaded[1]["missing_keys"])


def _tokenizer(name: str, arguments: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **arguments)
    except ImportError:
        raise
    except Exception as error:  # damaged files raise whatever their parsers raise
        raise ModelError(f"the tokenizer in {name} cannot be loaded: {one_line(error)}") from error


def loses_bits(own: str, dtype: str, rounds: bool = False) -> bool:
    """Returns whether numbers of a model in `dtype` no longer say whose they are, or what they would be rounded to.

    `own` is the dtype of the files, and `rounds` whether they are to be rounded to blocks.
    """
    import torch

    if dtype == "auto" or torch.promote_types(getattr(torch, own), wanted := getattr(torch, dtype)) == wanted:
        return False
    return rounds or dtype == "float16"  # which loses bits of small numbers; fingerprints are those of bfloat16


def _check_can_place(device: str, weights: str, is_gguf: bool) -> None:
    """Refuses weights that a device map cannot place as they are read.

    Raises:
        UsageError: they are to be rounded, or come from a `.gguf` file.
    """
    if is_gguf:
        raise UsageError(
            f"{_placing(device)} places weights of safetensors files as they are read, and a .gguf file has none; give one "
            "device, or write the model as safetensors first (`save_pretrained`)"
        )
    if weights not in (KEEP, DENSE):
        raise UsageError(
            f"weights that are to be {weights} are rounded in memory, and {_placing(device)} may leave some elsewhere; give "
            "one device"
        )


def _placing(device: str) -> str:
    return f"the device map {device}" if is_device_map(device) else "--tensor-parallel"


def locate_source(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Returns the name and the arguments that transformers' `from_pretrained` takes for MODEL.

    Raises:
        ModelError: a path that is neither a model folder nor a `.gguf` file; a `.gguf` file without the packages that read it;
            or a name on the hub, which cannot be reached, and that is not in the cache.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            _refuse_run(path)
            raise ModelError(f"{source} is a folder without config.json, not a model")
        return str(path.resolve()), {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{source} does not exist{_if_name_only(source)}")
        lacking = [package for package in GGUF_PACKAGES if importlib.util.find_spec(package) is None]
        if lacking:
            raise ModelError(
                f"{source} needs the package {' and '.join(lacking)}, with which transformers reads .gguf files: "
                "`pip install 'moacompress[demo]'`"
            )
        return str(path.parent.resolve()), {"gguf_file": path.name}  # of a link to a blob only the link has the name
    if path.exists():
        folder = f"; give its folder {path.parent}" if (path.parent / "config.json").is_file() else ""
        raise ModelError(f"{source} is neither a model folder nor a .gguf file{folder}")
    if not is_hub_name(str(source)):
        raise ModelError(
            f"{source} does not exist; give a model folder, a .gguf file, or a name on the hub such as owner/name"
        )
    try:
        return str(source), hub_arguments(str(source))
    except ModelError as error:
        raise ModelError(f"{error}{_if_name_only(source)}") from error


def _refuse_run(folder: Path) -> None:
    """Refuses the folder of a run in the place of a model, with the dense model that it was made from.

    Raises:
        ModelError: it is one.
    """
    mark, dense = folder / RECIPE_FILE, folder / DENSE_FOLDER
    if not mark.is_file() or not any((folder / name).exists() for name in (MODEL_FOLDER, PLAN_FILE, PROFILE_FOLDER)):
        return
    try:
        found = read_json(mark, "recipe")
    except ArtefactError:
        found = None
    source = found.get("model") if isinstance(found, dict) else None
    named = str(dense) if (dense / "config.json").is_file() else source if isinstance(source, str) else None
    where = f": {named}" if named else ""
    raise ModelError(f"{folder} is the folder of a run, not a dense model; give the one that it was made from{where}")


def check_family(folder: Path, trust_remote_code: bool) -> None:
    """Refuses a folder whose `model_type` transformers does not know, with the nearest that it does.

    Raises:
        ModelError: it does not, and code of the model's own is not to be run.
    """
    from transformers import CONFIG_MAPPING, __version__

    file = folder / "config.json"
    try:
        config = read_json(file, "config.json") if file.is_file() else {}
    except ArtefactError:  # transformers says what is wrong with it
        return
    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(family, str) or family in CONFIG_MAPPING or (trust_remote_code and "auto_map" in config):
        return
    hint = did_you_mean(family, CONFIG_MAPPING.keys(), "")
    if "auto_map" in config:
        hint = "it comes with code of its own, which --trust-remote-code runs"
    known = f"{file} has the model_type {family!r}, which transformers {__version__} does not know"
    raise ModelError(f"{known}; {hint}" if hint else known)


def _if_name_only(source: str | Path) -> str:
    """Returns the hint for what may be the name of a local model without its path."""
    if Path(source).exists() or Path(source).name != str(source):
        return ""
    return "; give the path of the model as MODEL (a shared recipe holds only its name)"


def find_model_folder(target: Path) -> Path | None:
    """Returns the model folder that `target` is or, as the folder of a run, holds; None if there is none."""
    return next((folder for folder in (target, target / MODEL_FOLDER) if (folder / "config.json").is_file()), None)


def context_length(model: PreTrainedModel) -> int:
    """Returns the most tokens that a model was made for, 0 where its config does not say."""
    return int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 0)


def is_compressed(folder: Path) -> bool:
    """Returns whether `folder` holds the config of a compressed checkpoint; no weights and no plan are read.

    Raises:
        ArtefactError: its config.json is not JSON.
    """
    path = folder / "config.json"
    config = read_json(path, "config") if path.is_file() else None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == "moacompress"


def model_shape(model: PreTrainedModel, dtype: str | None = None) -> ModelShape:
    """Returns the shape of a loaded model, fingerprint included; its dtype is by default that of the loaded weights.

    Raises:
        ModelError: the model's attention is not one that moacompress can replace.
    """
    check_supported(model)
    dtype = dtype or dtype_name(str(model.dtype))
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"the model's dtype {dtype} is not one of {', '.join(DTYPE_BYTES)}")
    return config_shape(model.config, dtype=dtype, fingerprint=weights_fingerprint(model))

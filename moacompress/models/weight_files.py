"""The files of a model folder: those of weights, checked from their headers, and those that a tokenizer is read from.

No tensor is read, and nothing is unpickled.

Everything here works on files that are not trusted: safetensors compares offsets, shapes and sizes with the file's before
memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moacompress.core.errors import ArtefactError
from moacompress.core.files import read_json
from moacompress.models.gguf_reading import reading_once

FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that moacompress takes for weights, with their bytes, as safetensors names them."""
FLOAT_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The same types as safetensors and `.gguf` files name them, and as torch does."""
OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U64": 8, "U32": 4, "U16": 2}
"""Types of buffers, which may stand beside the weights."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Says which of several files holds which weight; transformers opens whatever it names."""
INDICES = "*.safetensors.index*.json"
"""Names of all indices: a config or a variant may name another one than `INDEX_FILE`."""
ADAPTER_FILE = "adapter_config.json"
"""Has transformers put an adapter on the model, where PEFT is installed."""

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
    "*.bpe.model",
    "*.spm",
    "*.tiktoken",
)
"""Names of files that hold a vocabulary."""


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor: its type and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name.

    Raises:
        ArtefactError: the file is cut short, is not safetensors, or says that it holds more than it does.
    """
    try:
        with safe_open(str(file), framework="numpy") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no dictionary
            return {name: StoredTensor(tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in found.items()}
    except MemoryError as error:  # safetensors maps a file, and this process may not have so many addresses
        raise ArtefactError(f"cannot read {file}{_size(file)}: {error}") from error
    except (OSError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]  # it may name a tensor, as the file does
        raise ArtefactError(f"{file}{_size(file)} is not a whole safetensors file: {why}") from error


def check_weights(files: Sequence[Path], expected: Mapping[str, Sequence[int]], blocks: Container[str] = ()) -> None:
    """Refuses weight files that do not fit a model, before any of their tensors is read.

    `expected` are the shapes of the model's weights by name. Tensors of other names are left to transformers, which may rename
    them; of those with a known name the number of elements must agree. `blocks` names the weights in blocks, shapes of bytes.

    Raises:
        ArtefactError: a file that is not safetensors, is damaged, or holds a tensor of another size, or bytes for numbers.
    """
    for file in files:
        if file.suffix != ".safetensors":
            raise ArtefactError(
                f"{file} is not a safetensors file, and nothing else is read: a pickle can run code when it is opened"
            )
        for name, tensor in read_header(file).items():
            wanted = expected.get(name)
            if wanted is not None and tensor.numbers != math.prod(wanted):
                raise ArtefactError(
                    f"{file} has a tensor {name} of shape {list(tensor.shape)}, the model needs {list(wanted)}; the file "
                    "belongs to another model"
                )
            if wanted is not None and (tensor.dtype == "U8") != (name in blocks):
                kinds = ("blocks, U8", tensor.dtype) if name in blocks else ("numbers", "U8")
                raise ArtefactError(f"{file} has {name} as {kinds[1]}, the model needs {kinds[0]}; export it again")


def weight_problems(folder: Path, blocks: Container[str] = ()) -> list[str]:
    """Returns what in the weight files of a model folder cannot be used, one sentence each; none if it has no weights."""
    try:
        check_beside(folder)
    except ArtefactError as error:
        return [str(error)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file for pattern in PICKLES for file in folder.glob(pattern))
        if not pickles:
            return []
        return [
            f"{folder} has its weights only in {pickles[0].name}, a pickle, which can run code when it is opened; save the "
            "model as safetensors"
        ]
    try:
        tensors = {name: (file, tensor) for file in files for name, tensor in read_header(file).items()}
    except ArtefactError as error:
        return [str(error)]
    found: dict[str, str] = {}
    for name, (file, tensor) in tensors.items():
        if (
            name not in blocks
            and tensor.dtype not in FLOAT_BYTES
            and (name.endswith("weight") or tensor.dtype not in OTHER_BYTES)
        ):
            found.setdefault(tensor.dtype, f"{file} holds {tensor.dtype} tensors, such as {name}")
    return [f"{text}; weights must be one of {', '.join(FLOAT_BYTES)}" for text in found.values()]


def stored_dtype(folder: Path) -> str | None:
    """Returns the dtype of the first weight in a model folder, which transformers goes by where the config names none.

    None where there are no safetensors files, as for what is not a folder.
    """
    stored = (tensor.dtype for file in sorted(folder.glob("*.safetensors")) for tensor in read_header(file).values())
    return next((FLOAT_NAMES[kind] for kind in stored if kind in FLOAT_NAMES), None)


def checkpoint_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers loads a checkpoint from.

    Raises:
        ArtefactError: there are none, or not all that the index names; or as `check_beside`.
    """
    check_beside(folder)
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ArtefactError(f"{folder} has no weights: there is no {single.name} and no {index.name}")
    files = [folder / name for name in check_index(index)]
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise ArtefactError(f"{folder} lacks {len(lost)} of its {len(files)} weight files, such as {lost[0]}")
    return files


def check_beside(folder: Path) -> None:
    """Refuses what has other weights loaded than those that lie in a model folder: an index that names them, or an adapter.

    Raises:
        ArtefactError: as `check_index`, or there is an adapter.
    """
    for index in sorted(folder.glob(INDICES)):
        check_index(index)
    if (folder / ADAPTER_FILE).is_file():
        raise ArtefactError(
            f"{folder} has an adapter beside its weights ({ADAPTER_FILE}), which would change them in silence; merge it with "
            "PEFT's merge_and_unload and save the model, or move the adapter's files away"
        )


def check_index(index: Path) -> list[str]:
    """Returns the names of the files that an index of weights names: safetensors, in its own folder.

    Raises:
        ArtefactError: it is no index, or it names something else, such as a pickle or a file elsewhere.
    """
    data = read_json(index, "index of weights")
    named = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ArtefactError(f"{index} does not say which file holds which weight; save the model again")
    names = sorted(set(named.values()))
    other = next((name for name in names if not name.endswith(".safetensors")), None)
    if other is not None:
        raise ArtefactError(
            f"{index} names {other[:80]!r}, which is not a safetensors file, and nothing else is read: a pickle can run code "
            "when it is opened; save the model as safetensors"
        )
    elsewhere = next((name for name in names if not is_plain_name(name)), None)
    if elsewhere is not None:
        raise ArtefactError(
            f"{index} names {elsewhere[:80]!r}, which is not a plain file name; weights are read from the folder of their "
            "index alone, so put the file there and name it without its path"
        )
    return names


def is_plain_name(name: str) -> bool:
    """Whether a text can only name a file in the folder that it is joined to, on any system."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def loaded_files(folder: Path) -> list[Path]:
    """Returns what `checkpoint_files` does; nothing for a folder that has no weights at all."""
    there = any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))
    return checkpoint_files(folder) if there else []


def missing_weights(
    files: Sequence[Path], expected: Mapping[str, Sequence[int]], tied: Mapping[str, str]
) -> str | None:
    """Returns what of a model's weights its files do not hold, one sentence; None if they hold all.

    `expected` are the model's shapes by name, and `tied` names of weights that are the same tensor, of which one is enough.
    Where files have names that the model does not know, transformers may put weights together on loading: then only the
    numbers are counted.

    Raises:
        ArtefactError: a file is no whole safetensors file.
    """
    held = {name: tensor for file in files for name, tensor in read_header(file).items()}
    enough = {name for pair in tied.items() if not held.keys().isdisjoint(pair) for name in pair}
    lost = sorted(name for name in expected if name not in held and name not in enough)
    if lost and held.keys() <= expected.keys():
        return f"{files[0].parent} lacks {len(lost)} of its weights, such as {lost[0]}"
    here = sum(tensor.numbers for tensor in held.values())
    needed = sum(math.prod(shape) for name, shape in expected.items() if name not in tied)
    if lost and here < needed:
        return f"the weight files in {files[0].parent} hold {here:,} numbers, the model needs {needed:,}"
    return None


def tokenizer_problems(folder: Path) -> list[str]:
    """Returns what is missing for a tokenizer in a model folder, one sentence: some load without, and know no words."""
    if any(any(folder.glob(name)) for name in VOCABULARIES):
        return []
    return [
        f"{folder} has no tokenizer: there is no tokenizer.json, tokenizer.model or vocab.json; copy the tokenizer's files "
        "from where the model is from"
    ]


def gguf_problems(file: Path) -> list[str]:
    """Returns what in a `.gguf` file's tensor types cannot be dequantized, one sentence each."""
    import gguf
    from gguf import GGML_QUANT_SIZES, dequantize

    first: dict[Any, str] = {}
    with reading_once():
        tensors = gguf.GGUFReader(file).tensors
    for tensor in tensors:
        first.setdefault(tensor.tensor_type, tensor.name)
    found = []
    for kind, name in first.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except (NotImplementedError, KeyError, ValueError):
            found.append(
                f"{file} holds tensors of type {getattr(kind, 'name', kind)}, such as {name}, which the package gguf cannot "
                "turn into floats"
            )
    return found


def gguf_dtype(reader: Any) -> str:
    """Returns the dtype that a `.gguf` file stands for: that of its matrices, bfloat16 where they are quantized or several.

    The file does not say what was quantized; nearly always it was bfloat16, and its rounding is far below that of the codes.
    """
    kinds = {str(tensor.tensor_type.name) for tensor in reader.tensors if len(tensor.shape) > 1}
    return FLOAT_NAMES.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _size(file: Path) -> str:
    """Returns what can be said of a file that is not what it should be."""
    try:
        with file.open("rb") as stream:
            pickled = stream.read(2) in (b"PK", b"\x80\x02")
        return f" ({file.stat().st_size:,} bytes{', like a pickle of torch.save' if pickled else ''})"
    except OSError:
        return ""

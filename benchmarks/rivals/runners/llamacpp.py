"""llama.cpp: the shipped weights or the same as BF16, with a cache of 16, 8 or 4 bits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.runners.engine import Job, SteppedEngine

BF16_FILE_TYPE = 32
"""What llama.h calls LLAMA_FTYPE_MOSTLY_BF16."""
CACHE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
"""ggml's numbers of types of a cache."""
PROMPT_BATCH = 2048


class Llama(SteppedEngine):
    """llama.cpp.

    Args:
        file: the `.gguf` file.
        threads: of a step, and of a prompt.
        tokens: that there must be room for.
        cache_type: type of keys and values, see `CACHE_TYPES`.
    """

    packages = ("llama-cpp-py-sync",)

    def __init__(self, file: str, threads: int, tokens: int, cache_type: str) -> None:
        self._ffi, self._lib = llama_library()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(os.fsencode(file), params)
        if self._model == self._ffi.NULL:
            raise SystemExit(f"llama.cpp cannot load {file}")
        wanted = self._lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch = tokens, min(tokens, PROMPT_BATCH)
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = CACHE_TYPES[cache_type]
        self._context = self._lib.llama_init_from_model(self._model, wanted)
        if self._context == self._ffi.NULL:
            raise SystemExit(f"llama.cpp has no memory for {tokens} tokens")
        self.vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def read(self, ids: Sequence[int]) -> None:
        """As `SteppedEngine`."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self.more(ids)

    def more(self, ids: Sequence[int]) -> None:
        """As `SteppedEngine`."""
        for begin in range(0, len(ids), PROMPT_BATCH):
            self._decode(ids[begin : begin + PROMPT_BATCH])

    def best(self) -> int:
        """As `SteppedEngine`."""
        logits = self._ffi.unpack(self._lib.llama_get_logits_ith(self._context, -1), self.vocabulary)
        return int(max(range(self.vocabulary), key=logits.__getitem__))

    def kv_bytes(self) -> int:
        """Returns the bytes that llama.cpp saves of its cache: keys and values, and a few bytes a token about it."""
        return int(self._lib.llama_state_seq_get_size(self._context, 0))

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = self._ffi.new("llama_token[]", list(ids))
        failed = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if failed:
            raise SystemExit(f"llama_decode of {len(ids)} tokens returned {failed}")
        self._lib.llama_synchronize(self._context)


def llama_library() -> tuple[Any, Any]:
    """Returns the interface to C and the library, which says nothing but errors from now on."""
    try:
        from llama_cpp_py_sync import _cffi_bindings as bindings
    except ImportError:
        raise SystemExit("llama.cpp is not here: pip install llama-cpp-py-sync") from None
    ffi, library = bindings.get_ffi(), bindings.get_lib()
    silent = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda level, text, data: None)
    library.llama_log_set(silent, ffi.NULL)
    llama_library.silent = silent  # type: ignore[attr-defined]  # C holds it from now on
    return ffi, library


def write_bf16(source: Path, to: Path) -> None:
    """Writes a `.gguf` file's weights as BF16, by llama.cpp's own conversion."""
    ffi, library = llama_library()
    params = ffi.new("struct llama_model_quantize_params *", library.llama_model_quantize_default_params())
    params.ftype, params.allow_requantize = BF16_FILE_TYPE, True
    failed = library.llama_model_quantize(os.fsencode(source), os.fsencode(to), params)
    if failed:
        raise SystemExit(f"llama.cpp cannot write {source} as BF16: it returned {failed}")


def make(task: Job) -> Llama:
    """Returns the engine of a setting: `weights` is `shipped` or `bf16`, `cache_type` one of `CACHE_TYPES`."""
    file = Path(task["gguf"])
    if task["weights"] == "bf16":
        converted = Path(task["folder"]) / f"{task['model_key']}.bf16.gguf"
        if not converted.exists():
            partial = converted.with_suffix(".partial")
            write_bf16(file, partial)
            partial.rename(converted)
        file = converted
    return Llama(str(file), task["threads"], task["tokens"], task["cache_type"])

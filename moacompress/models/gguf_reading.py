"""One reading of a `.gguf` file for all who want something of it.

transformers opens such a file again for the configuration, the weights and the tokenizer, and each time the package `gguf`
makes an array of every word of the vocabulary, which takes seconds, more of them as these are slices of a `numpy.memmap`. For
the weights transformers also makes the table of tensor names once per module of the model.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

_one_at_a_time = threading.RLock()


@contextmanager
def reading_once() -> Iterator[None]:
    """Lets every `gguf.GGUFReader` of a file that is made in here be the same one, and the tables of names too."""
    gguf: Any = importlib.import_module("gguf")
    with _one_at_a_time:
        before = gguf.GGUFReader, gguf.get_tensor_name_map
        made, named = functools.cache(_plain(gguf.GGUFReader)), functools.cache(gguf.get_tensor_name_map)

        def reader(path: os.PathLike[str] | str, *mode: str) -> Any:
            return made(os.path.realpath(path), *mode)

        gguf.GGUFReader, gguf.get_tensor_name_map = reader, named
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = before


def _plain(kind: Any) -> Any:
    """Returns a class of readers that slice what is mapped as a plain array, which is faster, and that stop at its end.

    A header that is not trusted may name more numbers than the file has: the package's own reader goes on for each of them.
    """

    class Reader(kind):  # type: ignore[misc]
        @property
        def data(self) -> npt.NDArray[np.uint8]:
            """The bytes of the file."""
            return self._plain

        @data.setter
        def data(self, mapped: npt.NDArray[np.uint8]) -> None:
            self._plain = mapped.view(np.ndarray)

        def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, *order: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *order, **named)
            if len(found) < count:
                raise ValueError(f"the file ends before what its header says is at byte {int(offset):,}")
            return found

    return Reader

"""What `gpu.py` measures, by its sizes and names."""

from __future__ import annotations

from typing import NamedTuple

PAIRS = (("native", "native"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4"))
SHARE = 256
"""Of 1,024 tokens, how many a plan's windows grow by: a quarter."""
MIN_WINDOW = 64
PLAIN, FULL, QUARTER, CODED = "plain", "full span", "a quarter, native/native", "a quarter, int8/int4"
UNDER_PLANS = (FULL, QUARTER, CODED)
STATIC, QUANTIZED = "static cache, compiled", "transformers' quantized cache"
"""Sides of the comparison of whole models; the last two are transformers' other caches."""


class Sizes(NamedTuple):
    """What is measured, by its size.

    Attributes:
        model: of the configuration.
        cells: rows and tokens of decode steps, the most tokens first.
        batch: tokens of a row where batches are as large as memory allows.
        prompts: tokens of prompts.
        copy: bytes that are copied.
        repeats: of every measurement.
        layers: of the model whose logits are compared.
        replayed: steps that are replayed, and compared with steps that are not.
    """

    model: dict[str, int]
    cells: tuple[tuple[int, int], ...]
    batch: int
    prompts: tuple[int, ...]
    copy: int
    repeats: int
    layers: int
    replayed: int

    @property
    def longest(self) -> tuple[int, int]:
        """The cell with the longest rows, of those the most."""
        return max(self.cells, key=lambda cell: (cell[1], cell[0]))

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.model["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.model["num_key_value_heads"]

    @property
    def dim(self) -> int:
        """Numbers of a key, and of a value."""
        return self.model["hidden_size"] // self.heads


LARGE = Sizes(
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    ((56, 8192), (8, 32768), (8, 8192), (1, 32768)),
    8192,
    (4096, 16384),
    1 << 30,
    20,
    4,
    300,
)
SMALL = Sizes(
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "max_position_embeddings": 512,
    },
    ((2, 96),),
    96,
    (80,),
    1 << 16,
    1,
    2,
    6,
)

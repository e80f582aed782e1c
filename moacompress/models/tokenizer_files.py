"""The files that a model's tokenizer is read from: without one some tokenizers load all the same, and know no words."""

from __future__ import annotations

from pathlib import Path

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


def tokenizer_problems(folder: Path) -> list[str]:
    """Returns what is missing for a tokenizer in a model folder, one sentence; nothing is loaded."""
    if any(any(folder.glob(name)) for name in VOCABULARIES):
        return []
    return [
        f"{folder} has no tokenizer: there is no tokenizer.json, tokenizer.model or vocab.json; copy the tokenizer's files "
        "from where the model is from"
    ]

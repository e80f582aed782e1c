"""The licence and notice files that come with a model, which go into every checkpoint that is made of it."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from moacompress.core.files import is_within

logger = logging.getLogger(__name__)

LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
OF_MODELS = (
    *LICENCE_PATTERNS,
    "*TERMS*",
    "README*",
    "*.gguf",
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "*_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*imatrix*",
    "*SHA256SUMS*",
    "*.sha256",
)
"""Names of what lies in a folder of models and nothing else, beside names that begin with a dot, which are tools' own."""
_LEVELS = 3
"""Folders between a file of an installed package and the `*.dist-info` folder of that, at most."""


def licence_files(source: str) -> list[Path]:
    """Returns the licence and notice files that come with MODEL.

    For a folder these lie in it. For a `.gguf` file they are those of the installed package that it came in, or else those that
    lie beside it, if the folder holds nothing but files of models (`OF_MODELS`); where it does, they are named in a warning, as
    they may be of something else. For a hub id they are fetched, and a failure to do so is logged.
    """
    path = Path(source)
    if path.is_dir():
        return _matching(path)
    if path.is_file():
        return _of_package(path) or _beside(path)
    try:
        from huggingface_hub import snapshot_download

        return _matching(Path(snapshot_download(source, allow_patterns=list(LICENCE_PATTERNS))))
    except Exception as error:  # the hub raises many kinds; a licence file is no reason to fail an export
        logger.warning("the licence files of %s could not be fetched: %s", source, error)
        return []


def _beside(path: Path) -> list[Path]:
    """Returns the licence files beside a file, if all that is there is of models."""
    found = _matching(path.parent)
    foreign = sorted(other.name for other in path.parent.iterdir() if not _is_of_models(other))
    if found and foreign:
        logger.warning(
            "%s holds %s, which may not be of %s, as there is %s too; copy what is the model's into the checkpoint",
            path.parent,
            ", ".join(file.name for file in found),
            path.name,
            foreign[0],
        )
        return []
    return found


def _is_of_models(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith(".") or (path.is_file() and any(fnmatch(name, pattern.lower()) for pattern in OF_MODELS))


def _of_package(path: Path) -> list[Path]:
    """Returns the licence files of the installed package that lists a file among its own."""
    for root in path.parents[1 : 1 + _LEVELS]:
        for info in sorted(root.glob("*.dist-info")):
            recorded = _recorded(info / "RECORD")
            if path.relative_to(root).as_posix() in recorded:
                beside = [file for file in _matching(path.parent) if file.relative_to(root).as_posix() in recorded]
                return [*_matching(info), *_matching(info / "licenses"), *beside]
    return []


def _recorded(record: Path) -> set[str]:
    """Returns the names of the files of an installed package; none where it does not say."""
    try:
        with record.open(encoding="utf-8", newline="") as file:
            return {row[0] for row in csv.reader(file) if row}
    except (OSError, UnicodeDecodeError, csv.Error):
        return set()


def _matching(folder: Path) -> list[Path]:
    found: Iterable[Path] = (file for pattern in LICENCE_PATTERNS for file in folder.glob(pattern))
    return sorted({file for file in found if file.is_file() and _is_beside(file)})


def _is_beside(file: Path) -> bool:
    """Whether a file lies in its folder, or where the cache of a hub keeps the files of it; a link may lead to anything."""
    real, folder = file.resolve(), file.parent.resolve()
    return is_within(real, folder) or (
        folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"
    )

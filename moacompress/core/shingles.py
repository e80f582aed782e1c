"""Shingles: runs of 13 words, by which an evaluation tells how much of its text calibration has seen.

Language-model evaluations call this decontamination. Texts are compared in a normal form (Unicode NFKC, case folded, no byte
order marks, white space folded), so that copies that differ by a space, a BOM or case are the same text.

A set of shingles is kept as a sample of bounded size: a shingle's 64-bit hash is kept if it is a multiple of `modulus`, the
smallest power of two with which at most `MOST_HASHES` are left. Whether a shingle is in the sample depends on its text alone,
so the share of another text's sampled shingles that are in it is an unbiased estimate of the share of all of them, and the
sample of several texts together is that of their samples.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.files import write_bytes

Hashes = npt.NDArray[np.uint64]
SHINGLE_WORDS = 13
MOST_HASHES = 1 << 17
"""A megabyte of them."""
OVERLAP_LIMIT = 0.01
"""Text of which more than this share was seen in calibration is refused."""
FORMAT, VERSION = "moacompress-shingles", "1"
_HEADER = 4096
"""Bytes that a file may have beside its hashes."""
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Scripts without spaces (Thai, Lao, Burmese, Khmer, kana, Han), of which a character counts as a word."""
WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """Returns the form in which texts are compared."""
    folded = unicodedata.normalize("NFKC", text.replace("\ufeff", "")).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


@lru_cache(1 << 18)
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def text_hash(text: str) -> int:
    """Returns a 64-bit hash of a text's normal form."""
    return _hash.__wrapped__(normalised(text))


def shingle_hashes(text: str) -> Hashes:
    """Returns the 64-bit hash of every shingle of a text, in order; none of a text of fewer than 13 words."""
    words = np.array([_hash(word) for word in WORD.findall(normalised(text))], np.uint64)
    count = len(words) - SHINGLE_WORDS + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    mixed = np.zeros(count, np.uint64)
    for place in range(SHINGLE_WORDS):
        mixed = mixed * _FACTOR + words[place : place + count]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64, for even low bits
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class Shingles:
    """A sample of the shingles of some texts.

    Attributes:
        hashes: uint64, ascending, each once; multiples of `modulus`.
        modulus: a power of two; one in so many shingles is kept.
    """

    hashes: Hashes
    modulus: int = 1

    @staticmethod
    def of(texts: Iterable[str]) -> Shingles:
        """Returns the sample of some texts."""
        return Shingles._sampled([shingle_hashes(text) for text in texts], 1)

    @staticmethod
    def union(parts: Sequence[Shingles]) -> Shingles:
        """Returns the sample of the texts of several together, which is the same in whatever parts they are given."""
        return Shingles._sampled([part.hashes for part in parts], max((part.modulus for part in parts), default=1))

    @staticmethod
    def _sampled(parts: Sequence[Hashes], modulus: int) -> Shingles:
        hashes = _kept(np.unique(np.concatenate([np.zeros(0, np.uint64), *parts])), modulus)
        while len(hashes) > MOST_HASHES:
            modulus *= 2
            hashes = _kept(hashes, modulus)
        return Shingles(hashes, modulus)

    def share(self, texts: Iterable[str]) -> float | None:
        """Returns the share of the different shingles of some texts that are among these; None where none is in the sample."""
        theirs = [_kept(shingle_hashes(text), self.modulus) for text in texts]
        sampled = np.unique(np.concatenate([np.zeros(0, np.uint64), *theirs]))
        return float(np.isin(sampled, self.hashes, assume_unique=True).mean()) if len(sampled) else None

    def save(self, path: Path) -> None:
        """Writes them in the form of safetensors, atomically.

        Raises:
            ArtefactError: the file cannot be written.
        """
        # one key of metadata: of several the order is not the same each time, nor then are the bytes
        write_bytes(path, save({"hashes": self.hashes}, metadata={FORMAT: f"{VERSION} {self.modulus}"}))

    @staticmethod
    def load(path: Path) -> Shingles:
        """Reads what `save` wrote.

        Raises:
            ArtefactError: unreadable, too large, or not such a file.
        """
        try:
            if path.stat().st_size > 8 * MOST_HASHES + _HEADER:
                raise ValueError(f"it has {path.stat().st_size:,} bytes")
            with safe_open(str(path), framework="numpy") as file:
                version, modulus = ((file.metadata() or {}).get(FORMAT, "none 0")).split(" ")
                hashes = file.get_tensor("hashes")
            found = Shingles(hashes, int(modulus))
            if version != VERSION or not found._is_sound():
                raise ValueError("it is not as a profile writes it")
        except (OSError, SafetensorError, TypeError, ValueError, OverflowError) as error:
            raise ArtefactError(
                f"cannot read the shingles of calibration in {path}: {error}; make it again, or remove it: the overlap with "
                "calibration is then unknown"
            ) from error
        return found

    def _is_sound(self) -> bool:
        hashes, modulus = self.hashes, self.modulus
        return (
            hashes.dtype == np.uint64
            and hashes.ndim == 1
            and len(hashes) <= MOST_HASHES
            and 0 < modulus < 2**63
            and modulus & (modulus - 1) == 0
            and len(_kept(hashes, modulus)) == len(hashes)
            and bool((hashes[1:] > hashes[:-1]).all())
        )


def overlap(seen: Shingles | None, texts: Iterable[str]) -> float | None:
    """Returns the share of some texts' shingles that calibration has seen; None where that is not known."""
    return None if seen is None else seen.share(texts)


def refuse_overlap(share: float | None, what: str, by: str = "calibration") -> None:
    """Refuses text to measure on of which too large a share has been seen, None where that is not known.

    Raises:
        DataError: more than `OVERLAP_LIMIT`.
    """
    if share is not None and share > OVERLAP_LIMIT:
        raise DataError(
            f"{share:.1%} of the runs of {SHINGLE_WORDS} words in {what} were seen in {by}, more than "
            f"{OVERLAP_LIMIT:.0%}; give text that {by} has not seen, or pass --allow-overlap, which marks the results"
        )


def _kept(hashes: Hashes, modulus: int) -> Hashes:
    kept: Hashes = hashes[hashes % np.uint64(modulus) == 0]
    return kept

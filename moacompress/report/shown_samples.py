"""Samples for people: the head and the tail of the prompt, with the tokens that count marked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from moacompress.calibration.data.samples import Sample
from moacompress.core.printable import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD, TAIL = 60, 120
"""Tokens shown of the beginning and of the end of a sample."""
BEFORE = {"answer": 60, "text": 6}
"""Tokens shown before a token that counts, by kind of sample."""
LEAST = 30
"""Fewer tokens than these are not left out."""
OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class Piece:
    """Some tokens in a row: their text and whether they count, or None and how many are left out."""

    text: str | None
    counts: bool
    tokens: int


def pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Returns a sample as pieces of text; a run of tokens far from its ends and from all that count is left out."""
    shown = _shown(sample)
    found: list[Piece] = []
    for show, run in groupby(range(len(shown)), key=lambda index: bool(shown[index])):
        members = list(run)
        begin, end = members[0], members[-1] + 1
        if show:
            found += _texts(sample.input_ids[begin:end].tolist(), sample.answer_mask[begin:end].tolist(), tokenizer)
        else:
            found.append(Piece(None, False, end - begin))
    return found


def _shown(sample: Sample) -> npt.NDArray[np.bool_]:
    """Returns which tokens are shown, bool `[n]`."""
    n = len(sample.input_ids)
    shown = sample.answer_mask.copy()
    shown[:HEAD] = shown[max(n - TAIL, 0) :] = True
    for target in np.flatnonzero(sample.answer_mask).tolist():
        shown[max(target - BEFORE[sample.kind], 0) : target] = True
    for show, run in groupby(range(n), key=lambda index: bool(shown[index])):
        members = list(run)
        if not show and len(members) < LEAST:
            shown[members] = True
    return shown


def _texts(ids: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Yields tokens in a row, cut where they begin or cease to count.

    A piece is what its tokens add to the text of those before it: decoded alone, they might lose a space.
    """
    end, before = 0, ""
    for counts, run in groupby(mask):
        size = len(list(run))
        end += size
        whole = str(tokenizer.decode(ids[:end]))
        yield Piece(whole[len(before) :], counts, size)
        before = whole


@dataclass(frozen=True)
class ShownSample:
    """A sample on the console: tokens that count are bold on a terminal with colours, and in brackets elsewhere."""

    sample: Sample
    tokenizer: PreTrainedTokenizerBase
    number: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields a title and the text."""
        sample = self.sample
        counted = int(sample.answer_mask.sum())
        what = f"{counted} of them answer" if sample.kind == "answer" else f"plain text, {counted} of them count"
        yield Text(
            f"{self.number}  {sample.source}  length {sample.length:,}: {len(sample.input_ids):,} tokens, {what}",
            style="bold",
        )
        coloured = console.is_terminal and console.color_system is not None and not console.no_color
        body = Text()
        for piece in pieces(sample, self.tokenizer):
            if piece.text is None:
                body.append(f"\n… {piece.tokens:,} tokens left out …\n", style="dim italic")
            elif piece.counts and coloured:
                body.append(printable(piece.text), style="bold black on green")
            else:
                text = printable(piece.text)
                body.append(f"{OPEN}{text}{CLOSE}" if piece.counts else text)
        yield body
        yield Text()


def as_json(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns all of a sample as JSON values: ids, mask, and their texts."""
    return {
        "source": sample.source,
        "kind": sample.kind,
        "length": sample.length,
        "tokens": len(sample.input_ids),
        "answer_tokens": int(sample.answer_mask.sum()),
        "ids": sample.input_ids.tolist(),
        "mask": sample.answer_mask.tolist(),
        "text": str(tokenizer.decode(sample.input_ids)),
        "answer": str(tokenizer.decode(sample.input_ids[sample.answer_mask])),
    }

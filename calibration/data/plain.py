"""Plain text: stretches of documents of an exact number of tokens, with random later positions as targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moacompress.calibration.data.answers import SampleDraft
from moacompress.core.errors import DataError
from moacompress.prompts.templates import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS = 32
"""Target positions of a sample."""


def chop(
    documents: Sequence[str],
    wanted: dict[int, int],
    name: str,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
) -> list[SampleDraft]:
    """Returns stretches of exactly the lengths wanted, begun at random, from as many documents as there are.

    `wanted` is how many of each length in tokens, `name` that of the source. Targets are in the second half of a stretch.

    Raises:
        DataError: no document is as long as a length.
    """
    start_ids = [token for token in encode_text(tokenizer, "") if token == tokenizer.bos_token_id]
    drafts = []
    for length, count in wanted.items():
        if not count:
            continue
        body = length - len(start_ids)
        long: list[list[int]] = []
        longest = 0
        for index in rng.permutation(len(documents)).tolist():
            ids = encode_text(tokenizer, documents[index], special=False)
            longest = max(longest, len(ids))
            if len(ids) >= body:
                long.append(ids)
            if len(long) == count:
                break
        if not long:
            raise DataError(
                f"the longest of {len(documents)} texts of {name} has {longest:,} tokens; stretches of {length:,} were "
                "asked for: give longer texts or shorter lengths"
            )
        later = np.arange(length // 2, length)
        for index in range(count):
            ids = long[index % len(long)]
            begin = int(rng.integers(len(ids) - body + 1))
            mask = np.zeros(length, dtype=np.bool_)
            mask[rng.choice(later, size=min(TARGETS, len(later)), replace=False)] = True
            drafts.append(SampleDraft([*start_ids, *ids[begin : begin + body]], mask.tolist(), 0, name, length, "text"))
    return drafts

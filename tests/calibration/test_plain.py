"""Plain text: where its stretches begin, and which documents they come from."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from moacompress.calibration.data.plain import chop


def test_plain_text_begins_as_the_tokenizer_begins_any(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer: Any = copy.deepcopy(tiny_tokenizer)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    ids = [(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    assert begin != end
    text = " ".join(f"w{i:04d}" for i in range(300))
    for template, first in (
        (f"{begin} $A", [tokenizer.bos_token_id]),
        (f"{begin} $A {end}", [tokenizer.bos_token_id]),
        ("$A", []),
    ):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
        (draft,) = chop([text], {256: 1}, "text", np.random.default_rng(0), tokenizer)
        assert len(draft.ids) == 256
        assert draft.ids[: len(first)] == first
        assert not {*draft.ids[len(first) :]} & {*tokenizer.all_special_ids}

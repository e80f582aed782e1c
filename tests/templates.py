"""Tokenizers as base models have them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def without_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a copy without a chat template."""
    base: Any = copy.deepcopy(tokenizer)
    base.chat_template = None
    return base

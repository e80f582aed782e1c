"""What a compressed model takes for a mask: padding, row by row; anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moacompress.core.errors import UnsupportedError
from moacompress.runtime.compat.mask_functions import CAUSAL_MASK, image_blocks, is_stock_mask
from moacompress.runtime.compat.private_names import resolve

_CAUSAL = resolve(CAUSAL_MASK)


def plan_mask(
    *,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    q_length: int | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Takes transformers' request for a mask; the plan is the mask, so all but the stock ones are refused.

    Returns:
        Which tokens of the forward are real, bool `[batch, tokens]`, or None where all are.

    Raises:
        UnsupportedError: packed sequences, bidirectional or overlaid masks.
    """
    blocks = None if torch.compiler.is_compiling() else image_blocks(mask_function)
    if blocks is not None and any(bool((ids >= 0).any()) for ids in blocks):
        raise UnsupportedError(
            "in this model the tokens of an image see each other in both directions, which a plan, made for causal attention, "
            "cannot give; only text can be read under a plan, and moacompress.detach(model) gives the dense model back"
        )
    # what a mask is made of cannot be traced. All overlays ask for vmap, packed sequences show in the position ids that the
    # decoder's hook checks, and layers with other masks of their own are refused when the plan is put on the model
    stock = torch.compiler.is_compiling() or is_stock_mask(mask_function, local_size)
    if blocks is None and (use_vmap or not stock):
        raise UnsupportedError(
            "only the stock causal and sliding-window masks are supported; the model or the caller asks for another one "
            "(packed sequences, bidirectional attention as among the tokens of an image, or an overlay)"
        )
    if attention_mask is None or q_length is None:
        return None
    return attention_mask[:, attention_mask.shape[1] - q_length :].bool()

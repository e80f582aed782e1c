"""What a compressed model takes for a mask: padding, row by row; anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moacompress.core.errors import UnsupportedError
from moacompress.runtime.compat import private_names

_CAUSAL = private_names.resolve(private_names.CAUSAL_MASK)
_SLIDING = private_names.SLIDING_OVERLAY.rpartition(".")[2]
_BLOCKS = private_names.BLOCKS_OVERLAY.rpartition(".")[2]


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


def is_stock_mask(function: Callable[..., Any], local_size: int | None) -> bool:
    """Returns whether a mask function is transformers' causal one, or that with a sliding window of `local_size` tokens."""
    if function is _CAUSAL:
        return True
    # transformers composes a sliding mask as and_masks(window overlay, causal): a closure over just these two
    parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    functions = parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else ()
    name = getattr(functions[0], "__qualname__", "") if functions else ""
    return local_size is not None and len(functions) == 2 and name.startswith(_SLIDING) and functions[1] is _CAUSAL


def image_blocks(function: Callable[..., Any]) -> list[Any] | None:
    """Returns, of a mask in which the tokens of an image see each other both ways, the block of each token, -1 for text.

    None for any other mask: beside such blocks there are only the causal mask and a sliding window.
    """
    found = []
    for part in _mask_parts(function):
        name = getattr(part, "__qualname__", "")
        if name.startswith(_BLOCKS):
            found += [cell.cell_contents for cell in part.__closure__ or ()]
        elif part is not _CAUSAL and not name.startswith(_SLIDING):
            return None
    return found or None


def _mask_parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Returns the mask functions that one is composed of: transformers' compositions close over a tuple of them."""
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if len(held) == 1 and isinstance(held[0], tuple):
        return [part for composed in held[0] for part in _mask_parts(composed)]
    return [function]

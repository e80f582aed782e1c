"""The mask functions of transformers: which of them are stock ones, and which have the tokens of an image see each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from moacompress.runtime.compat.checks import find

CAUSAL_MASK = "transformers.masking_utils.causal_mask_function"
SLIDING_OVERLAY = "transformers.masking_utils.sliding_window_overlay"
BLOCKS_OVERLAY = "transformers.masking_utils.blockwise_overlay"


@functools.cache
def _causal_mask() -> Any:
    return find(CAUSAL_MASK)


def is_stock_mask(function: Callable[..., Any], local_size: int | None) -> bool:
    """Returns whether a mask function is transformers' causal one, or that with a sliding window of `local_size` tokens."""
    causal, overlay = _causal_mask(), SLIDING_OVERLAY.rpartition(".")[2]
    if function is causal:
        return True
    # transformers composes a sliding mask as and_masks(window overlay, causal): a closure over just these two
    parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    functions = parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else ()
    name = getattr(functions[0], "__qualname__", "") if functions else ""
    return local_size is not None and len(functions) == 2 and name.startswith(overlay) and functions[1] is causal


def image_blocks(function: Callable[..., Any]) -> list[Any] | None:
    """Returns, of a mask in which the tokens of an image see each other both ways, the block of each token, -1 for text.

    None for any other mask: beside such blocks there are only the causal mask and a sliding window.
    """
    causal, overlay = _causal_mask(), SLIDING_OVERLAY.rpartition(".")[2]
    found = []
    for part in _mask_parts(function):
        name = getattr(part, "__qualname__", "")
        if name.startswith(BLOCKS_OVERLAY.rpartition(".")[2]):
            found += [cell.cell_contents for cell in part.__closure__ or ()]
        elif part is not causal and not name.startswith(overlay):
            return None
    return found or None


def _mask_parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Returns the mask functions that one is composed of: transformers' compositions close over a tuple of them."""
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if len(held) == 1 and isinstance(held[0], tuple):
        return [part for composed in held[0] for part in _mask_parts(composed)]
    return [function]


def is_named_in_masks(holder: Any, attribute: str) -> str | None:
    """The function that it makes carries its name, by which a composed mask is told."""
    made = getattr(holder, attribute)(4).__qualname__
    return None if made.startswith(attribute) else f"makes a function that is called {made}"


def is_told_from_others(holder: Any, attribute: str) -> str | None:
    """The sliding mask that it makes is told from the causal one, from other windows and from other masks."""
    made = getattr(holder, attribute)(4)
    told = is_stock_mask(made, 4) and not is_stock_mask(made, None) and not is_stock_mask(lambda *at: True, 4)
    return None if told else "is not told from other masks"


def holds_blocks(holder: Any, attribute: str) -> str | None:
    """The blocks of an image are found in a mask that it is part of."""
    import torch

    ids = torch.tensor([[-1, 0]])
    mask = find("transformers.masking_utils.or_masks")(_causal_mask(), getattr(holder, attribute)(ids))
    found = image_blocks(mask)
    return None if found is not None and len(found) == 1 and found[0] is ids else "does not hold its blocks"

"""Keys less the centre of their KV head: what is attended to and cached where a plan has centres."""

from __future__ import annotations

import torch


def centred(key: torch.Tensor, centre: torch.Tensor | None) -> torch.Tensor:
    """Returns keys less their centre, rounded to their own dtype; a softmax over all keys of a query sees no difference.

    Args:
        key: after its rotary embedding, `[rows, kv_heads, tokens, head_dim]`.
        centre: a constant to gradients, float32 `[kv_heads, head_dim]` on the key's device; None for none.
    """
    if centre is None:
        return key
    wide = torch.promote_types(key.dtype, torch.float32)
    return (key.to(wide) - centre[:, None]).to(key.dtype)

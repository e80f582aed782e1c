"""Keys less the centre of their KV head: what is attended to and cached where a plan has centres."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moacompress.kernels.arguments import Scores


def centred(key: torch.Tensor, centre: torch.Tensor | None) -> torch.Tensor:
    """Returns keys less their centre, rounded to their own dtype; a softmax over all keys of a query sees no difference.

    Keys are after their rotary embedding, `[rows, kv_heads, tokens, head_dim]`; the centre, a constant to gradients, is float32
    `[kv_heads, head_dim]` on their device, or None.
    """
    if centre is None:
        return key
    wide = torch.promote_types(key.dtype, torch.float32)
    return (key.to(wide) - centre[:, None]).to(key.dtype)


def logits_beside(sink_logits: torch.Tensor, query: torch.Tensor, centre: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns learned logits that mean the same beside keys less their centre: less what all scores of a query lack.

    Those of query heads, `[heads]`, become those of queries, `[rows, heads, tokens]`, in float32 at least.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    by_head = query.to(wide).unflatten(1, (len(centre), -1))
    lacked = torch.einsum("rhgtd,hd->rhgt", by_head, centre.to(wide)).flatten(1, 2)
    return sink_logits.to(wide)[:, None] - scaling * lacked


Attended = tuple[torch.Tensor, torch.Tensor | None]
"""What a backend's call returns: `[..., value_dim]` of queries, and the logs of their softmax's denominators, `[...]`."""


def beside_logits(call: Callable[[Scores, bool], Attended], scores: Scores, with_lse: bool) -> Attended:
    """Returns what a backend attends to, with logits of each query too, which no backend knows.

    `call` is a backend's call with scores, and whether logs of denominators are wanted; logits of each query have its shape.
    """
    if not scores.by_query:
        return call(scores, with_lse)
    out, lse = call(scores._replace(sink_logits=None), True)
    assert lse is not None
    logits = scores.sink_logits.to(lse.dtype)  # type: ignore[union-attr]
    seen = torch.sigmoid(lse - logits)[..., None]
    return (out * seen).to(out.dtype), torch.logaddexp(lse, logits)

"""Keys and values beyond what codes hold, whose scales and zero points are float16: they are clipped, and it is said once."""

from __future__ import annotations

import logging

import torch

from moacompress.kernels.derivatives import is_transformed
from moacompress.kernels.reference.codes import LARGEST, is_clipped
from moacompress.rules.formats import Integer, find_code
from moacompress.runtime.decode.context import LayerContext

logger = logging.getLogger(__name__)
_said: set[str] = set()
"""Where it was said that numbers are clipped; a process says it once."""


def warn_of_clipped(context: LayerContext, key: torch.Tensor, value: torch.Tensor) -> None:
    """Warns where a prompt's keys or values are clipped.

    A single token is not looked at, nor anything on a GPU, where the host would wait for the answer.

    Args:
        context: of the layer.
        key: `[batch, kv_heads, tokens, head_dim]`.
        value: `[batch, kv_heads, tokens, value_dim]`.
    """
    if _said or context.formats is None or key.shape[2] < 2 or not key.numel():
        return
    if key.device.type != "cpu" or type(key) is not torch.Tensor or is_transformed():
        return
    for what, codes, vectors in zip(("keys", "values"), context.formats, (key, value), strict=True):
        low, high = vectors.detach().aminmax()
        if not max(-float(low), float(high)) * vectors.shape[-1] ** 0.5 > LARGEST:  # no rotation makes one beyond it
            continue
        for head, kind in enumerate(map(find_code, codes)):
            if isinstance(kind, Integer) and is_clipped(vectors[:, head].detach(), kind.bits):
                _said.add(what)
                logger.warning(
                    "%s of layer %d, KV head %d, are beyond what the scales of %s hold, float16 up to %.0f, and are clipped; "
                    "a plan without codes has them as they are (search with --formats native)",
                    what,
                    context.layer,
                    head,
                    kind.name,
                    LARGEST,
                )
                return

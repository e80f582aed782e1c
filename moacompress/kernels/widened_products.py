"""Products of 16-bit numbers in float32, for processors that have no instructions for them.

torch hands products in bfloat16 and float16 to oneDNN where oneDNN takes them, which on x86-64 needs AVX-512. Elsewhere it has
loops of its own, which take four to seven times as long from 128 rows on as to make float32 of both factors and multiply these
(an EPYC without AVX-512). A part of a weight is made float32 at a time, and
forgotten again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from moacompress.core.arrays import row_parts

NUMBERS_AT_ONCE = 1 << 20
"""Of a factor that are float32 at a time: 4 MiB."""

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def _not_onednns() -> frozenset[torch.dtype]:
    """Returns the 16-bit dtypes that this torch does not have oneDNN multiply on this processor."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    asked = {dtype: getattr(torch.ops.mkldnn, name, None) for dtype, name in known.items()}
    return frozenset(dtype for dtype, supported in asked.items() if supported is not None and not supported())


WIDENED = _not_onednns()
"""Dtypes whose products of many rows are made in float32 on this processor."""


def is_widened(x: torch.Tensor) -> bool:
    """Returns whether products with many rows of `x` are quicker in float32."""
    return x.dtype in WIDENED and x.device.type == "cpu"


def widened_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, product: Product = linear
) -> torch.Tensor:
    """Returns `x @ weight.T + bias`, `[..., outputs]`, in the dtype of `x`; summed in float32 by `product`, and rounded once.

    The weight, `[outputs, inputs]`, may be strided in any way.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(weight))
    for some in row_parts(len(rows), rows.shape[1], NUMBERS_AT_ONCE):
        wide = rows[some].float()
        for outputs in row_parts(len(weight), weight.shape[1], NUMBERS_AT_ONCE):
            added = None if bias is None else bias[outputs].float()
            out[some, outputs] = product(wide, weight[outputs].float(), added)
    return out.view(*x.shape[:-1], len(weight))

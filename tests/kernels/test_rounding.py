"""What queries attend to is what the codes stand for, head by head, and its gradient passes straight through."""

from __future__ import annotations

import pytest
import torch

from moacompress.kernels.reference.codes import decode, encode, rotated
from moacompress.kernels.reference.rounding import BITS, round_to, rounded
from moacompress.rules.formats import FORMATS

NATIVE, INT8, INT4 = (FORMATS[name].code for name in ("native", "int8", "int4"))


def test_only_formats_with_codes_round() -> None:
    assert BITS == {INT8: 8, INT4: 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_head_has_its_own_format(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = rounded(x, [INT4, NATIVE, INT8, INT4])
    assert found.dtype == torch.float32
    for head, bits in enumerate((4, None, 8, 4)):
        alone = x[:, head].float() if bits is None else rotated(decode(encode(x[:, head], bits)))
        torch.testing.assert_close(found[:, head], alone, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_straight_through(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    pulled = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    (grad,) = torch.autograd.grad(rounded(x, [INT8, NATIVE, INT4]), x, pulled.float())
    torch.testing.assert_close(grad, pulled, rtol=0, atol=0)


def test_native_heads_keep_their_infinities_and_others_turn_to_nan() -> None:
    x = torch.ones(1, 2, 3, 4)
    x[0, :, 1, 2] = torch.inf
    found = rounded(x, [NATIVE, INT8])
    torch.testing.assert_close(found[:, 0], x[:, 0], rtol=0, atol=0)
    assert found[0, 1].isnan().any(-1).tolist() == [False, True, False]


def test_as_many_formats_as_heads() -> None:
    with pytest.raises(ValueError, match="2 formats for 3 KV heads"):
        rounded(torch.ones(1, 3, 1, 4), [INT8, INT4])


def test_rounding_again_changes_little() -> None:
    x = torch.randn(1, 1, 50, 64, generator=torch.Generator().manual_seed(4))
    once = round_to(x, 4)
    assert (round_to(once, 4) - once).abs().max() < 0.1 * (once - x).abs().max()

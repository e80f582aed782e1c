"""Dense passes of a profile by PyTorch's attention, and those with collectors by tiles of its products, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moacompress.calibration.profile.collectors import InfluenceSums
from moacompress.calibration.profile.influence import attend
from moacompress.calibration.profile.tiles import AttentionSpec
from moacompress.kernels import sdpa
from moacompress.kernels.arguments import Scores
from tests.kernels.test_profile_kernel import SUMS, Sizes, build, close, with_gates
from tests.runtime.test_linear import Operators


@pytest.mark.parametrize("native", [None, 9], ids=["", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_passes_are_pytorchs(
    dtype: torch.dtype, native: int | None, monkeypatch: pytest.MonkeyPatch, use_backend: Callable[[str], Any]
) -> None:
    """Forward and backward; one mask for a sliding window, and groups of heads where FlashAttention takes them."""
    use_backend("reference")
    case = build(1, dtype, kv_heads=2, group=3, dim=16, n=40, native=native, softcap=None, logits=False)
    chunk, wanted = (case.query, case.key, case.value), case.exact().backward([])
    out = attend(case.query.double(), case.key.double(), case.value.double(), case.spec)
    monkeypatch.setattr(sdpa, "DEVICES", ("cpu",))
    given, own = list[Any](), torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        return own(*args, **kwargs)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", noted)
    with Operators() as called:
        found = attend(*chunk, case.spec)
        gradients = case.backward([])
    error = 2e-5 if dtype == torch.float32 else 4e-2
    assert (found - out).abs().max() < error
    for mine, other in zip(gradients, wanted, strict=True):
        assert mine.dtype == dtype
        close(mine, other, error)
    groups = native is None and dtype == torch.bfloat16
    for args, kwargs in given:
        assert kwargs["is_causal"] == (native is None)
        assert kwargs["enable_gqa"] == groups
        assert args[1].shape[1] == (2 if groups else 6)
        assert (args[3] is None) == (native is None)
    assert len(given) == 2
    fused = [name for name in called.names if "flash_attention" in name]
    assert any(name.endswith("backward") for name in fused)
    assert "aten::_softmax" not in called.names


@pytest.mark.parametrize(
    ("spec", "logits"), [(AttentionSpec(0.25, softcap=30.0), None), (AttentionSpec(0.25), torch.zeros(2))]
)
def test_what_pytorchs_attention_cannot(spec: AttentionSpec, logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "DEVICES", ("cpu",))
    assert sdpa.suits(torch.zeros(1, 2, 3, 4), Scores(0.25))
    assert not sdpa.suits(torch.zeros(1, 2, 3, 4), spec.scores(logits))
    assert not sdpa.suits(torch.zeros(1, 2, 3, 4).double(), Scores(0.25))


@pytest.mark.parametrize("bounded", [False, True], ids=["", "bounds and logits"])
def test_passes_with_collectors(
    bounded: bool, triton: Any, use_backend: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward by PyTorch's attention or a kernel; gradients are made from the tiles that collectors are given."""
    sizes: dict[str, Any] = {"n": 90, "dim": 16, "native": None, "silent": False}
    sizes |= {"softcap": 30.0 if bounded else None, "logits": bounded}
    case = with_gates(build(4, torch.float32, **sizes), 4)
    monkeypatch.setattr(sdpa, "DEVICES", ("cpu",))
    monkeypatch.setattr(sdpa, "dense_gradients", None)
    found, exact = InfluenceSums(*case.sizes), case.exact()
    out = attend(case.query, case.key, case.value, case.spec, case.sink_logit)
    gradients = case.backward([found])
    use_backend("reference")
    wanted, totals = InfluenceSums(*case.sizes), Sizes()
    close(out, attend(exact.query, exact.key, exact.value, exact.spec, exact.sink_logit), 2e-5)
    for mine, other in zip(gradients, exact.backward([wanted, totals]), strict=True):
        close(mine, other, 2e-5)
    close(found.squares, wanted.squares, 2 * SUMS)
    close(found.total, wanted.total, SUMS, torch.as_tensor(totals.total, dtype=torch.float64).max())
    assert case.choices is not None
    assert wanted.squares[:, case.choices.of_rule >= 0].any()

"""The plan on record gives the CPU's logits where the kernels in Triton run, by its interpreter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moacompress.kernels.triton.triton_backend import TritonBackend
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

HERE = Path(__file__).resolve().parent
STEPS = 4


@pytest.fixture
def by_both(
    load_script: Callable[[Path], Any], use_backend: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Returns a function that gives the logits by the CPU's kernels and by Triton's, `[2, steps + 1, vocabulary]`."""
    record = load_script(HERE / "record.py")
    calls: list[str] = []

    def noted(name: str) -> Any:
        own = getattr(TritonBackend, name)

        def call(*given: Any, **named: Any) -> Any:
            calls.append(name)
            return own(*given, **named)

        return call

    def run(model: Any, plan: Plan, ids: torch.Tensor, steps: int) -> torch.Tensor:
        found = [torch.stack(record.logits_under(model, plan, ids, steps))]
        use_backend("triton")
        for name in ("prefill", "append", "bind_ring"):
            monkeypatch.setattr(TritonBackend, name, noted(name))
        found.append(torch.stack(record.logits_under(model, plan, ids, steps)))
        assert {"prefill", "append", "bind_ring"} == set(calls)
        return torch.stack(found)

    return run


def rms(error: torch.Tensor) -> float:
    """Returns the root of the mean square."""
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.heavy)], ids=str)
def test_the_golden_plan(dtype: torch.dtype, load_script: Callable[[Path], Any], by_both: Callable[..., Any]) -> None:
    """Rounding to the dtype does to the logits what it does on the CPU: sums in another order differ by less than twice."""
    record, golden = load_script(HERE / "record.py"), json.loads((HERE / "plan.json").read_text("utf-8"))
    source = record.tiny_source()
    model = source.model.to(dtype)
    rows = [zip(*(layer[name] for name in ("sink", "alpha", "beta_q")), strict=True) for layer in golden["layers"]]
    plan = Plan(source.shape, golden["min_window"], tuple(tuple(Rule(*rule) for rule in row) for row in rows))
    ids = torch.randint(4, 160, (1, 120 + STEPS), generator=torch.Generator().manual_seed(0))
    wide = copy.deepcopy(model).double()
    exact, other = (torch.stack(record.logits_under(wide, of, ids, STEPS)) for of in (plan, Plan.full(plan.model)))
    on_cpu, on_triton = by_both(model, plan, ids, STEPS)
    rounding = rms(on_triton - exact)
    assert rounding < 2 * rms(on_cpu - exact)
    assert rounding < 0.5 * rms(other - exact)


@pytest.mark.heavy
@pytest.mark.real
@pytest.mark.parametrize("gates", [False, True], ids=["spans", "selecting"])
def test_a_published_plan(
    gates: bool, smollm2: Path, load_script: Callable[[Path], Any], by_both: Callable[..., Any]
) -> None:
    """Its spans give the same logits; its gates too, but that a last bit now and then selects another token.

    Formats are left out: a last bit flips codes, on the CPU's kernels beside plain PyTorch as well, which moves logits by 1.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    plan = Plan.load(load_script(HERE / "record.py").ROOT / "docs/plans/smollm2-135m-eighth-gates.json")
    rules = tuple(
        tuple(replace(rule, key_format="native", value_format="native") for rule in row) for row in plan.rules
    )
    if not gates:
        rules = tuple(tuple(replace(rule, select_alpha=0, select_beta_q=0) for rule in row) for row in rules)
    ids = torch.randint(100, 40_000, (1, 96 + STEPS), generator=torch.Generator().manual_seed(0))
    on_cpu, on_triton = by_both(model, replace(plan, rules=rules), ids, STEPS)
    assert (on_triton - on_cpu).abs().max() <= (2e-2 if gates else 1e-4) * on_cpu.abs().max()

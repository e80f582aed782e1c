"""Dense by two attentions: a prompt that only rounding decides counts for no side of a table with rivals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import moacompress.evaluation.measurement as measurement
from moacompress.evaluation.baselines.compared_models import DENSE, STOCK
from moacompress.evaluation.baselines.comparison import sides
from moacompress.evaluation.runner import evaluate
from moacompress.evaluation.scoring.prompts import read_on
from moacompress.evaluation.tasks.cases import Case
from moacompress.models.source import model_shape
from moacompress.report.evaluation_tables import ANSWERED, ANSWERED_TWICE
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach
from moacompress.runtime.compat.alternates import cache_argument
from tests.evaluation.conftest import tables_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = 4


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention rounds to 16 bits, as some processors do; our kernels do not."""
    own = functional.scaled_dot_product_attention

    def attention(*given: Any, **more: Any) -> torch.Tensor:
        out = own(*given, **more)
        return out.bfloat16().to(out.dtype)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)


@pytest.fixture
def tied(
    rounded: None,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A checkpoint of a model that answers each prompt by one token or ends at once; at the first the two are nearly tied.

    The token is 0.01 above the end at the first prompt under our kernels and 0.01 below it under transformers' attention, and 1
    above it at the other prompts under both.
    """
    drawn = np.random.default_rng(0).integers(4, 100, (PROMPTS, 300)).tolist()
    answer = tiny_tokenizer("Q", add_special_tokens=False)["input_ids"]
    cases = [Case("t", 320, ids, answer, [True], ("Q",), "all", 2, None, 250) for ids in drawn]
    monkeypatch.setattr(measurement, "make_cases", lambda task, length, prompts, *rest: cases[:prompts])
    model: Any = tiny_model("llama")
    plan = Plan.full(model_shape(model))
    states = []
    for put_on in (partial(attach, plan=plan), detach):
        run: Any = put_on(model)
        with torch.inference_mode():
            last, cache = read_on(run, cases, None)
            states.append(run.model(last, use_cache=True, **cache_argument(cache)).last_hidden_state[:, -1])
    wanted = torch.ones(2, PROMPTS)
    wanted[:, 0] = torch.tensor([0.01, -0.01])
    logits = torch.stack([wanted.flatten(), torch.full((2 * PROMPTS,), -1.0)], 1)
    rows = torch.linalg.lstsq(torch.cat(states).double(), logits.double()).solution
    with torch.no_grad():
        model.lm_head.weight[:] = rows[:, 1].float()
        model.lm_head.weight[answer[0]] = rows[:, 0].float()
        model.lm_head.weight[tiny_tokenizer.eos_token_id] = 0
    plan = Plan.full(model_shape(model))
    attach(model, plan).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    plan.save(tmp_path / "model" / "plan.json")
    return tmp_path


def measured(folder: Path, *against: str) -> dict[str, Any]:
    return evaluate(folder, against=against, tasks=("needle-noise", "key-value"), lengths=(320,), prompts=PROMPTS)


def test_a_prompt_that_rounding_decides_is_left_out_for_all_sides(tied: Path) -> None:
    report = measured(tied, DENSE, "snapkv:seen")
    exact = {row["model"]: row["value"] for row in report["results"] if row["metric"] == "exact_match"}
    assert (exact["plan"], exact[DENSE], exact[STOCK]) == (1.0, 1.0, 1 - 1 / PROMPTS)
    kept = [row for row in report["results"] if row["metric"] == "retention"]
    assert [row["model"] for row in kept[:4]] == ["plan", DENSE, STOCK, "snapkv:seen"]
    for row in kept:
        assert row["prompts"] == PROMPTS - 1
        assert row["prompts_dense"] == {DENSE: PROMPTS, STOCK: PROMPTS - 1}
    assert {row["value"] for row in kept} == {1.0}  # the eviction, full span here, loses none that rounding would take
    for row in report["pooled"]["results"]:
        if row["metric"] == "retention":
            assert (row["prompts"], row["value"]) == (2 * (PROMPTS - 1), 1.0)
            assert row["prompts_dense"] == {DENSE: 2 * PROMPTS, STOCK: 2 * (PROMPTS - 1)}
    for row in report["pooled"]["differences"]:
        if row["metric"] == "retention":
            assert (row["prompts"], row["value"]) == (2 * (PROMPTS - 1), 0.0)
    assert tables_of(report).count(ANSWERED_TWICE) == 1


def test_one_attention_where_all_sides_run_our_kernels(tied: Path) -> None:
    report = measured(tied, DENSE)
    kept = [row for row in report["results"] if row["metric"] == "retention"]
    assert [row["prompts"] for row in kept] == [PROMPTS] * 4
    assert STOCK not in {row["model"] for row in report["results"]}
    assert ANSWERED in tables_of(report)
    assert ANSWERED_TWICE not in tables_of(report)


def test_which_sides_bring_the_other_attention() -> None:
    assert sides((DENSE, "uniform", "path/to/other")) == (DENSE, "uniform", "path/to/other")
    assert sides(("uniform", DENSE, "quantized:hqq-8")) == ("uniform", DENSE, STOCK, "quantized:hqq-8")
    assert sides(("h2o", DENSE)) == ("h2o", DENSE, STOCK)
    assert sides((DENSE, "h2o", STOCK)) == (DENSE, "h2o", STOCK)
    assert sides(("h2o",)) == ("h2o",)

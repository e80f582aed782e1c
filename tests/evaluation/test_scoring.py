"""Scores of one prompt, against straightforward ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from moacompress.calibration.answers import generate_greedy
from moacompress.evaluation.scoring import score_case
from moacompress.evaluation.tasks import Case, make_cases, mean_tokens
from moacompress.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Build = Callable[..., "PreTrainedModel"]


@pytest.fixture(params=["dense", "plan"])
def model(request: pytest.FixtureRequest, tiny_model: Build, random_plan: Callable[..., Plan]) -> PreTrainedModel:
    from moacompress.models import model_shape
    from moacompress.runtime import attach

    built = tiny_model("llama")
    return built if request.param == "dense" else attach(built, random_plan(model_shape(built)))


@pytest.fixture
def case(tiny_tokenizer: PreTrainedTokenizerBase) -> Case:
    return make_cases("needle-noise", 700, 1, 0, tiny_tokenizer, None)[0]


def test_nll_is_that_of_one_uncached_forward(
    model: PreTrainedModel, case: Case, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    import torch

    ids = torch.tensor([[*case.prompt_ids, *case.answer_ids]])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    begin = len(case.prompt_ids)
    losses = [-float(logits[begin + i - 1, token]) for i, token in enumerate(case.answer_ids)]
    values = [loss for loss, counts in zip(losses, case.is_value, strict=True) if counts]
    assert len(values) == 7
    assert score_case(model, tiny_tokenizer, case).nll == pytest.approx(sum(values) / 7, abs=1e-4)


def test_hit_is_the_reference_in_the_greedy_answer(
    model: PreTrainedModel, case: Case, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert not score_case(model, tiny_tokenizer, case).hit
    (said,) = generate_greedy(model, [case.prompt_ids], len(case.answer_ids))
    spoken = str(tiny_tokenizer.decode(said, skip_special_tokens=True))
    assert score_case(model, tiny_tokenizer, replace(case, answer=spoken[1:4].swapcase())).hit


def test_cases_are_nested_and_seeded(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    five = make_cases("key-value", 500, 5, 7, tiny_tokenizer, None)
    assert five[:3] == make_cases("key-value", 500, 3, 7, tiny_tokenizer, None)
    assert five != make_cases("key-value", 500, 5, 8, tiny_tokenizer, None)
    assert all(case.tokens <= 500 for case in five)
    assert 450 < mean_tokens(five) <= 500

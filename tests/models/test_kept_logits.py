"""Logits of some positions, of models whose forward can leave the others out and of those that cannot."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PreTrainedModel

from moacompress.estimate.estimator import Estimator
from moacompress.estimate.work import Kind
from moacompress.evaluation.scoring.prompts import score_batch
from moacompress.evaluation.tasks.cases import Case
from moacompress.healer.teacher import Teacher
from moacompress.models.kept_logits import kept_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS = torch.arange(4, 24)[None]


@pytest.fixture
def whole(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Returns a tiny model whose forward has no `logits_to_keep` and takes nothing that it does not know."""
    model: Any = tiny_model("llama")

    class Whole(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **more: Any) -> Any:
            if "logits_to_keep" in more:
                raise TypeError("forward() got an unexpected keyword argument 'logits_to_keep'")
            return super().forward(input_ids, **more)

    model.__class__ = Whole
    return model


@pytest.mark.parametrize(("kept", "wrapped"), [(1, True), (3, False), (torch.tensor([2, 5, 19]), True)])
def test_logits_are_those_of_the_positions(
    tiny_model: Callable[..., PreTrainedModel], whole: PreTrainedModel, kept: int | torch.Tensor, wrapped: bool
) -> None:
    models: list[Any] = [tiny_model("llama"), whole]
    every = models[0](IDS).logits
    expected = every[:, -kept:] if isinstance(kept, int) else every[:, kept]
    if wrapped:
        from peft import LoraConfig, get_peft_model

        models = [get_peft_model(model, LoraConfig(target_modules=["o_proj"])) for model in models]
    for model in models:
        found = kept_logits(model, kept, input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(found, expected)


def test_a_model_without_them_is_evaluated_timed_and_taught_from(
    tiny_model: Callable[..., PreTrainedModel], whole: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    case = Case("needle", 24, IDS[0].tolist(), [30, 31, 2], [True, True, False], ("ab",), "all", 4)
    able = tiny_model("llama")
    scores = [score_batch(model, tiny_tokenizer, [case]) for model in (able, whole)]
    assert scores[0] == scores[1]
    assert Estimator(whole, "cpu").one(Kind.STEP, 64) > 0
    rows = torch.tensor([3, 7])
    logits = [Teacher(model).logits_and_layers(IDS[0], rows, [1])[0] for model in (able, whole)]
    torch.testing.assert_close(logits[0], logits[1])


def test_nothing_else_asks_a_model_for_them() -> None:
    package = Path(__file__).parents[2] / "moacompress"
    asking = [
        file.name
        for top in (package, package.parent / "search", package.parent / "calibration")
        for file in top.rglob("*.py")
        if re.search(r"logits_to_keep\s*=|\"logits_to_keep\"\s*:", file.read_text("utf-8"))
    ]
    assert asking == ["kept_logits.py"]

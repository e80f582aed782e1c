"""A tiny compressed checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moacompress.plan import Plan


@pytest.fixture(scope="session")
def compressed(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    random_plan: Callable[..., Plan],
) -> Path:
    """Returns a run's folder with a tiny compressed checkpoint under `model/`; do not write into it."""
    from moacompress.models import model_shape
    from moacompress.runtime import attach

    folder = tmp_path_factory.mktemp("compressed") / "OUT"
    model = tiny_model("llama")
    plan = random_plan(model_shape(model), seed=1)
    attach(model, plan).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    plan.save(folder / "model" / "plan.json")
    return folder

"""What the tests of calibration share: tiny models as sources, and samples of random ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moacompress.calibration.data.samples import Sample
    from moacompress.models.source import SourceModel

    Models = Callable[..., PreTrainedModel]
    Sources = Callable[..., SourceModel]

GATES: dict[str, Any] = {
    "calibration": {
        "lengths": [700],
        "samples": 4,
        "validation_samples": 2,
        "sources": [{"generator": "needle"}],
        "text_samples": 0,
        "answer_tokens": 4,
    },
    "profile": {"draws": 1, "gates": True, "gate_samples": 3},
}
"""A recipe of a small profile with gates, but for the model."""


def random_sample(n: int, answer: int = 10, seed: int | np.random.Generator = 0) -> Sample:
    """Returns a sample whose last tokens are the answer."""
    from moacompress.calibration.data.samples import Sample

    return Sample(np.random.default_rng(seed).integers(3, 150, n), np.arange(n) >= n - answer, "random", n)


def random_samples(seed: int, count: int = 3, n: int = 150, more: int = 0) -> list[Sample]:
    """Returns samples, each of so many tokens more than the one before it."""
    rng = np.random.default_rng(seed)
    return [random_sample(n + more * number, 10 + more * number, rng) for number in range(count)]


def source_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> SourceModel:
    """Returns a model as `load_source` gives a real one."""
    from moacompress.models.source import SourceModel, model_shape

    return SourceModel(model, tokenizer, "tiny", model_shape(model), 4096)


@pytest.fixture(scope="session")
def load(tiny_model: Models, tiny_tokenizer: PreTrainedTokenizerBase) -> Sources:
    """Returns a function that makes a tiny source: `load("mistral", num_hidden_layers=2)`."""
    return lambda family="llama", **overrides: source_of(tiny_model(family, **overrides), tiny_tokenizer)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the indices of the samples that are really profiled from there on."""
    from moacompress.calibration.profile import sample_run
    from moacompress.calibration.profile.sample_statistics import sample_statistics

    indices: list[int] = []

    def counted(*args: Any) -> Any:
        indices.append(args[6])
        return sample_statistics(*args)

    monkeypatch.setattr(sample_run, "sample_statistics", counted)
    return indices

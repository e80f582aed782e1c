"""What the tests of evaluation share: a tiny model, what it is called with, and known ways to evict tokens from its cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Group
from torch import Tensor

from moacompress.evaluation.eviction.attention import attending
from moacompress.evaluation.eviction.baseline import PromptBaseline, StreamBaseline
from moacompress.evaluation.eviction.registry import EVICTIONS
from moacompress.report.evaluation_tables import evaluation_tables
from moacompress.runtime.compat.alternates import cache_argument
from tests.printed import printed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Models = Callable[..., PreTrainedModel]
    Forwards = Callable[[Any], list[tuple[int, int, Any]]]

PROMPTED = [name for name, kind in EVICTIONS.items() if issubclass(kind, PromptBaseline)]
STREAMED = [name for name, kind in EVICTIONS.items() if issubclass(kind, StreamBaseline)]
LAYERS, KV_HEADS, DIM = 3, 2, 16
LM_TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{story}}\nThe colour is",
        "doc_to_target": "label",
        "doc_to_choice": ["red", "green", "blue"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 1,
        "fewshot_split": "test",
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{story}}\nThe colour is",
        "doc_to_target": "{{['red', 'green', 'blue'][label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True},
        ],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}
"""Of lm-evaluation-harness, by name."""


def tables_of(report: dict[str, Any]) -> str:
    """Returns the words of an evaluation's tables."""
    return " ".join(printed(Group(*evaluation_tables(report)), width=300).split())


@torch.no_grad()
def logits_after(model: Any, ids: list[int], end: int, store: Any, steps: tuple[int, ...] = (7, 1, 1, 4)) -> Tensor:
    """Returns the logits of what is fed after `end`, a few tokens at a time."""
    found = []
    with attending(model):
        for size in (*steps, len(ids)):
            part = torch.tensor([ids[end : end + size]])
            if part.numel():
                found.append(model(input_ids=part, use_cache=True, **cache_argument(store)).logits[0])
            end += size
    return torch.cat(found)


@pytest.fixture
def model(tiny_model: Models) -> PreTrainedModel:
    """Groups of two query heads."""
    return tiny_model("llama")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    """Returns a function that notes the forwards of a kind of model from there on: rows, tokens and mask of each."""

    def noted(model: Any) -> list[tuple[int, int, Any]]:
        seen: list[tuple[int, int, Any]] = []
        original = type(model).forward

        def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
            seen.append((*input_ids.shape, kwargs.get("attention_mask")))
            return original(self, input_ids, **kwargs)

        monkeypatch.setattr(type(model), "forward", forward)
        return seen

    return noted


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of three task files, a group of two of them, and their ten documents."""
    folder = tmp_path_factory.mktemp("tasks")
    stories = [
        {"story": f"{n} balls roll over the hill and {n + 1} come back. " * 3, "label": n % 3} for n in range(10)
    ]
    data = folder / "stories.jsonl"
    data.write_text("".join(json.dumps(story) + "\n" for story in stories))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, task in LM_TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))  # JSON is YAML
    group = {"group": "tiny", "task": ["tiny_choice", "tiny_text"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "tiny.yaml").write_text(json.dumps(group))
    return folder

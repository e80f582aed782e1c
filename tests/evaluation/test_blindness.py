"""A model in which one known KV head finds what is far back, and plans that take that head's sight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import moacompress.evaluation.measurement as measurement
from moacompress.evaluation.runner import evaluate
from moacompress.evaluation.tasks.cases import Case
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER, HEAD = 1, 1
HIDDEN, HEAD_DIM = 64, 16
QUESTION, FILLER = 10, range(40, 90)
MARKED, ANSWERS = range(20, 28), range(30, 38)
LENGTH, PROMPTS = 600, 20
Measure = Callable[[int, int], dict[tuple[str, str], Any]]


def retriever(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Returns a model that answers `QUESTION` with the partner in `ANSWERS` of the one `MARKED` token before.

    The KV head (`LAYER`, `HEAD`) does it: the question's query matches the keys of marked tokens, their values name the
    answer. Nothing else in the model does anything.
    """
    import torch

    model: Any = tiny_model(
        "llama", num_hidden_layers=2, num_key_value_heads=2, hidden_size=HIDDEN, head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12}, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embed = model.model.embed_tokens.weight  # [vocabulary, hidden]: columns say what kind of token it is
        embed[:, 0] = 1.0
        embed[QUESTION, 1] = 1.0
        for index, token in enumerate(MARKED):
            embed[token, 2] = 1.0
            embed[token, 8 + index] = 1.0
        attention = model.model.layers[LAYER].self_attn
        still = HEAD_DIM // 2 - 1  # a dimension that the rotation hardly turns
        for query in (2 * HEAD, 2 * HEAD + 1):  # the query heads that read this KV head
            attention.q_proj.weight[query * HEAD_DIM + still, 1] = 12.0
            attention.o_proj.weight[24:32, query * HEAD_DIM : query * HEAD_DIM + 8] = torch.eye(8)
        attention.k_proj.weight[HEAD * HEAD_DIM + still, 2] = 12.0
        attention.v_proj.weight[HEAD * HEAD_DIM : HEAD * HEAD_DIM + 8, 8:16] = torch.eye(8)
        for index, token in enumerate(ANSWERS):
            model.lm_head.weight[token, 24 + index] = 6.0
    return model  # type: ignore[no-any-return]


def marked_cases(task: str, length: int, prompts: int, seed: int, tokenizer: Any, resources: Any) -> list[Case]:
    rng = np.random.default_rng((seed, length))
    cases = []
    for _ in range(prompts):
        ids = rng.choice(FILLER, length - 2).tolist()
        which = int(rng.integers(len(MARKED)))
        ids[int(rng.integers(len(ids) // 2))] = MARKED[which]
        answer = ANSWERS[which]
        said = str(tokenizer.decode([answer]))
        cases.append(Case(task, length, [*ids, QUESTION], [answer], [True], (said,), "all", 1))
    return cases


@pytest.fixture
def measured(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Returns a function that blinds one KV head and evaluates; its rows by model and metric, `-` before differences."""
    from moacompress.runtime import attach, detach

    monkeypatch.setattr(measurement, "make_cases", marked_cases)
    model = retriever(tiny_model)
    tiny_tokenizer.save_pretrained(tmp_path)

    def measure(layer: int, head: int) -> dict[tuple[str, str], Any]:
        rules = [[Rule.FULL] * 2 for _ in range(2)]
        rules[layer][head] = Rule(4, 32, 0)
        plan = Plan(model_shape(model), 32, tuple(map(tuple, rules)))
        attach(model, plan).save_pretrained(tmp_path)
        detach(model)
        plan.save(tmp_path / "plan.json")
        report = evaluate(tmp_path, against=("dense",), lengths=(LENGTH,), prompts=PROMPTS)
        rows = {(row["model"], row["metric"]): row for row in report["results"]}
        return rows | {("-", row["metric"]): row for row in report["differences"]}

    return measure


def test_a_blind_retrieval_head_is_seen(measured: Measure) -> None:
    rows = measured(LAYER, HEAD)
    assert rows["dense", "exact_match"]["value"] == 1.0
    assert rows["dense", "nll"]["value"] < 0.5
    assert rows["plan", "exact_match"]["ci95"][1] < 0.5
    assert rows["plan", "retention"]["ci95"][1] < 0.5
    assert rows["plan", "retention"]["prompts"] == PROMPTS
    for metric, worse in (("exact_match", -1), ("accuracy", -1), ("nll", 1)):
        assert min(worse * end for end in rows["-", metric]["ci95"]) > 0.5


@pytest.mark.parametrize(("layer", "head"), [(LAYER, 1 - HEAD), (1 - LAYER, HEAD)])
def test_blinding_any_other_head_is_harmless(measured: Measure, layer: int, head: int) -> None:
    rows = measured(layer, head)
    assert rows["plan", "exact_match"]["value"] == rows["plan", "retention"]["value"] == 1.0
    assert rows["-", "nll"]["value"] == pytest.approx(0.0, abs=1e-6)

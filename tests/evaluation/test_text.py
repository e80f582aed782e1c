"""Windows of text and the scores on them: against plain logits, and in memory that does not grow with the window."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import moacompress.evaluation.scoring.text as text
from moacompress.core.errors import DataError, ModelError
from moacompress.evaluation.scoring.text import head_logits, read, score_window, text_windows
from moacompress.models.source import model_shape
from moacompress.prompts.pools import Prose
from moacompress.rules.plan import Plan
from moacompress.runtime import attach

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.evaluation.conftest import Models

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "gpt_neox": {"num_key_value_heads": 4},
    "cohere2": {"logit_scale": 0.3},
}


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Prose:
    """Nine documents of numbered words, so that every token says where it is from."""
    folder = tmp_path_factory.mktemp("texts")
    for document in range(9):
        words = " ".join(f"{document}w{word}." for word in range(120 + 10 * document))
        (folder / f"{document}.txt").write_text(words)
    return Prose.load(folder)


@pytest.fixture(scope="module")
def window() -> list[int]:
    return np.random.default_rng(0).integers(3, 160, 301).tolist()


def plain_scores(logits: torch.Tensor, dense: torch.Tensor, window: list[int]) -> list[float]:
    """[early nll, and of the late half nll, kl, agreement], by the definition."""
    n = len(window)
    q, p = logits.double().log_softmax(-1), dense.double().log_softmax(-1)
    early = [float(-q[t - 1, window[t]]) for t in range(1, n // 2)]
    late, after = [], slice(n // 2 - 1, n - 1)
    for of, dense_of, token in zip(q[after], p[after], window[n // 2 :], strict=True):
        kl = (dense_of.exp() * (dense_of - of)).sum()
        late.append([float(-of[token]), float(kl), float(of.argmax() == dense_of.argmax())])
    return [float(np.mean(early)), *np.mean(late, axis=0).tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_from_plain_logits(
    tiny_model: Models, random_plan: Callable[..., Plan], window: list[int], family: str
) -> None:
    model: Any = tiny_model(family, **FAMILIES[family])
    plan = random_plan(model_shape(model), seed=2)
    ids = torch.tensor([window])
    dense_logits = model(ids, use_cache=False).logits[0]
    dense = read(model, window)
    assert torch.allclose(head_logits(model, dense.states), dense_logits.float(), atol=1e-5)
    attach(model, plan)
    wanted = plain_scores(model(ids, use_cache=False).logits[0], dense_logits, window)
    score = score_window(read(model, window), dense, window)
    assert astuple(score) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert score.kl > 1e-3
    assert score.top1_agreement < 1


def test_dense_against_itself(model: Any, window: list[int]) -> None:
    dense = read(model, window)
    for score in (score_window(dense, dense, window), score_window(read(model, window), dense, window)):
        assert (score.kl, score.top1_agreement) == (0, 1)
        nll = torch.nn.functional.cross_entropy(model(torch.tensor([window])).logits[0, :-1], torch.tensor(window[1:]))
        halves = (score.nll_early * (301 // 2 - 1) + score.nll_late * (301 - 301 // 2)) / 300
        assert halves == pytest.approx(float(nll), rel=1e-5)


def test_few_rows_at_a_time(
    model: Any, random_plan: Callable[..., Plan], window: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = read(model, window)
    attach(model, random_plan(model_shape(model), seed=2))
    whole = score_window(read(model, window), dense, window)
    seen: list[int] = []
    original = text.head_logits

    def counted(model: Any, states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return original(model, states)

    monkeypatch.setattr(text, "head_logits", counted)
    monkeypatch.setattr(text, "MAX_LOGITS", 160 * 7)
    score = score_window(read(model, window), dense, window)
    assert max(seen) == 7
    assert sum(seen) == 2 * 300
    assert astuple(score) == pytest.approx(astuple(whole), abs=1e-5)
    assert model.model._forward_hooks == {}


def test_other_vocabulary(tiny_model: Models, window: list[int]) -> None:
    states, dense = (read(tiny_model("llama", vocab_size=size), window) for size in (160, 200))
    with pytest.raises(ModelError, match="160 tokens in its vocabulary, the dense one 200"):
        score_window(states, dense, window)


def test_logits_that_are_not_finite(model: Any, window: list[int]) -> None:
    model.lm_head.weight.data[5] = float("nan")
    states = read(model, window)
    with pytest.raises(ModelError, match="not finite"):
        score_window(states, states, window)


def test_windows(prose: Prose, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    windows = text_windows(prose, tiny_tokenizer, 100, 12, seed=3)
    assert [len(window.ids) for window in windows] == [100] * 12
    texts = [str(tiny_tokenizer.decode(window.ids)) for window in windows]
    pool = [" ".join(document) for document in prose.pools["evaluation"]]
    places = []
    for piece in texts:
        (document,) = (number for number, whole in enumerate(pool) if piece in whole)
        places.append((document, pool[document].index(piece)))
    assert [document for document, _ in places] == [window.document for window in windows]
    assert {document for document, _ in places[:3]} == {0, 1, 2}
    for document in range(3):
        starts = sorted(start for where, start in places if where == document)
        assert all(b - a >= 100 for a, b in itertools.pairwise(starts))
    assert text_windows(prose, tiny_tokenizer, 100, 5, seed=3) == windows[:5]
    assert text_windows(prose, tiny_tokenizer, 100, 5, seed=4) != windows[:5]


def test_all_windows_of_a_text_can_be_had(prose: Prose, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    fit = sum(len(" ".join(document)) // 200 for document in prose.pools["evaluation"])
    assert len(text_windows(prose, tiny_tokenizer, 200, fit)) == fit
    for length, count, said in (
        (200, fit + 1, rf"has {fit} windows of 200 tokens for evaluation .*, {fit + 1} were asked for"),
        (9000, 1, "has 0 windows of 9,000 tokens"),
        (3, 1, "at least 4 tokens; 3 were asked for"),
    ):
        with pytest.raises(DataError, match=said):
            text_windows(prose, tiny_tokenizer, length, count)


def test_a_beginning_token_counts(prose: Prose, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    backend: Any = tiny_tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    try:
        windows = text_windows(prose, tiny_tokenizer, 100, 3)
    finally:
        backend.post_processor = before
    assert [len(window.ids) for window in windows] == [100] * 3
    assert all(ids[0] == 1 and 1 not in ids[1:] and 2 not in ids for _, ids in windows)

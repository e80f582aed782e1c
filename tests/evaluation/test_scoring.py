"""Scores of prompts, against straightforward ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moacompress.calibration.data.answers import generate_greedy
from moacompress.core.errors import ModelError, UsageError
from moacompress.evaluation.scoring import prompts as scoring
from moacompress.evaluation.scoring.prompts import batches, match_share, score_batch
from moacompress.evaluation.tasks.cases import Case, Match
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tests.evaluation.conftest import Forwards, Models

CASE = Case("t", 600, [4] * 600, [5, 6], [True, True], ("ab",), "all", 8)


def random_cases(count: int, turn_at: int | None = None, size: int = 600) -> list[Case]:
    rng = np.random.default_rng(3)
    cases = []
    for index in range(count):
        answer = rng.integers(4, 100, 5 + index % 3).tolist()
        counts = [False, *[True] * (len(answer) - 2), False]
        ids = rng.integers(4, 100, size).tolist()
        cases.append(Case("t", size, ids, answer, counts, ("a", "~~"), "all", 12, turn_at))
    return cases


@pytest.fixture(params=["dense", "plan"])
def model(request: pytest.FixtureRequest, tiny_model: Models, random_plan: Callable[..., Plan]) -> PreTrainedModel:
    built = tiny_model("llama")
    return built if request.param == "dense" else attach(built, random_plan(model_shape(built)))


def test_teacher_forced_numbers_are_those_of_one_uncached_forward(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    (case,) = random_cases(1)
    ids = torch.tensor([[*case.prompt_ids, *case.answer_ids]])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    begin = len(case.prompt_ids)
    rows = [logits[begin + i - 1] for i, counts in enumerate(case.is_value) if counts]
    targets = [token for token, counts in zip(case.answer_ids, case.is_value, strict=True) if counts]
    score = score_batch(model, tiny_tokenizer, [case])[0]
    assert score.nll == pytest.approx(-sum(float(r[t]) for r, t in zip(rows, targets, strict=True)) / 3, abs=1e-4)
    said = [int(row.argmax()) for row in rows]
    answer = [case.answer_ids[0], said[0], *case.answer_ids[2:]]
    assert score_batch(model, tiny_tokenizer, [replace(case, answer_ids=answer)])[0].accuracy >= 1 / 3
    assert score.accuracy == pytest.approx(sum(a == b for a, b in zip(said, targets, strict=True)) / 3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_dense_is_transformers_own_model(
    family: str, tiny_model: Models, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """The dense model is scored under a plan that keeps everything, so that rounding is the same for all."""
    model, cases = tiny_model(family), random_cases(3, turn_at=400)
    if family == "gemma2":
        # before 5.21 transformers runs it by SDPA, which leaves the soft cap out
        model.set_attn_implementation("eager")
    stock = score_batch(model, tiny_tokenizer, cases)
    dense = score_batch(attach(model, Plan.full(model_shape(model))), tiny_tokenizer, cases)
    assert [score.nll for score in dense] == pytest.approx([score.nll for score in stock], abs=1e-4)
    assert [(s.exact_match, s.accuracy) for s in dense] == [(s.exact_match, s.accuracy) for s in stock]


@pytest.mark.parametrize("turn_at", [None, 400])
def test_batched_and_single_agree(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, turn_at: int | None
) -> None:
    cases = random_cases(5, turn_at)
    for index in (0, 3):  # what these two say is looked for, what the others say is not
        (said,) = generate_greedy(model, [cases[index].prompt_ids], 4)
        cases[index] = replace(cases[index], references=(str(tiny_tokenizer.decode(said)),))
    together = score_batch(model, tiny_tokenizer, cases)
    alone = [score_batch(model, tiny_tokenizer, [case])[0] for case in cases]
    assert [score.nll for score in together] == pytest.approx([score.nll for score in alone], abs=1e-4)
    assert [(s.exact_match, s.accuracy) for s in together] == [(s.exact_match, s.accuracy) for s in alone]
    assert [score.exact_match for score in together] == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_a_second_turn_is_a_forward_of_its_own(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, forwards: Forwards
) -> None:
    whole, turns = random_cases(1)[0], random_cases(1, turn_at=400)[0]
    expected = score_batch(model, tiny_tokenizer, [whole])[0]
    seen = forwards(model)
    score = score_batch(model, tiny_tokenizer, [turns])[0]
    assert [tokens for _, tokens, _ in seen[:3]] == [400, 199, len(turns.answer_ids)]
    assert score.nll == pytest.approx(expected.nll, abs=1e-4)
    assert (score.exact_match, score.accuracy) == (expected.exact_match, expected.accuracy)


@pytest.mark.parametrize(
    ("match", "references"), [("all", (1, 3)), ("any", (2, 9)), ("any-words", (2, 9)), ("last-integer", (30, 40))]
)
def test_stopping_early_changes_no_score(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, match: Match, references: tuple[int, int]
) -> None:
    (case,) = random_cases(1)
    (said,) = generate_greedy(model, [case.prompt_ids], 24)
    spoken = str(tiny_tokenizer.decode(said, skip_special_tokens=True))
    looked_for = (spoken[references[0] : references[0] + 2].swapcase(), spoken[references[1] : references[1] + 2])
    case = replace(case, references=looked_for if all(looked_for) else ("~~no", "~~"), match=match, new_tokens=24)
    assert score_batch(model, tiny_tokenizer, [case])[0].exact_match == match_share(case, spoken)


def test_generation_ends_with_the_last_reference_or_a_closing_token(
    tiny_model: Models, tiny_tokenizer: PreTrainedTokenizerBase, forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    (case,) = random_cases(1)
    (said,) = generate_greedy(model, [case.prompt_ids], 12)
    seen = forwards(model)

    def generated(case: Case) -> int:
        seen.clear()
        score_batch(model, tiny_tokenizer, [case])[0]
        return len(seen) - 2  # the prompt, and the teacher-forced pass

    third = str(tiny_tokenizer.decode(said[:3]))
    assert generated(replace(case, references=(third,))) == 3
    assert generated(replace(case, references=(third, "~~"))) == 12
    assert generated(replace(case, references=("1",), match="last-integer")) == 12
    monkeypatch.setattr(scoring, "stop_tokens", lambda model: {said[1]})
    assert generated(replace(case, references=("~~",))) == 2


@pytest.mark.parametrize(
    ("match", "references", "answer", "share"),
    [
        ("all", ("12", "34"), "it is 12", 0.5),
        ("all", ("12", "34"), "34, 12", 1.0),
        ("all", ("Abc",), "aBC.", 1.0),
        ("any", ("x", "Denver Broncos"), "the denver broncos", 1.0),
        ("any", ("no",), "Yes, as is well known.", 1.0),
        ("any-words", ("no",), "Yes, as is well known.", 0.0),
        ("any-words", ("no",), "Nobody knows, so NO.", 1.0),
        ("any-words", ("1", "B"), "It is (B).", 1.0),
        ("any-words", ("1",), "12 or 1_000", 0.0),
        ("any-words", (" Denver Broncos ",), "the denver broncos' win", 1.0),
        ("any-words", ("caf",), "caf\u00e9", 0.0),
        ("any-words", ("\u0930\u093e\u092e",), "\u0930\u093e\u092e\u093e", 0.0),  # a vowel sign goes on with the word
        ("any-words", ("\u5317\u4eac",), "\u9996\u90fd\u662f\u5317\u4eac\u5e02", 1.0),  # Chinese puts no spaces
        ("any-words", ("\uc11c\uc6b8",), "\uc11c\uc6b8\uc740", 1.0),  # Korean puts particles behind words
        ("last-integer", ("345",), "line 12 holds <345>.", 1.0),
        ("last-integer", ("345",), "<345> of line 12", 0.0),
        ("last-integer", ("345",), "none", 0.0),
        ("last-integer", ("345",), "00345", 1.0),
        ("last-integer", ("12345",), "It has the number 12,345.", 1.0),
        ("last-integer", ("12345",), "12,3456", 0.0),
        ("last-integer", ("345",), "1, 2,345", 0.0),
    ],
)
def test_match_rules(match: Match, references: tuple[str, ...], answer: str, share: float) -> None:
    assert match_share(replace(CASE, match=match, references=references), answer) == share


@given(st.text(max_size=30), st.text(max_size=10), st.text(min_size=1, max_size=4), st.sampled_from(["all", "any"]))
def test_what_is_found_stays_found(answer: str, more: str, reference: str, match: Match) -> None:
    case = replace(CASE, match=match, references=(reference, answer[2:5] or "x"))
    assert match_share(case, answer + more) >= match_share(case, answer)


@pytest.mark.parametrize(
    ("answer", "settled"),
    [("no", False), ("no\ufffd", False), ("nob", False), ("no.", True), ("no, nob", True), ("nobody\n", False)],
)
def test_a_word_has_ended_with_the_character_behind_it(answer: str, settled: bool) -> None:
    case = replace(CASE, match="any-words", references=("no",))
    assert match_share(case, answer, ended=False) == settled


@given(st.text("nobdy .\u00e9\u0301\u5317_", max_size=12), st.text("nobdy .\u0301\u5317", max_size=4))
def test_words_that_have_ended_stay_found(answer: str, more: str) -> None:
    case = replace(CASE, match="any-words", references=("no", "o\u5317", "body"))
    if match_share(case, answer, ended=False) == 1.0:
        assert match_share(case, answer) == match_share(case, answer + more) == 1.0


def test_batches_are_of_one_length_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [*random_cases(7), *random_cases(2, turn_at=400), *random_cases(2, size=500)]
    assert batches(cases, 160) == [[*range(7)], [7, 8], [9, 10]]
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 2000)
    assert batches(cases, 160) == [[0, 1, 2], [3, 4, 5], [6], [7, 8], [9, 10]]
    assert [len(batch) for batch in batches(cases, 10**9)] == [1] * 11


def test_prompts_of_different_lengths_are_refused(tiny_model: Models, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="cannot be scored together"):
        score_batch(tiny_model("llama"), tiny_tokenizer, [*random_cases(1), *random_cases(1, size=500)])


def test_logits_that_are_not_finite(tiny_model: Models, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model: Any = tiny_model("llama")
    model.lm_head.weight[3] = float("inf")
    with pytest.raises(ModelError, match="logits are not finite on a prompt of t with 600 tokens in float32"):
        score_batch(model, tiny_tokenizer, [random_cases(1)[0]])[0]

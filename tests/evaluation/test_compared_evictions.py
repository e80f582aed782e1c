"""Known ways to evict tokens as compared models: their bytes, their scores, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from moacompress.core.errors import DataError, InfeasibleBudgetError, UsageError
from moacompress.evaluation.baselines import evictions
from moacompress.evaluation.baselines.compared_models import STOCK
from moacompress.evaluation.baselines.comparison import check_names
from moacompress.evaluation.baselines.evictions import ComparedEviction, compared_eviction, kept_mask, score_evictions
from moacompress.evaluation.eviction.key_scores import ExpectedAttention
from moacompress.evaluation.eviction.kvzip import KVzip
from moacompress.evaluation.eviction.reading import PromptReading, read_prompt
from moacompress.evaluation.eviction.registry import EVICTIONS, SEEN, UNSEEN, eviction_names, expanded
from moacompress.evaluation.eviction.window_scores import AdaKV
from moacompress.evaluation.runner import evaluate
from moacompress.evaluation.scoring.prompts import score_batch
from moacompress.evaluation.tasks.cases import Case
from moacompress.kernels.reference.rounding import rounded
from moacompress.models.source import model_shape
from moacompress.rules.formats import CODED, FORMATS, NATIVE, find_format
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime.checkpoint import load_checkpoint
from tests.evaluation.conftest import DIM, KV_HEADS, LAYERS, PROMPTED, STREAMED, logits_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def a_case(size: int = 150, question_at: int | None = 130) -> Case:
    drawn = np.random.default_rng(size).integers(4, 100, size + 4).tolist()
    return Case("t", 160, drawn[:size], drawn[size:], [True] * 4, ("~~",), "all", 3, None, question_at)


def _windows(shape: Any, window: int = 92) -> Plan:
    full = Plan.full(shape)
    return replace(full, rules=tuple(tuple(Rule(4, window, 0) for _ in row) for row in full.rules))


def compared(name: str, question: str | None, plan: Plan, format: str = NATIVE) -> ComparedEviction:
    return ComparedEviction(f"{name}:{question}", 0, EVICTIONS[name](), question, plan, format)


def test_prompt_and_answer_take_the_plans_bytes(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Where the question is not evicted from, it and the answer are in the model's dtype; codes keep more tokens."""
    plan, case = _windows(model_shape(model), window=28), a_case(300, question_at=290)
    reading = read_prompt(model, tiny_tokenizer, case.prompt_ids[:-1])
    for name, (question, end) in itertools.product(PROMPTED, ((SEEN, 299), (UNSEEN, 290))):
        entries = []
        for format in FORMATS:
            vector, whole = (FORMATS[each].vector_bytes(DIM, "float32") for each in (format, NATIVE))
            one = compared(name, question, plan, format)
            mask = kept_mask(one, case, reading)
            assert mask.shape == (LAYERS, KV_HEADS, end)
            taken = 2 * (vector * int(mask.sum()) + whole * LAYERS * KV_HEADS * (case.tokens - end))
            found = one.on_prompts([case])
            assert (found.kv_bytes, found.token_bytes) == (taken, 2 * vector)
            assert 0 <= plan.kv_bytes(case.tokens) - taken < 2 * vector
            entries.append(int(mask.sum()))
        assert entries[0] < entries[1] < entries[2]
    # all of a prompt takes less than the plan
    roomy = compared("keydiff", SEEN, _windows(model_shape(model), window=256), "int4")
    assert kept_mask(roomy, case, reading).all()
    taken = roomy.on_prompts([case]).kv_bytes
    assert taken == 299 * LAYERS * KV_HEADS * roomy.token_bytes + 5 * LAYERS * KV_HEADS * 128
    assert taken < roomy.plan.kv_bytes(case.tokens)


def test_keys_are_rounded_less_their_mean(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    reading = read_prompt(model, tiny_tokenizer, a_case().prompt_ids[:-1])
    mask = torch.ones(LAYERS, KV_HEADS, 130, dtype=torch.bool)
    offset = torch.nn.functional.normalize(torch.arange(DIM).float(), dim=0) * 100
    layers = [replace(one, attended=(one.query, one.key + offset, one.value)) for one in reading.layers]
    moved = replace(reading, layers=layers)
    for (key, value), layer in zip(moved.kept(mask, format="int4")._held, reading.layers, strict=True):
        exact_key, exact_value = layer.key[None], layer.value[None]
        for found, exact in ((key - offset, exact_key[:, :, :130]), (value, exact_value[:, :, :130])):
            assert 0 < (found - exact).norm() < 0.1 * exact.norm()
        without = rounded(exact_key + offset, [find_format("int4").code] * KV_HEADS) - offset
        assert (without - exact_key).norm() > exact_key.norm()


def test_where_all_is_kept_scores_are_dense(compressed: Path) -> None:
    """But for the rounding of codes."""
    checkpoint = load_checkpoint(compressed / "model", "auto", "cpu")
    plan, case = Plan.full(checkpoint.plan.model), a_case()
    (dense,) = score_batch(checkpoint.without_plan(), checkpoint.tokenizer, [case])
    models = [compared(name, question, plan) for name in PROMPTED for question in (SEEN, UNSEEN)]
    models += [compared(name, None, plan) for name in STREAMED]
    coded = [compared("keydiff", UNSEEN, plan, format) for format in CODED]
    *native, eight, six, four = score_evictions(checkpoint, case, [*models, *coded])
    for score in native:
        assert score.nll == pytest.approx(dense.nll, abs=1e-4)
        assert (score.exact_match, score.accuracy) == (dense.exact_match, dense.accuracy)
    assert 1e-5 < abs(eight.nll - dense.nll) < abs(six.nll - dense.nll) < abs(four.nll - dense.nll) < 0.1


def test_the_answer_is_scored_under_the_mask(compressed: Path) -> None:
    """As where the prompt is read whole under the mask, and then the answer token by token."""
    checkpoint = load_checkpoint(compressed / "model", "auto", "cpu")
    plan, case = _windows(checkpoint.plan.model), a_case()
    one = compared("keydiff", UNSEEN, plan)
    (found,) = score_evictions(checkpoint, case, [one])
    model = checkpoint.without_plan()
    reading = read_prompt(model, checkpoint.tokenizer, case.prompt_ids[:-1])
    fed = [*case.prompt_ids, *case.answer_ids[:-1]]
    logits = logits_after(model, fed, 130, reading.kept(kept_mask(one, case, reading)), (1,) * 30)
    nll = -float(logits[-4:].log_softmax(-1)[range(4), case.answer_ids].mean())
    assert found.nll == pytest.approx(nll, abs=1e-4)


def test_methods_answer_side_by_side_as_each_does_alone(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the dense reading is made once for all that evict after it."""
    read = []

    def counted(*given: Any) -> PromptReading:
        read.append(1)
        return read_prompt(*given)

    monkeypatch.setattr(evictions, "read_prompt", counted)
    checkpoint = load_checkpoint(compressed / "model", "auto", "cpu")
    plan, case = _windows(checkpoint.plan.model), replace(a_case(), new_tokens=12)
    models = [compared(name, question, plan) for name in PROMPTED for question in (SEEN, UNSEEN)]
    models.insert(3, compared(STREAMED[0], None, plan))
    models += [compared("keydiff", UNSEEN, plan, format) for format in CODED]
    together = list(score_evictions(checkpoint, case, models))
    assert len(read) == 1
    for one, found in zip(models, together, strict=True):
        (alone,) = score_evictions(checkpoint, case, [one])
        assert found.nll == pytest.approx(alone.nll, abs=1e-4)
        assert (found.exact_match, found.accuracy) == (alone.exact_match, alone.accuracy)
    assert len(read) == len(models)  # again for each alone, but for the one that evicts as it reads
    assert len({round(score.nll, 3) for score in together}) > len(PROMPTED)


ASKED: dict[str, Any] = {"tasks": ("needle-noise",), "lengths": (700,), "prompts": 2}


def test_rows_beside_the_others(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = evaluate(compressed, against=("dense", "snapkv", "h2o"), out=tmp_path / "eval.json", **ASKED)
    rows = {(row["model"], row["metric"]): row for row in report["results"]}
    names = ["plan", "dense", STOCK, "snapkv:unseen", "snapkv:seen", "h2o"]
    assert [name for name, metric in rows if metric == "nll"] == names
    assert [row["model"] for row in report["differences"] if row["metric"] == "nll"] == names[1:]
    plan = rows["plan", "nll"]["kv_bytes"]
    for name in names[3:]:
        row = rows[name, "nll"]
        assert row["kv_bytes"] <= plan < row["kv_bytes"] + 200
        assert (row["readings"], row["freed"]) == (1, False)
        assert math.isfinite(row["value"])
    assert rows["snapkv:seen", "nll"]["value"] != rows["snapkv:unseen", "nll"]["value"]

    def refuse(*given: Any) -> Any:
        raise AssertionError("what is known is not scored again")

    monkeypatch.setattr(evictions, "read_prompt", refuse)
    again = evaluate(compressed, against=("dense", "snapkv:seen", "h2o"), out=tmp_path / "eval.json", **ASKED)
    ours, theirs = ([row for row in of["results"] if row["model"] != "snapkv:unseen"] for of in (again, report))
    assert ours == theirs
    with pytest.raises(AssertionError, match="not scored again"):
        evaluate(compressed, against=("keydiff",), out=tmp_path / "eval.json", **ASKED)


@pytest.mark.parametrize(
    ("asked", "measured"),
    [
        ("dense kvzip snapkv:seen h2o snapkv", "dense kvzip:unseen kvzip:seen snapkv:seen h2o snapkv:unseen"),
        (
            "snapkv:window=016 snapkv:kernel=5:seen h2o:recent=0.25",
            "snapkv:window=16:unseen snapkv:window=16:seen snapkv:seen h2o:recent=0.25",
        ),
        (
            "kvzip:int4 snapkv:window=16:int8:seen keydiff:native h2o:native",
            "kvzip:int4:unseen kvzip:int4:seen snapkv:window=16:int8:seen keydiff:unseen keydiff:seen h2o",
        ),
    ],
)
def test_names_say_what_is_measured(asked: str, measured: str) -> None:
    assert expanded(asked.split()) == tuple(measured.split())


def test_settings_and_formats_are_part_of_the_name(model: PreTrainedModel) -> None:
    plan = _windows(model_shape(model))
    for name, baseline, format in (
        ("adakv:safeguard=0.5:window=16:seen", AdaKV(window=16, safeguard=0.5), NATIVE),
        ("expected-attention:covariance=False:seen", ExpectedAttention(covariance=False), NATIVE),
        ("kvzip:int4:seen", KVzip(), "int4"),
        ("kvzip:native:seen", KVzip(), NATIVE),
    ):
        one, plain = (compared_eviction(each, plan, 160) for each in (name, f"{name.partition(':')[0]}:seen"))
        assert (one.baseline, one.format) == (baseline, format)
        assert expanded([one.name]) == expanded([name]) == (one.name,)
        assert (one.key() == plain.key()) == (one.name == plain.name)
    assert {"snapkv", "snapkv:unseen", "kvzip:seen", "h2o", "kvzip:int4", "snapkv:int8"} <= set(eviction_names())
    assert not {"h2o:seen", "h2o:int4"} & set(eviction_names())
    assert [EVICTIONS[name].readings for name in ("kvzip", "snapkv", "h2o")] == [2, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "plan",
            "against 'plan', which is what rows of the checkpoint itself are called; write a folder of this name as './plan'",
        ),
        ("snapkv:windw=3", "'snapkv:windw=3': snapkv has no setting 'windw'; did you mean 'window'"),
        ("snapkv:window=0", "window is 0, and must be at least 1"),
        ("snapkv:kernel=4:seen", "kernel is 4, and must be odd"),
        ("snapkv:window=x", "window is 'x', and must be a whole number"),
        ("h2o:recent=nan", "recent is nan, and must be from 0 to 1"),
        ("expected-attention:covariance=2", "covariance is '2', and must be true or false"),
        ("kvzip:seen:int4", "cannot evaluate against 'kvzip:seen:int4'; "),
        ("h2o:int4", "'h2o:int4': h2o evicts as it reads, and only what is kept of a prompt that was read is rounded"),
    ],
)
def test_names_that_cannot_be_read(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f".*{re.escape(message)}"):
        check_names((name,))


def test_a_prompt_of_one_line_has_no_question_to_leave_out(compressed: Path, tmp_path: Path) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "What is the capital of the country in the story above?", "answer": "A"}\n')
    asked: dict[str, Any] = {"tasks": (), "sources": (str(rows),), "lengths": (700,), "prompts": 1}
    said = "^keydiff:unseen evicts before the question is read, and a prompt of mine does not"
    with pytest.raises(DataError, match=said):
        evaluate(compressed, against=("keydiff",), **asked)


def test_bytes_that_leave_nothing(model: PreTrainedModel) -> None:
    one = compared("snapkv", UNSEEN, _windows(model_shape(model)))
    one.check(a_case(150, 80))
    with pytest.raises(InfeasibleBudgetError, match="^snapkv:unseen keeps the 134 tokens of a prompt of t that follow"):
        one.check(a_case(150, 20))

"""Serving: the mix of requests, the scheduler on a clock of its own, rows that join and leave, all on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moacompress.bench import serve_benchmark
from moacompress.bench.request_mix import ANSWERS, PROMPTS, Lengths, Request, requests
from moacompress.bench.running_rows import running_rows
from moacompress.bench.serve_benchmark import ServeRequest, run_serving
from moacompress.bench.serving import RunningRows, serve
from moacompress.core.errors import ArtefactError, UsageError
from moacompress.models.source import model_shape
from moacompress.models.stored_plan import stored_plan
from moacompress.rules.plan import Plan
from tests.conftest import tiny_model

SMALL = ServeRequest(
    count=6, kv_memory=400_000, prompt=Lengths(200, 0.3, 100, 300), new=Lengths(8, 0.5, 1, 20), dtypes=("float32",)
)


def test_a_seed_gives_the_same_requests_everywhere() -> None:
    assert requests(0, 4)[:3] == [Request(358, 278), Request(389, 170), Request(133, 162)]
    many = requests(1, 4000, rate=2.0)
    assert many[:50] == requests(1, 50, rate=2.0)
    assert many != requests(2, 4000, rate=2.0)
    for name, lengths in (("prompt_tokens", PROMPTS), ("new_tokens", ANSWERS)):
        drawn = sorted(getattr(one, name) for one in many)
        assert lengths.least <= drawn[0] < lengths.median / 3
        assert drawn[-1] == lengths.most
        assert drawn[2000] == pytest.approx(lengths.median, rel=0.05)
        # of a normal distribution 84% lie below one standard deviation above the mean
        assert drawn[3365] == pytest.approx(lengths.median * math.exp(lengths.spread), rel=0.07)
    assert [one.arrival for one in many] == sorted(one.arrival for one in many)
    assert many[-1].arrival == pytest.approx(2000, rel=0.06)
    assert requests(7, 2, prompt=1000, new=512) == [Request(1000, 512)] * 2
    for wrong in ({"count": 0}, {"count": 1, "new": 0}, {"count": 1, "rate": 0.0}):
        with pytest.raises(UsageError, match="at least 1 request"):
            requests(0, **wrong)  # type: ignore[arg-type]


def test_the_mix_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from moacompress.bench.request_mix import requests; requests(0, 3); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class ClockedRows:
    """Rows whose prompts take a second for 100 tokens, and whose steps take a tenth of one."""

    def __init__(self) -> None:
        self.now, self.rows, self.most_bytes = 0.0, list[int](), 0

    def add(self, prompt: torch.Tensor) -> int:
        self.now += prompt.shape[1] / 100
        self.rows.append(prompt.shape[1])
        return 0

    def step(self, tokens: Sequence[int]) -> list[int]:
        assert len(tokens) == len(self.rows) > 0
        self.now += 0.1
        self.rows = [tokens + 1 for tokens in self.rows]
        self.most_bytes = max(self.most_bytes, sum(self.rows))
        return [token + 1 for token in tokens]

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[number] for number in rows]

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def served(given: list[Request], memory: int) -> tuple[dict[str, Any], ClockedRows]:
    rows = ClockedRows()
    result = serve(
        rows,
        given,
        lambda number: torch.zeros(1, given[number].prompt_tokens, dtype=torch.int64),
        lambda tokens: tokens,
        memory,
        clock=lambda: rows.now,
        sleep=rows.sleep,
    )
    assert rows.rows == []
    return result.row(given), rows


def test_requests_wait_until_their_memory_is_free() -> None:
    """Two fit at a time: the third waits until the shorter of the first two is answered, and the fourth behind it."""
    given = [Request(100, 11), Request(100, 21), Request(100, 11), Request(50, 2)]
    row, rows = served(given, memory=240)
    # 0: first prompt, 1: second, 2-3: ten steps of two; the first leaves, 3: third prompt, 4-5: ten steps of two; both leave
    assert row["seconds"] == pytest.approx(5.6)
    assert row["first_token_s"]["mean"] == pytest.approx((1 + 2 + 4 + 5.5) / 4)
    assert row["first_token_s"]["p50"] == pytest.approx(3)
    assert row["token_s"]["mean"] == pytest.approx(((3 - 1) / 10 + (5 - 2) / 20 + 0.1 + 0.1) / 4)
    assert row["running"] == {"mean": pytest.approx((1 + 2 + 2 + 2 + 2 + 0.6) / 5.6), "most": 2}
    assert (row["steps"], row["preemptions"], row["reserved_bytes"]) == (21, 0, 232)
    assert rows.most_bytes <= 240
    assert row["requests_per_s"] == pytest.approx(4 / 5.6)
    assert (row["prompt_tokens"], row["new_tokens"]) == (350, 45)
    assert row["tokens_per_s"] == pytest.approx(45 / 5.6)


def test_requests_are_waited_for() -> None:
    given = [Request(100, 2), Request(100, 1, arrival=0.5), Request(100, 2, arrival=9.0)]
    row, _ = served(given, memory=1000)
    assert row["seconds"] == pytest.approx(10.1)
    # the second one comes while the first prompt is read, and its prompt is read before the next step
    assert row["first_token_s"]["mean"] == pytest.approx((1 + 1.5 + 1) / 3)
    assert row["running"]["mean"] < 0.5
    assert served([Request(10, 1)], 1000)[0]["token_s"] is None


def prompts_of(given: Sequence[Request]) -> list[torch.Tensor]:
    """Returns a random prompt of every request."""
    return [
        torch.randint(3, 150, (1, one.prompt_tokens), generator=torch.Generator().manual_seed(number))
        for number, one in enumerate(given)
    ]


def answers(rows: RunningRows, given: Sequence[Request], memory: int) -> list[list[int]]:
    """Returns the tokens of every request, each of which takes one of `memory` places."""
    prompts = prompts_of(given)
    found, order = [list[int]() for _ in given], list[int]()

    class Noted:
        def add(self, prompt: torch.Tensor) -> int:
            number = next(at for at, one in enumerate(prompts) if one is prompt)
            order.append(number)
            found[number].append(rows.add(prompt))
            return found[number][-1]

        def step(self, tokens: Sequence[int]) -> list[int]:
            new = rows.step(tokens)
            for number, token in zip(order, new, strict=True):
                found[number].append(token)
            return new

        def keep(self, kept: Sequence[int]) -> None:
            order[:] = [order[number] for number in kept]
            rows.keep(kept)

    serve(Noted(), given, prompts.__getitem__, lambda tokens: 1, memory)
    return found


@pytest.mark.parametrize("side", ["plan", "full_span", "dense"])
def test_rows_get_the_tokens_that_they_would_get_alone(side: str, models: Any, checkpoint: Any) -> None:
    given = [Request(70, 5), Request(20, 12), Request(120, 9), Request(33, 1)]
    alone = answers(running_rows(side, models[side], checkpoint.plan), given, 1)
    assert [len(one) for one in alone] == [5, 12, 9, 1]
    assert len({tuple(one[:1]) for one in alone}) > 1
    assert answers(running_rows(side, models[side], checkpoint.plan), given, 3) == alone


def test_dense_rows_keep_no_more_than_the_windows_of_the_model() -> None:
    """Rows below the window of 80, beyond it, and that come beyond it join and leave."""
    model = tiny_model("gemma3_text")
    plan = Plan.full(model_shape(model))
    given = [Request(70, 30), Request(20, 25), Request(170, 9), Request(85, 3), Request(33, 70), Request(10, 12)]
    alone = answers(running_rows("dense", model, plan), given, 1)
    assert answers(running_rows("dense", model, plan), given, 3) == alone
    for prompt, found in zip(prompts_of(given), alone, strict=True):
        logits = model(input_ids=torch.cat([prompt, torch.tensor([found[:-1]])], 1), use_cache=False).logits[0]
        assert logits[prompt.shape[1] - 1 :].argmax(-1).tolist() == found
    rows = running_rows("dense", model, plan)
    for tokens in (200, 30):
        rows.add(torch.full((1, tokens), 5))
    rows.step([5, 5])
    held = [layer.keys.shape[2] for layer in rows.cache.layers]  # type: ignore[attr-defined]
    assert held == [201 if native is None else 79 for native in plan.model.native_windows]


def test_serving_a_checkpoint(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "serve.json"
    report = run_serving(compressed, SMALL, out=out)
    assert json.loads(out.read_text()) == report
    assert (report["runs"], report["break_even"]) == ([], [])
    dense, plan = report["serve"]
    assert [(row["side"], row["dtype"]) for row in (dense, plan)] == [("dense", "float32"), ("plan", "float32")]
    mix, kept = SMALL.requests(), stored_plan(compressed / "model").in_dtype("float32")
    for row in (dense, plan):
        assert row["requests"] == 6
        assert row["new_tokens"] == sum(one.new_tokens for one in mix)
        assert row["seconds"] > 0
        assert 1 <= row["running"]["most"] <= 6
        assert row["reserved_bytes"] <= row["kv_memory"] == 400_000
    assert plan["running"]["most"] > dense["running"]["most"]
    assert plan["running"]["mean"] > dense["running"]["mean"]
    assert dense["kernel"] is None
    assert min(kept.kv_bytes(one.tokens) for one in mix) <= plan["reserved_bytes"]

    monkeypatch.setattr(serve_benchmark, "load_checkpoint", None)  # nothing is measured twice
    out.unlink()
    assert run_serving(compressed, SMALL, out=out) == report
    with pytest.raises(ArtefactError, match="another configuration"):
        run_serving(compressed, replace(SMALL, count=7), out=out)


def test_serving_in_another_dtype_than_the_checkpoint_s(compressed: Path) -> None:
    sides = ("dense", "plan", "full_span")
    asked = replace(SMALL, dtypes=("bfloat16",), sides=sides)
    rows = run_serving(compressed, asked)["serve"]
    assert [(row["side"], row["dtype"], row["requests"]) for row in rows] == [(side, "bfloat16", 6) for side in sides]

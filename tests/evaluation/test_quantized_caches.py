"""transformers' quantized caches as compared models: scored as they are used, their memory counted, refused in clear words."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from moacompress.core.errors import UsageError
from moacompress.evaluation.baselines.compared_models import STOCK
from moacompress.evaluation.baselines.comparison import make_comparison
from moacompress.evaluation.baselines.quantized_caches import QUANTIZED, RESIDUAL, QuantizedKind, held_bytes, text_steps
from moacompress.evaluation.runner import evaluate
from moacompress.evaluation.scoring.prompts import score_batch
from moacompress.evaluation.scoring.text import read
from moacompress.evaluation.tasks.cases import Case
from moacompress.models.source import model_shape
from moacompress.runtime import attach
from moacompress.runtime.checkpoint import load_checkpoint
from moacompress.runtime.compat import versions
from moacompress.runtime.compat.alternates import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tests.evaluation.conftest import Models


@pytest.fixture(params=QUANTIZED)
def kind(request: pytest.FixtureRequest) -> QuantizedKind:
    """Every cache whose package is installed, and that this transformers has."""
    return there(request.param)


def there(name: str) -> QuantizedKind:
    """Returns a kind; skips where it cannot be used here, and says why."""
    try:
        QUANTIZED[name].check_installed()
    except UsageError as error:
        pytest.skip(str(error))
    return QUANTIZED[name]


@pytest.fixture
def model(tiny_model: Models) -> PreTrainedModel:
    """Of three KV heads, so that an odd number of tokens has an odd number of groups."""
    return tiny_model("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=192, num_hidden_layers=2)


def test_an_answer_is_scored_over_rounded_keys_and_values(
    kind: QuantizedKind, model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """As where the prompt is read and the answer comes token by token."""
    size = 201
    drawn = np.random.default_rng(size).integers(4, 100, size + 5).tolist()
    case = Case("t", size, drawn[:size], drawn[size:], [True] * 5, ("~~",), "all", 0)
    cut = (size - 1) // kind.unit * kind.unit
    ids, cache = torch.tensor([[*case.prompt_ids, *case.answer_ids]]), kind.new_cache(model)
    model(input_ids=ids[:, :cut], use_cache=True, **cache_argument(cache))
    steps = [
        model(input_ids=ids[:, at : at + 1], use_cache=True, **cache_argument(cache)).logits[0, -1]
        for at in range(cut, size + 4)
    ]
    rows = torch.stack(steps[-5:]).log_softmax(-1)
    expected = -float(rows[range(5), case.answer_ids].mean())
    (found,) = score_batch(model, tiny_tokenizer, [case], kind.new_cache(model), kind.unit)
    (dense,) = score_batch(model, tiny_tokenizer, [case])
    assert found.nll == pytest.approx(expected, abs=1e-4)
    assert abs(found.nll - dense.nll) > 1e-6


def test_text_is_read_as_it_would_be_generated(kind: QuantizedKind, model: PreTrainedModel) -> None:
    """In float64: in float32 another order of sums flips a code now and then."""
    model = model.double()
    window = np.random.default_rng(0).integers(4, 100, 300).tolist()
    states = read(model, window, kind.new_cache(model), text_steps(300)).states
    cache, decoder, parts = kind.new_cache(model), model.get_decoder(), []
    for ids in torch.tensor([window]).split([RESIDUAL, *[1] * (300 - RESIDUAL)], 1):
        parts.append(decoder(input_ids=ids, use_cache=True, **cache_argument(cache)).last_hidden_state[0])
    torch.testing.assert_close(states, torch.cat(parts), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(states[RESIDUAL:], read(model, window).states[RESIDUAL:], atol=1e-4)


@pytest.mark.parametrize("counted", ["what is brought", "one"])
def test_steps_of_text_round_when_tokens_would(counted: str) -> None:
    """Whether a version of transformers counts what an update brings or one token: 5.17 to 5.19 do the latter."""

    def unrounded(steps: list[int]) -> dict[int, int]:
        """Returns how many tokens are not rounded, by how many were read before."""
        seen, residual, read = {}, 0, 0
        for step in steps:
            full = residual > 0 and residual + (step if counted == "what is brought" else 1) >= RESIDUAL
            seen[read] = residual
            residual = 0 if full or read == 0 else residual + step  # the first of all are rounded as they come
            read += step
        return {**seen, read: residual}

    for tokens in (1, 100, 128, 129, 255, 256, 257, 700):
        first = min(tokens, RESIDUAL)
        one_by_one = unrounded([first, *[1] * (tokens - first)])
        steps = text_steps(tokens)
        assert sum(steps) == tokens
        assert unrounded(steps).items() <= one_by_one.items()


def test_its_bytes_are_those_of_its_tensors(
    kind: QuantizedKind, model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    shape = model_shape(model.bfloat16())
    tokens, last = 307, 6
    cache = kind.new_cache(model)
    first = (tokens - last) // kind.unit * kind.unit
    for size in (first, tokens - first):
        model(input_ids=torch.randint(4, 99, (1, size)), use_cache=True, **cache_argument(cache))
    found = kind.measured_bytes(model, shape, tokens, last)
    assert found == sum(held_bytes(vars(layer)) for layer in cache.layers)
    tensors, rows = 2 * shape.layers, shape.kv_heads * first  # a row of 64 numbers is a group
    codes = tensors * 64 * math.ceil(rows * (kind.bits or 8) / 8)
    numbers = tensors * shape.kv_heads * 64 * (tokens - first)
    if kind.bits is None:
        assert found == codes + numbers + 4 * tensors  # a scale in float32 for all keys of a layer, one for its values
    else:
        assert found == codes + 4 * tensors * rows + 2 * numbers  # a scale and a zero point of a group, in bfloat16


def test_a_row_beside_the_others(kind: QuantizedKind, compressed: Path) -> None:
    options: dict[str, Any] = {"lengths": (700,), "prompts": 3, "against": ("dense", kind.name)}
    report = evaluate(compressed, tasks=("needle-noise",), **options)
    rows = {(row["model"], row["metric"]): row for row in report["results"]}
    assert 0.2 < rows[kind.name, "nll"]["kv_bytes"] / rows["dense", "nll"]["kv_bytes"] < 0.6
    assert 0 < abs(rows[kind.name, "nll"]["value"] - rows["dense", "nll"]["value"]) < 0.5
    assert {row["model"] for row in report["differences"]} == {"dense", STOCK, kind.name}


def test_a_package_that_is_not_there(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    message = (
        r"^quantized:hqq-8 needs hqq\.core\.quantize, which cannot be imported \(.*\); install it with `pip install "
    )
    with pytest.raises(UsageError, match=message + r"'moacompress\[rivals\]'`$"):
        evaluate(compressed, against=("quantized:hqq-8",))


def test_one_that_this_transformers_does_not_have(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "INSTALLED", (5, 20))
    with pytest.raises(UsageError, match=r"^quantized:fp8 needs transformers 5\.21 or newer, and .* is installed"):
        evaluate(compressed, against=("quantized:fp8",))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quantized:fp8", "quantized:fp8 cannot be measured on this model: .*sliding_attention"),
        ("h2o", "^h2o cannot be measured on this model: its layers have sliding windows"),
    ],
)
def test_layers_with_windows_of_their_own(
    name: str, said: str, tiny_model: Models, tiny_tokenizer: Any, random_plan: Callable[..., Any], tmp_path: Path
) -> None:
    """Neither such a cache nor one that tokens are evicted from can hold them."""
    if name in QUANTIZED:
        there(name)
    model = tiny_model("gemma3_text")
    plan = random_plan(model_shape(model), seed=1)
    attach(model, plan).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    plan.save(tmp_path / "plan.json")
    comparison = make_comparison(load_checkpoint(tmp_path, "auto", "cpu"), (name,), None, True)
    with pytest.raises(UsageError, match=said):
        comparison.at(700, 8)

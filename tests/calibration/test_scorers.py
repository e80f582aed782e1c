"""Scores that gates can be fitted to: each against a plain computation, and what a profile does with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.gates.scorers import NEED_LATER, SCORERS, find_scorer, read_layers, scored_by
from moacompress.calibration.gates.training import FIRST, LAG, attention_inputs, target
from moacompress.calibration.profile.profiler import profile
from moacompress.core.errors import UsageError
from moacompress.models.source import load_source, model_shape
from moacompress.recipe import Recipe
from tests.calibration.conftest import GATES, random_sample, random_samples

if TYPE_CHECKING:
    from tests.calibration.conftest import Models

DIM = 16


def turned(vectors: Tensor, positions: Tensor) -> Tensor:
    """Turns `[..., n, dim]` by the rotary embedding of a Llama."""
    half = vectors.shape[-1] // 2
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    result = torch.complex(vectors[..., :half].double(), vectors[..., half:].double()) * torch.exp(1j * angles)
    return torch.cat([result.real, result.imag], -1)


def projected(model: Any, sample: Sample) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns queries, keys and values of every layer before the rotary embedding, from the weights."""
    ids = torch.from_numpy(sample.input_ids)[None]
    states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    found = []
    for layer, state in zip(model.model.layers, states, strict=False):
        given, own = layer.input_layernorm(state)[0], layer.self_attn
        parts = (part(given).view(len(given), -1, DIM).transpose(0, 1) for part in (own.q_proj, own.k_proj, own.v_proj))
        found.append(tuple(each.double() for each in parts))
    return found  # type: ignore[return-value]


def test_value_norm_and_running_keydiff(tiny_model: Models) -> None:
    model, sample = tiny_model("llama"), random_sample(90)
    by_norm, by_key = (
        scored_by(SCORERS[name](), model, model_shape(model), [sample])(0) for name in ("value-norm", "keydiff")
    )
    for layer, (_, key, value) in enumerate(projected(model, sample)):
        key = turned(key, torch.arange(key.shape[1]))
        for head in range(2):
            torch.testing.assert_close(
                torch.tensor(by_norm[layer, head]).double(), value[head].norm(dim=-1), rtol=1e-4, atol=1e-6
            )
            for at in (0, 1, 30, 89):
                mean = sum(each / each.norm() for each in key[head, : at + 1])
                assert isinstance(mean, Tensor)
                cosine = float(key[head, at] @ mean / key[head, at].norm() / mean.norm())
                assert by_key[layer, head, at] == pytest.approx(1 - cosine, abs=1e-4)


def test_expected_attention_of_calibrations_queries(tiny_model: Models) -> None:
    model, samples = tiny_model("llama"), [random_sample(90), random_sample(70, seed=10)]
    found = scored_by(SCORERS["expected-attention"](), model, model_shape(model), samples)(1)
    both = [projected(model, sample) for sample in samples]
    for layer in range(3):
        queries = []
        for sample, parts in zip(samples, both, strict=True):
            query, steps = parts[layer][0], len(sample.input_ids) - 1
            turns = [turned(query, torch.full((query.shape[1],), step)) for step in range(1, steps + 1)]
            queries.append(torch.stack(turns).mean(0)[:, 4:])
        query = torch.cat(queries, 1)
        _, key, value = both[1][layer]
        for head in range(2):
            total = torch.zeros(key.shape[1], dtype=torch.float64)
            for own in (2 * head, 2 * head + 1):
                mean, covariance = query[own].mean(0), torch.cov(query[own].T, correction=0)
                raw = [math.exp(k @ mean / math.sqrt(DIM) + k @ covariance @ k / (2 * DIM)) for k in key[head]]
                total += torch.tensor(raw, dtype=torch.float64)
            expected = total * value[head].norm(dim=-1)
            ours = torch.tensor(found[layer, head]).double()
            torch.testing.assert_close(ours / ours.sum(), expected / expected.sum(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_what_is_said_of_a_token_does_not_depend_on_later_ones(name: str, tiny_model: Models) -> None:
    model, sample, scorer = tiny_model("llama"), random_sample(90, seed=1), SCORERS[name]()
    shape = model_shape(model)
    prepared = scorer.prepare(iter([read_layers(model, shape, random_sample(90, seed=2))]))
    whole = read_layers(model, shape, sample)
    first = Sample(sample.input_ids[:80], np.arange(80) > 70, "test", 600)
    for layer, (one, other) in enumerate(zip(whole, read_layers(model, shape, first), strict=True)):
        found = [scorer.importance(layer, tokens, prepared)[:, :80] for tokens in (one, other)]
        mine, theirs = (each / each[:, 40:41] for each in found)  # one factor for all tokens does not matter
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["phi3", "smollm3", "gemma3_text", "gpt_neox"])
def test_other_families(family: str, tiny_model: Models) -> None:
    model = tiny_model(family)
    for kind in SCORERS.values():
        found = scored_by(kind(), model, model_shape(model), random_samples(0, 2, 90))(0)
        assert np.isfinite(found).all()
        assert (found >= 0).all()


def test_unknown_scorers_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    assert find_scorer("influence") is None
    later = {name: f"no gate can be fitted to {name}: .*" for name in NEED_LATER}
    for name, said in {**later, "zzzz": "unknown scorer 'zzzz'"}.items():
        with pytest.raises(UsageError, match=f"^{said}; scorers are influence, value-norm, keydiff, expected-att"):
            find_scorer(name)
    recipe = Recipe.model_validate({"model": str(tiny_folder), **GATES}).override(profile__scorer="keydif")
    with pytest.raises(UsageError, match="^unknown scorer 'keydif'; did you mean 'keydiff'"):
        profile(str(tiny_folder), tmp_path / "profile", recipe)
    assert not (tmp_path / "profile").exists()


def test_a_profile_selects_by_gates_that_are_fitted_to_a_score(tiny_folder: Path, tmp_path: Path) -> None:
    source = load_source(tiny_folder)
    recipe = Recipe.model_validate({"model": str(tiny_folder), **GATES}).override(profile__scorer="value-norm")
    made_by = profile(source, tmp_path / "norm", recipe)
    gates = made_by.gates
    assert gates is not None
    assert gates.report["scorer"] == "value-norm"
    (row, *_) = gates.report["left"]
    assert row["oracle"][0] <= row["gate"][0] < row["recency"][0]
    by_influence = profile(source, tmp_path / "influence", recipe.override(profile__scorer="influence"))
    assert by_influence.gates is not None
    assert "scorer" not in by_influence.gates.report
    assert by_influence.gates_fingerprint != made_by.gates_fingerprint
    assert by_influence.fingerprint != made_by.fingerprint
    sample = made_by.calibration_samples()[0]
    norms = scored_by(SCORERS["value-norm"](), source.model, source.shape, [sample])(0)
    fits = []
    for layer, inputs in attention_inputs(source.model, sample, range(source.shape.layers)):
        wanted = target(torch.from_numpy(norms[layer]))
        scores = inputs[:, :-1] @ torch.from_numpy(gates.weights.weight[layer]).T
        fits += [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(scores.T, wanted, strict=True)]
    assert len(sample.input_ids) > FIRST + LAG
    assert np.mean(fits) > 0.3

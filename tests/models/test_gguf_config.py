"""What transformers does not read of .gguf files: in the config, so that it computes as the file says; or refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from moacompress.core.errors import ModelError
from moacompress.models.gguf_config import FREQUENCIES, complete_config, llama3_factors
from moacompress.models.source import load_source
from tests.weight_blocks import types_of, write_gguf

pytest.importorskip("gguf")

BLOCKS = types_of("Q8_0")
PLAIN = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
"""What a head of 64 numbers turns by in a position, without scaling."""


def scaling(kind: str, **rest: str | int | float) -> dict[str, Any]:
    return {f"rope.scaling.{key}": value for key, value in {"type": kind, **rest}.items()}


def turns(file: Any, weights: str = "keep") -> torch.Tensor:
    return load_source(file, dtype="float32", weights=weights).model.model.rotary_emb.inv_freq


@pytest.mark.parametrize("weights", ["keep", "dense"])
def test_frequencies_of_llama_3(weights, tmp_path):
    """As the file divides them; transformers makes them from the numbers that were found again."""
    for number, (factor, length) in enumerate([(32.0, 8192), (4.0, 2048)]):
        factors = llama3_factors(10000.0, 64, factor, length).astype(np.float32)
        assert len({*factors.tolist()}) > 3
        file = write_gguf(tmp_path / f"{number}.gguf", BLOCKS, more={FREQUENCIES: factors})
        torch.testing.assert_close(turns(file, weights) * torch.from_numpy(factors), PLAIN, rtol=1e-5, atol=0)
    config = load_source(file, dtype="float32").model.config
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["original_max_position_embeddings"] == 2048


def test_frequencies_of_a_published_model():
    """Llama 3.1's: of 64 frequencies 29 turn more than four times in 8,192 tokens, and as many less than once."""
    factors = llama3_factors(500000.0, 128, 8.0, 8192)
    assert ((factors == 1).sum(), (factors == 8).sum()) == (29, 29)


@pytest.mark.parametrize(
    "keys",
    [
        scaling("linear", factor=8.0),
        {"rope.scaling.factor": 8.0},
        {"rope.scale_linear": 8.0},
        {**scaling("linear"), "rope.scale_linear": 8.0},
        {"rope.scaling.factor": 8.0, "rope.scale_linear": 2.0},
    ],
)
def test_linear_scaling(keys, tmp_path):
    """In all forms that llama.cpp takes for it."""
    file = write_gguf(tmp_path / "tiny.gguf", BLOCKS, keys=keys)
    torch.testing.assert_close(turns(file) * 8, PLAIN)


def test_windows_of_a_models_own_are_not_scaled(tmp_path):
    given = scaling("linear", factor=8.0)
    file = write_gguf(tmp_path / "tiny.gguf", BLOCKS, architecture="gemma3", layers=6, keys=given)
    for weights in ("keep", "dense"):
        model = load_source(file, dtype="float32", weights=weights).model.model
        torch.testing.assert_close(model.rotary_emb.full_attention_inv_freq * 8, PLAIN)
        torch.testing.assert_close(model.rotary_emb.sliding_attention_inv_freq, PLAIN)
        assert model.layers[0].self_attn.scaling == 64**-0.5


def test_yarn(tmp_path):
    given = scaling("yarn", factor=4.0, original_context_length=1024, yarn_beta_fast=16.0, yarn_ext_factor=-1.0)
    loaded = load_source(write_gguf(tmp_path / "tiny.gguf", BLOCKS, keys=given), dtype="float32").model
    assert loaded.config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 16.0,
    }
    rotary = loaded.model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    torch.testing.assert_close((PLAIN / rotary.inv_freq)[[0, -1]], torch.tensor([1.0, 4.0]))


@pytest.mark.parametrize(
    ("keys", "factors"),
    [
        (scaling("none"), None),
        (scaling("none", factor=8.0), None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scale_linear": 0.0}, None),
        ({}, np.ones(32, np.float32)),
    ],
)
def test_what_scales_nothing(keys, factors, tmp_path):
    more = None if factors is None else {FREQUENCIES: factors}
    file = write_gguf(tmp_path / "tiny.gguf", BLOCKS, keys=keys, more=more)
    torch.testing.assert_close(turns(file), PLAIN)


@pytest.mark.parametrize(
    ("keys", "more", "match"),
    [
        (scaling("longrope"), {}, "by 'longrope', and only linear and yarn"),
        (scaling("linear"), {}, "rope.scaling.factor = None, and it must be above 0"),
        (scaling("linear", factor=-2.0), {}, "rope.scaling.factor = -2.0"),
        (scaling("linear", factor=float("nan")), {}, "rope.scaling.factor = nan"),
        (scaling("yarn", factor=4.0), {}, "original_context_length = None"),
        (scaling("yarn", factor=4.0, original_context_length=64, attn_factor=2.0), {}, "attn_factor = 2.0, which"),
        ({}, {FREQUENCIES: np.linspace(1, 32, 32, dtype=np.float32)}, "not those of Llama 3's scaling"),
        ({}, {FREQUENCIES: np.full(32, np.nan, np.float32)}, "not those of Llama 3's scaling"),
        ({}, {"rope_factors_long.weight": np.ones(32, np.float32)}, "factors of LongRoPE"),
        ({}, {"blk.0.attn_q.bias": np.ones(256, np.float32)}, "holds 1 tensors .* such as blk.0.attn_q.bias"),
    ],
)
def test_refusals(keys, more, match, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", BLOCKS, keys=keys, more=more)
    for weights in ("keep", "dense"):
        with pytest.raises(ModelError, match=rf"tiny\.gguf.*{match}"):
            load_source(file, dtype="float32", weights=weights)


@pytest.mark.parametrize(("family", "largest"), [("gemma2", 46), ("gemma3_text", 62)])
def test_scores_of_gemmas_largest_models_are_divided_by_their_width(family, largest):
    """As llama.cpp does it; those of the others by the size of a key, whatever transformers' default is."""
    nothing = SimpleNamespace(fields={}, tensors=[])
    for layers, scalar in ((26, 96), (largest, 64)):
        config = AutoConfig.for_model(
            family, num_hidden_layers=layers, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=96
        )
        complete_config(config, nothing, Path("gemma.gguf"))
        assert config.query_pre_attn_scalar == scalar

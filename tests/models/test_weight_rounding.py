"""Weights rounded to blocks: the codes nearest with the stored scale, and which layers they are of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moacompress.core.errors import ModelError, RecipeError
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, dequantized
from moacompress.models.block_layers import BlockEmbedding, BlockLinear, weight_types
from moacompress.models.source import load_source
from moacompress.models.weight_rounding import ROUNDED, SHARES, round_weights, rounded
from moacompress.recipe import Recipe
from tests.weight_blocks import SIZE, random_blocks, types_of, write_gguf

KINDS = [WEIGHT_TYPES[name] for name in ROUNDED.values()]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@every_kind
def test_every_number_is_a_nearest_one(kind):
    weight = torch.randn(40, 96) * torch.logspace(-4, 3, 40)[:, None]
    blocks = rounded(weight, kind)
    assert (blocks.dtype, blocks.shape) == (torch.uint8, (40, kind.row_bytes(96)))
    found = dequantized(blocks, kind)
    apart = (found - weight).abs().unflatten(1, (3, 32))
    parted = weight.unflatten(1, (3, 32))
    spread = (parted.amax(-1) - parted.amin(-1)).clamp(min=1e-6)
    if kind.name == "Q8_0":
        limit = parted.abs().amax(-1) / 127 * 0.51 + parted.abs().amax(-1) * 1e-3
    else:
        limit = spread / 15 * 0.51 + spread * (1 - min(SHARES)) + spread * 2e-2
    coarse = 127 * 2**-24  # where scales are below the normal numbers of float16
    assert bool((apart.amax(-1) <= 1.2 * limit + coarse).all())
    assert torch.equal(rounded(found, kind), rounded(dequantized(rounded(found, kind), kind), kind))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
def test_errors_are_no_larger_than_gguf_s(name):
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(64, 256)
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    kind = WEIGHT_TYPES[name]
    ours, expected = (
        float((dequantized(blocks, kind) - weight).square().sum())
        for blocks in (rounded(weight, kind), torch.from_numpy(np.array(theirs)))
    )
    assert ours <= 1.001 * expected


@every_kind
def test_what_is_in_blocks_already_is_given_back(kind):
    blocks = random_blocks(kind, 30, inputs=256, scale=SIZE[kind.name])
    numbers = dequantized(blocks, kind)
    found = dequantized(rounded(numbers, kind), kind)
    assert float((found - numbers).square().sum()) < 2e-3 * float(numbers.square().sum())


@every_kind
def test_the_ends_of_what_there_is(kind, monkeypatch):
    assert not dequantized(rounded(torch.zeros(2, 32), kind), kind).any()
    assert torch.allclose(dequantized(rounded(torch.full((1, 32), 0.5), kind), kind), torch.tensor(0.5), rtol=2e-3)
    assert dequantized(rounded(torch.full((1, 32), 1e-30), kind), kind).isfinite().all()
    for bad in (float("nan"), float("inf"), 1e6):
        with pytest.raises(ModelError, match="not finite, or too large for blocks"):
            rounded(torch.full((1, 32), bad), kind)
    weight = torch.randn(9, 64)
    whole = rounded(weight, kind)
    monkeypatch.setattr("moacompress.models.weight_rounding.NUMBERS_AT_ONCE", 128)
    assert torch.equal(rounded(weight, kind), whole)


@pytest.mark.parametrize(("weights", "family"), [("int8", "llama"), ("int4", "gemma3_text"), ("int8", "gpt_neox")])
def test_linear_layers_are_rounded_and_ends_where_asked(weights, family, tiny_model):
    ids, small = torch.arange(60)[None] % 150, {"initializer_range": 0.02}  # larger ones make attention jump
    expected = tiny_model(family, **small)(ids).logits
    model = tiny_model(family, **small)
    round_weights(model, weights)
    types = weight_types(model)
    assert set(types.values()) == {ROUNDED[weights]}
    assert not isinstance(model.get_input_embeddings(), BlockEmbedding)
    assert not isinstance(model.get_output_embeddings(), BlockLinear)
    assert all(type(module) is not torch.nn.Linear for name, module in model.base_model.named_modules())
    apart = float((model(ids).logits - expected).abs().max() / expected.abs().max())
    assert 0 < apart < {"int8": 0.03, "int4": 0.6}[weights]
    both = tiny_model(family)
    round_weights(both, weights, "int8")
    assert isinstance(both.get_input_embeddings(), BlockEmbedding)
    assert isinstance(both.get_output_embeddings(), BlockLinear)
    tied = both.get_input_embeddings().weight is both.get_output_embeddings().weight
    assert tied == bool(both.all_tied_weights_keys)


def test_layers_that_are_no_whole_blocks_stay(tiny_model):
    model = tiny_model("llama", intermediate_size=90)
    round_weights(model, "int8")
    assert not any("down_proj" in name for name in weight_types(model))
    assert any("up_proj" in name for name in weight_types(model))


def test_a_source_is_rounded_as_it_is_loaded(tiny_folder, tmp_path):
    pytest.importorskip("gguf")
    rounded_source, plain = load_source(tiny_folder, weights="int8", head_weights="int4"), load_source(tiny_folder)
    assert set(weight_types(rounded_source.model).values()) == {"Q8_0", "Q4_1"}
    assert rounded_source.shape.weights_fingerprint != plain.shape.weights_fingerprint
    file = write_gguf(tmp_path / "tiny.gguf", types_of("Q4_1", attn_v="Q6_K"))
    types = weight_types(load_source(file, weights="int8").model)
    assert set(types.values()) == {"Q8_0"}
    assert "lm_head" not in types


@pytest.mark.parametrize("dtype", ["float16"])
def test_numbers_are_rounded_before_they_lose_bits(dtype, tiny_folder):
    """Else the same weights would be others where a model is profiled, or healed, in another dtype than it is stored in."""
    stored, narrow = (
        load_source(tiny_folder, dtype=name, weights="int4", head_weights="int8") for name in ("auto", dtype)
    )
    types = weight_types(stored.model)
    assert weight_types(narrow.model) == types
    assert (stored.computes_in, narrow.computes_in) == ("float32", dtype)
    assert narrow.shape.weights_fingerprint == stored.shape.weights_fingerprint
    for name in types:
        assert torch.equal(narrow.model.get_parameter(f"{name}.weight"), stored.model.get_parameter(f"{name}.weight"))
    ids = torch.arange(3, 40)[None]
    logits = narrow.model(ids).logits
    assert logits.dtype == getattr(torch, dtype)
    assert (logits.float() - stored.model(ids).logits).abs().mean() < 0.05 * logits.float().std()


def test_a_head_is_rounded_with_the_rest_alone():
    with pytest.raises(RecipeError, match="head_weights is int8 but weights is keep"):
        Recipe.from_dict({"head_weights": "int8"})

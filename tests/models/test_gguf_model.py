"""A .gguf file whose weights stay in blocks: the same numbers and the same logits as when transformers dequantizes it."""

from __future__ import annotations

import logging
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from moacompress.core.errors import ModelError
from moacompress.core.tables import readable_bytes
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, dequantized
from moacompress.models import support
from moacompress.models.block_layers import BlockEmbedding, BlockLinear, block_weights, weight_types
from moacompress.models.skeleton import load_config
from moacompress.models.source import load_source
from moacompress.models.weight_files import gguf_problems
from tests.weight_blocks import random_blocks, types_of, write_gguf

pytest.importorskip("gguf")

MIXED = types_of(
    "Q4_1", token_embd="Q8_0", attn_k="Q4_0", attn_v="Q5_0", ffn_down="Q6_K", ffn_up="Q4_K", attn_output="Q5_K"
)
assert {*MIXED.values()} == {*WEIGHT_TYPES}
TOKENS = torch.arange(40)[None] * 7 % 320


def both(file: Path, dtype: str = "float32"):
    """The model with blocks, and the one that transformers dequantizes."""
    kept = load_source(file, dtype=dtype, weights="keep")
    return kept, load_source(file, dtype=dtype, weights="dense")


def check_same(kept, dense) -> None:
    kinds, numbers = block_weights(kept.model), dense.model.state_dict()
    assert kinds
    for name, tensor in kept.model.state_dict().items():
        if name in kinds:
            assert tensor.dtype == torch.uint8
            tensor = dequantized(tensor, kinds[name], kept.model.dtype)
        assert torch.equal(tensor, numbers[name]), name
    assert numbers.keys() == kept.model.state_dict().keys()
    assert kept.shape == dense.shape
    found, expected = kept.model(TOKENS).logits, dense.model(TOKENS).logits
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert kept.model.config.to_dict() == dense.model.config.to_dict()


@pytest.mark.parametrize(("architecture", "head"), [("llama", None), ("qwen2", "Q6_K"), ("gemma3", "Q6_K")])
def test_numbers_and_logits_are_those_of_the_dequantized_model(architecture, head, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", MIXED, architecture=architecture, head=head)
    kept, dense = both(file)
    check_same(kept, dense)
    tied = kept.model.lm_head.weight is kept.model.model.embed_tokens.weight
    assert tied == (head is None)
    assert isinstance(kept.model.lm_head, BlockLinear)
    assert isinstance(kept.model.model.embed_tokens, BlockEmbedding)
    assert len(weight_types(kept.model)) == 2 * 7 + 2
    floats = [name for name, tensor in kept.model.named_parameters() if tensor.is_floating_point()]
    assert all("norm" in name or "bias" in name for name in floats)


def test_sizes_are_checked_before_a_layer_is_built(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", MIXED)
    monkeypatch.setattr(support, "MAX_LAYERS", 1)
    monkeypatch.setattr("moacompress.models.source.load_gguf", None)
    for weights in ("keep", "dense"):
        with pytest.raises(ModelError, match=r"tiny\.gguf cannot be used: .*layers"):
            load_source(file, weights=weights)


def test_a_dtype_is_what_is_computed_in(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", MIXED, architecture="gemma3")
    kept, dense = both(file, "auto")
    assert kept.shape.dtype == kept.computes_in == "bfloat16"
    assert kept.model(TOKENS).logits.dtype == torch.bfloat16
    assert kept.model.model.embed_tokens(TOKENS).dtype == torch.bfloat16
    assert torch.equal(kept.model.model.embed_tokens(TOKENS), dense.model.model.embed_tokens(TOKENS))
    assert kept.shape == dense.shape
    before = kept.model.lm_head.weight.clone()
    wide, half = kept.model.float()(TOKENS).logits, kept.model.half()(TOKENS).logits
    assert (wide.dtype, half.dtype) == (torch.float32, torch.float16)
    assert torch.equal(kept.model.lm_head.weight, before)


def test_plain_numbers_in_the_file_stay_plain(tmp_path, caplog):
    types = types_of("Q8_0", attn_q="F32", ffn_gate="F32")
    with caplog.at_level(logging.WARNING, "moacompress"):
        kept, dense = both(write_gguf(tmp_path / "tiny.gguf", types))
    check_same(kept, dense)
    assert not caplog.messages
    assert type(kept.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_other_types_become_floats_after_one_warning(tmp_path, caplog, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", types_of("Q4_1", attn_v="Q5_0", ffn_up="Q4_K"))
    monkeypatch.delitem(WEIGHT_TYPES, "Q5_0")
    monkeypatch.delitem(WEIGHT_TYPES, "Q4_K")
    monkeypatch.setattr("moacompress.models.gguf_model.NUMBERS_AT_ONCE", 256 * 3)
    with caplog.at_level(logging.WARNING, "moacompress"):
        kept, dense = both(file)
    check_same(kept, dense)
    (said,) = caplog.messages
    numbers = 2 * (128 + 512) * 256 * 4
    assert f"4 weights of tiny.gguf are turned into float32, {readable_bytes(numbers)}: " in said
    assert "2 of type Q4_K (no compiled kernel multiplies with them); 2 of type Q5_0" in said


def test_an_architecture_that_is_not_known_is_left_to_transformers(tmp_path, caplog, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", types_of("Q8_0"))
    monkeypatch.setattr("moacompress.models.gguf_model.ARCHITECTURES", {})
    with caplog.at_level(logging.WARNING, "moacompress"):
        model = load_source(file, weights="keep").model
    assert not weight_types(model)
    assert "of the architecture llama blocks are not read as they are" in caplog.text


def test_what_does_not_fit_is_refused(tmp_path):
    kind = WEIGHT_TYPES["Q8_0"]
    narrow = random_blocks(kind, 512, inputs=128).numpy()
    file = write_gguf(tmp_path / "lost.gguf", types_of("Q8_0"), **{"blk.1.ffn_up.weight": None})
    with pytest.raises(ModelError, match=r"lacks weights of the model, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_source(file, weights="keep")
    changed = {"blk.1.ffn_up.weight": narrow.astype(np.float32)}
    file = write_gguf(tmp_path / "narrow.gguf", types_of("Q8_0"), **changed)
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight of shape \[512, 136\], the model needs \[512, 256\]"):
        load_source(file, weights="keep")


def test_a_file_is_read_once(tmp_path, monkeypatch):
    import gguf

    file, kind, made = write_gguf(tmp_path / "tiny.gguf", MIXED), gguf.GGUFReader, []
    real = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, *args: (made.append(args), real(self, *args))[1])
    for weights in ("keep", "dense"):
        before = len(made)
        load_source(file, weights=weights)
        assert len(made) == before + 1
        assert gguf.GGUFReader is kind
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="damaged"):
        load_source(damaged)
    assert gguf.GGUFReader is kind


def test_a_header_that_names_more_than_the_file_has(tmp_path):
    """Of a list of bytes the package reads one after the other, whether there are any: 2**40 of them take all memory."""
    file = tmp_path / "hostile.gguf"
    key = b"general.architecture"
    fields = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 10**6)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fields)
    for read, said in ((load_source, "the file ends before what its header says is at byte 68"), (load_config, "68")):
        with pytest.raises(ModelError, match=said):
            read(str(file))
    with pytest.raises(ValueError, match="the file ends before what its header says is at byte 68"):
        gguf_problems(file)


def test_threads_read_files_of_their_own(tmp_path):
    """One after the other, and what a thread puts back is not what another has put there."""
    import gguf

    kind, names = gguf.GGUFReader, gguf.get_tensor_name_map
    files = [write_gguf(tmp_path / f"{head}.gguf", MIXED, head=head) for head in (None, "Q6_K")]
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_source, files * 2))
    assert [model.model.config.tie_word_embeddings for model in loaded] == [True, False] * 2
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (kind, names)


@pytest.mark.real
@pytest.mark.heavy
def test_smollm2_is_the_dequantized_model(request):
    from tests.conftest import ROOT

    file = next(iter(sorted((ROOT / ".cache").glob("**/SmolLM2-135M-Instruct*.gguf"))))
    kept, dense = both(file)
    check_same(kept, dense)
    assert sum(tensor.nbytes for tensor in {p.data_ptr(): p for p in kept.model.parameters()}.values()) < 100e6


@pytest.mark.real
@pytest.mark.heavy
def test_gemma_is_the_dequantized_model(gemma):
    kept, dense = both(gemma)
    check_same(kept, dense)

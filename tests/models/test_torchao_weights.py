"""Sources that torchao quantized: read as floats where torchao is there, and refused by name where it is not."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moacompress.core.errors import ModelError
from moacompress.core.files import read_json, write_json
from moacompress.doctor.checks import check_model
from moacompress.exporter.exporting import export
from moacompress.models.block_layers import weight_types
from moacompress.models.source import load_source
from moacompress.models.support import TORCHAO
from moacompress.models.torchao_weights import _numbers

needs_torchao = pytest.mark.skipif(importlib.util.find_spec(TORCHAO) is None, reason="needs the package torchao")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"quant_method": TORCHAO, "quant_type": "int8_weight_only"}, r"torchao.*pip install 'moacompress\[torchao\]'"),
        ({"quant_method": "gptq", "bits": 4}, "gptq.*float weights"),
    ],
)
def test_a_method_that_cannot_be_read_is_refused_with_the_fix(method, said, tiny_folder, tmp_path, monkeypatch):
    marked, found = Path(shutil.copytree(tiny_folder, tmp_path / "marked")), importlib.util.find_spec
    write_json(marked / "config.json", {**read_json(marked / "config.json", "config"), "quantization_config": method})
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == TORCHAO else found(name, *more)
    )
    with pytest.raises(ModelError, match=f"quantized by {said}"):
        load_source(marked)


@pytest.fixture
def quantized(tiny_folder, tiny_tokenizer, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    folder = tmp_path / "quantized"
    asked = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16, quantization_config=asked)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder, model.eval()


@needs_torchao
def test_it_is_read_as_the_floats_that_it_stands_for(quantized, caplog):
    folder, theirs = quantized
    with caplog.at_level(logging.WARNING):
        source = load_source(folder)
    assert "21 weights are quantized by torchao" in caplog.text
    assert source.shape.dtype == "bfloat16"
    for name, parameter in source.model.named_parameters():
        other = theirs.get_parameter(name)
        assert type(parameter) is torch.nn.Parameter
        assert torch.equal(parameter, other.dequantize() if hasattr(other, "qdata") else other), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, wanted = source.model(ids).logits.float(), theirs(ids).logits.float()
    assert float((ours - wanted).square().mean()) < 1e-3 * float(wanted.var())  # their scale is applied to the product
    assert load_source(folder).shape == source.shape
    assert check_model(str(folder))["problems"] == []


@needs_torchao
def test_it_is_exported_as_floats_or_rounded_again(quantized, random_plan, tmp_path):
    folder, _ = quantized
    plan = random_plan(load_source(folder).shape, seed=2)
    out = export(folder, plan, tmp_path / "floats")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    rounded = load_source(folder, weights="int8")
    assert set(weight_types(rounded.model).values()) == {"Q8_0"}
    apart = load_source(folder).model.lm_head.weight - rounded.model.lm_head.weight
    assert float(apart.abs().max()) == 0  # the output layer is rounded by head_weights alone


def test_a_type_without_numbers_is_named():
    said = r"model.a.weight is a object of torchao, which gives no numbers back; .* --weights int4"
    with pytest.raises(ModelError, match=said):
        _numbers("model.a.weight", object())

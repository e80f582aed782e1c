"""What weights are counted to take: of models against their parameters, and in a checkpoint against files."""

from __future__ import annotations

import pytest

from moacompress.models.source import load_source
from moacompress.models.weight_bytes import (
    checkpoint_weight_bytes,
    loaded_weight_bytes,
    most_checkpoint_bytes,
    weight_bytes,
)


def test_parameters_count_once(family, tiny_model):
    model = tiny_model(family)
    assert weight_bytes(model) == {"float32": sum(parameter.nbytes for parameter in model.parameters())}


@pytest.mark.parametrize(("weights", "head"), [("keep", None), ("int8", None), ("int4", "int8")])
def test_files_take_at_most_what_is_counted(weights, head, tiny_folder, tmp_path):
    source = load_source(tiny_folder, weights=weights, head_weights=head)
    source.model.save_pretrained(tmp_path)
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    most = most_checkpoint_bytes(source.model, source.shape.dtype)
    assert stored <= most < stored + 32 * 1024
    assert most_checkpoint_bytes(source.model, "bfloat16") < most
    sizes = weight_bytes(source.model)
    assert checkpoint_weight_bytes(tmp_path)["float32"] == sizes["float32"]
    assert loaded_weight_bytes(tmp_path, "float32") == sum(sizes.values())
    assert loaded_weight_bytes(tmp_path, "bfloat16") == sum(sizes.values()) - sizes["float32"] // 2

"""What is known of MODEL from its config, beside what loading it would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moacompress.models.skeleton import DescribedModel, is_dense_model
from moacompress.models.source import load_source
from tests.weight_blocks import types_of, write_gguf


def test_a_folder_without_its_weights(tiny_folder: Any, tmp_path: Path) -> None:
    folder = Path(tiny_folder)
    loaded = load_source(folder)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert is_dense_model(bare)
    found = DescribedModel.of(str(bare))
    assert found.shape.dense_kv_bytes(1024) == loaded.shape.dense_kv_bytes(1024)
    assert found.shape.dtype == loaded.shape.dtype
    assert found.weight_bytes == sum(weight.nbytes for weight in loaded.model.parameters())
    assert found.context == loaded.context


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_gguf_file(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    keys: dict[str, Any] = {"attention.sliding_window": 64} if architecture == "gemma3" else {}
    file = write_gguf(tmp_path / "tiny.gguf", types_of("Q8_0"), architecture=architecture, layers=6, keys=keys)
    found, loaded = DescribedModel.of(str(file)), load_source(file)
    assert is_dense_model(file)
    assert found.shape.native_windows == loaded.shape.native_windows
    assert (found.shape.dtype, found.shape.kv_heads) == (loaded.shape.dtype, loaded.shape.kv_heads) == ("bfloat16", 2)
    assert any(found.shape.native_windows) == (architecture == "gemma3")
    assert found.weight_bytes == file.stat().st_size

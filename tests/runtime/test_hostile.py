"""Plans and checkpoints that are not trusted: refused in one sentence, before memory is taken, and nothing is unpickled."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from moacompress.core.errors import MoaCompressError
from moacompress.doctor.checks import check_model
from moacompress.models.source import load_source
from moacompress.models.weight_files import checkpoint_files
from moacompress.report.inspection import inspect_plan
from moacompress.rules import plan_form
from moacompress.rules.plan import Plan
from moacompress.runtime.checkpoint import load_checkpoint

WEIGHT = "model.layers.1.mlp.up_proj.weight"
MiB = 2**20


@pytest.fixture
def folder(tmp_path: Path, compressed: Path) -> Path:
    """A compressed tiny Llama, whole."""
    return shutil.copytree(compressed / "model", tmp_path / "model")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def loaded(folder: Path) -> Any:
    """As our own commands load it."""
    return load_checkpoint(folder, "auto", "cpu")


def refuses(folder: Path, match: str, load: Callable[[Path], Any] = AutoModelForCausalLM.from_pretrained) -> None:
    with pytest.raises(MoaCompressError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def in_plan(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        target = config["quantization_config"]["plan"]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


ALPHAS: tuple[Any, ...] = (10**30, -1, 1.5, float("nan"), True, "7", None, [7])
PLANS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    *((in_plan("layers", 1, "alpha", 0, value=value), "alpha of layer 1 KV head 0") for value in ALPHAS),
    (in_plan("layers", 1, "beta_q", 1, value=-512), "beta_q of layer 1 KV head 1 is -512"),
    (in_plan("min_window", value=-32), "min_window is -32"),
    (in_plan("model", "heads", value=[-4] * 3), "model.heads of layer 0 is -4"),
    (in_plan("model", "kv_heads", value=[10**9] * 3), "model.kv_heads of layer 0 is 1000000000, outside"),
    (
        in_plan("layers", 1, "key_centre", value=["A" * 10**6, None]),
        "key_centre of layer 1 KV head 0 must be a text of at most",
    ),
    (in_plan("model", "native_windows", value=[-1, None, None]), "native_windows of layer 0 is -1"),
    (in_plan("model", "layers", value=10**9), "model.layers is 1000000000, outside"),
    (in_plan("model", "layers", value=4000), "kv_heads has 3 entries, not 4000"),
    (in_plan("layers", value=[{}] * 3000), "layers has 3000 entries, not 3"),
    (
        in_plan("layers", 1, value={f"x{i}": 0 for i in range(10**5)}),
        "layer 1 has the unknown key 'x0'; known are layer, sink,",
    ),
    (in_plan("quality", value=deep(80)), "quality must be an object of finite numbers and texts, at most 64 deep"),
    (in_plan("provenance", value={"a": "x" * 70_000}), "provenance must be .* and 65,536 numbers and characters"),
    (in_plan("budget", value={"asked": 5}), "budget.asked must be a list, not '5'"),
    (in_plan("budget", value={"bytes": {"-1": {}}}), "budget.bytes must be an object of lengths"),
    (in_plan("provenance", value={"lengths": [10**30]}), "a length in provenance.lengths is"),
    (lambda config: config["quantization_config"].update(bits=4), "quantization_config has the unknown key 'bits'"),
    (lambda config: config.update(num_hidden_layers=5000), "num_hidden_layers 5000, outside"),
    (lambda config: config.update(num_hidden_layers=2), "it is for 3 layers, and this model has 2 layers"),
    (lambda config: config.update(sliding_window=9, model_type="mistral"), "it is for the model type llama"),
    (
        lambda config: config.update(num_key_value_heads=4),
        "it is for 2 KV heads a layer, and this model has 4 KV heads",
    ),
]


@pytest.mark.parametrize(("change", "match"), PLANS, ids=range(len(PLANS)))
def test_a_hostile_plan_or_config(change: Any, match: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(folder, change)
    from transformers import LlamaForCausalLM

    def build(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", build)
    monkeypatch.setattr(plan_form, "MAX_NOTES", 1 << 16)  # a config is copied a few times before a plan is read
    refuses(folder, re.escape(match) if ".*" not in match else match)


def test_a_plan_file_of_100_megabytes(folder: Path) -> None:
    with (folder / "plan.json").open("r+b") as file:
        file.truncate(100 * MiB)
    for load in (Plan.load, lambda path: loaded(path.parent)):
        refuses(folder / "plan.json", "has 104,857,600 bytes; at most 67,108,864 are read", load)


def test_notes_that_are_no_numbers_do_not_break_inspect(folder: Path) -> None:
    data = json.loads((folder / "plan.json").read_text())
    data["budget"] = {"asked": ["nonsense"], "bytes": {"512": 3}}
    data["provenance"] = {"lengths": [512]}
    (folder / "plan.json").write_text(json.dumps(data))
    refuses(folder / "plan.json", "nonsense", lambda path: inspect_plan(Plan.load(path)))


# --- weight files


def header(entries: Any, size: int | None = None, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape: list[Any], end: int, dtype: str = "F32", begin: int = 0) -> dict[str, Any]:
    return {WEIGHT: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


class Canary:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


GiB10 = 10 * 2**30
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a whole safetensors file"),
    "header of 10 GiB": (header({}, GiB10), "\\(10 bytes\\) is not a whole safetensors file: .*header too large"),
    "header of 2**63": (header({}, 2**63), "header too large"),
    "header longer than the file": (header({}, 50), "invalid header length"),
    "data of 10 GiB": (header(entry([GiB10 // 4], GiB10)), "file not fully covered"),
    "shape and size disagree": (header(entry([2**40], 4), data=b"1234"), "invalid shape, data type, or offset"),
    "negative offsets": (header(entry([1], -4)), "expected usize"),
    "backward offsets": (header(entry([1], 0, begin=4)), f"invalid offset for tensor `{WEIGHT}`"),
    "a float shape": (header(entry([1.0], 4), data=b"1234"), "expected usize"),
    "a bool shape": (header(entry([True], 4), data=b"1234"), "expected usize"),
    "no object": (header([1]), "invalid type: sequence"),
    "not JSON": (header(b"{"), "is not a whole safetensors file"),
    "not UTF-8": (header(b"\xff\xfe"), "is not a whole safetensors file"),
    "nested": (header(b"[" * 100_000), "is not a whole safetensors file"),
    "bytes left over": (header({}, data=b"x" * 100), "file not fully covered"),
    "a long name": (header({"x\n" * 10**5: entry([1], 4)[WEIGHT]}), "file not fully covered"),
    "names of one tensor's bytes": (
        header({**entry([1], 4), "y": entry([1], 4)[WEIGHT]}, data=b"1234"),
        "invalid offset for tensor",
    ),
    "another shape": (
        header(entry([2], 8), data=b"x" * 8),
        r"has a tensor .*up_proj.weight of shape \[2\], the model needs",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_weights_file(kind: str, folder: Path) -> None:
    content, match = FILES[kind]
    (folder / "model.safetensors").write_bytes(content)
    refuses(folder, match)
    refuses(folder, match, loaded)


@pytest.mark.parametrize(
    ("index", "absolute"), [("model.safetensors.index.json", True), ("model.safetensors.index.fp16.json", False)]
)
def test_an_index_that_names_files_elsewhere(index: str, absolute: bool, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "others.safetensors")
    name = str(tmp_path / "others.safetensors") if absolute else "../others.safetensors"
    named = dict.fromkeys(load_file(tmp_path / "others.safetensors"), name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": named}))
    load = partial(AutoModelForCausalLM.from_pretrained, variant="fp16" if "fp16" in index else None)
    with pytest.raises((MoaCompressError, ValueError), match="is not a plain file name|outside the model directory"):
        load(folder)
    refuses(folder, "is not a plain file name", checkpoint_files)


def test_an_adapter_beside_a_checkpoint(folder: Path, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """transformers would put it on the weights in silence, for the dense model of an evaluation too."""
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(tiny_model(), lora).save_pretrained(str(tmp_path / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert PeftModel.from_pretrained(model, str(tmp_path / "adapter")) is not None
    for file in (tmp_path / "adapter").glob("adapter_*"):
        file.rename(folder / file.name)
    for load in (AutoModelForCausalLM.from_pretrained, loaded):
        refuses(folder, "has an adapter beside its weights", load)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("protocol", ["zip", "plain"])
def test_nothing_is_unpickled(name: str, protocol: str, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it was unpickled"
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        if protocol == "zip":
            torch.save({WEIGHT: Canary(mark)}, file)
        else:
            pickle.dump({WEIGHT: Canary(mark)}, file)
    match = "pickle" if name.endswith("bin") or protocol == "zip" else "is not a whole safetensors file"
    as_stored, as_float32 = (
        partial(AutoModelForCausalLM.from_pretrained, dtype=each) for each in ("auto", torch.float32)
    )
    refuses(folder, match, as_stored)
    refuses(folder, match, as_float32)
    # without a dtype in the config transformers would open the first file to find it out
    edit_config(folder, lambda config: config.pop("dtype", None))
    refuses(folder, match, as_stored)
    refuses(folder, match, loaded)
    edit_config(folder, lambda config: config.pop("quantization_config"))  # and as the dense source of an export
    refuses(folder, match, load_source)
    assert match in check_model(str(folder))["problems"][0]
    assert not mark.exists()
    pickle.loads(pickle.dumps(Canary(mark)))
    assert mark.exists(), "the canary must sing where it is let out, or this shows nothing"


@pytest.mark.parametrize("name", [WEIGHT, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_never_drawn_at_random(name: str, folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop(name))
    refuses(folder, f"lacks 1 of its weights, or holds them in another shape, such as {name}")
    edit_config(folder, lambda config: config.pop("architectures"))
    refuses(folder, "lacks 1 of its weights")
    edit_config(folder, lambda config: config.pop("quantization_config"))
    refuses(folder, f"lacks 1 of its weights, such as {name}", load_source)


def test_a_missing_tensor_of_an_absurd_size_takes_no_memory(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.embed_tokens.weight"))
    edit_config(folder, lambda config: config.update(vocab_size=2**40))
    refuses(folder, "has a tensor lm_head.weight of shape")
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    refuses(folder, "lacks 2 of its weights")


def test_what_is_whole_still_loads(folder: Path, model: Callable[..., Any], tmp_path: Path) -> None:
    """The base model without its head, a new head on it, and tied weights that are stored once."""
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    assert AutoModel.from_pretrained(folder) is not None
    with_head = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert with_head.score.weight.shape == (3, 64)
    edit_weights(folder, lambda weights: weights.pop(WEIGHT))
    refuses(folder, "lacks 1 of its weights", AutoModel.from_pretrained)
    refuses(folder, "lacks 1 of its weights", AutoModelForSequenceClassification.from_pretrained)
    model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    edit_weights(tmp_path / "tied", lambda weights: weights.pop("model.embed_tokens.weight"))
    refuses(tmp_path / "tied", "lacks 2 of its weights")


LIMITED = """
import os, resource, sys
import torch
from transformers import AutoModelForCausalLM
import moacompress.runtime.hf.loading
from moacompress.core.errors import MoaCompressError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for folder in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    resource.setrlimit(resource.RLIMIT_AS, (used + 256 * 2**20, resource.RLIM_INFINITY))
    try:
        AutoModelForCausalLM.from_pretrained(folder) if folder else torch.ones(2**30)
    except MoaCompressError as error:
        print("refused", type(error).__name__, error, flush=True)
    except RuntimeError:
        print("stopped", flush=True)
    os._exit(0)
"""


def claims_a_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", GiB10))


def claims_a_tensor(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(header(entry([GiB10 // 4], GiB10)))


def lacks_weights(folder: Path) -> None:
    edit_weights(folder, lambda weights: (weights.pop("model.embed_tokens.weight"), weights.pop("lm_head.weight")))
    edit_config(folder, lambda config: config.update(vocab_size=2**36))


def has_layers(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(num_hidden_layers=10**9))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit counts from what is used already")
def test_refusals_take_no_memory(folder: Path, tmp_path: Path) -> None:
    """With 256 MiB to spare: a file of 10 GiB of zeros, tensors and layers that would need as much.

    The limit does stop a process that takes more.
    """
    folders = []
    for change in (claims_a_header, claims_a_tensor, lacks_weights, has_layers):
        folders.append(shutil.copytree(folder, tmp_path / change.__name__))
        change(folders[-1])
        if change in (claims_a_header, claims_a_tensor):
            file = folders[-1] / "model.safetensors"
            with file.open("r+b") as stream:  # the bytes that the file claims are there, as a hole
                stream.truncate(file.stat().st_size + GiB10)
    done = subprocess.run([sys.executable, "-c", LIMITED, "", *folders], capture_output=True, text=True, timeout=300)
    control, *said = done.stdout.splitlines()
    assert control == "stopped"
    assert len(said) == len(folders), done.stderr[-600:]
    assert all(line.startswith("refused") for line in said), said

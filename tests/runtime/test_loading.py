"""Plain `from_pretrained` and `save_pretrained`, in this process and in a fresh one, and the ways around a model."""

import copy
import functools
import importlib
import json
import mmap
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from moacompress.core.errors import ModelError, UnsupportedError
from moacompress.models.source import model_shape
from moacompress.models.weight_rounding import round_weights
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach, huge_pages
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.compat.alternates import returned_cache
from moacompress.runtime.hf import loading
from moacompress.runtime.hf.attaching import attached_plan
from tests.runtime.forwards import plan_of


@pytest.fixture
def compressed(tmp_path, model):
    """Returns a function that saves a compressed tiny model and returns (folder, model, plan)."""

    def make(family="llama"):
        made = model(family, plan=2)
        made.save_pretrained(tmp_path / family)
        return tmp_path / family, made, plan_of(made)

    return make


def test_round_trip(family, compressed, tiny_model, token_ids, tmp_path):
    """Loading checks shapes only: weights may have changed since."""
    folder, model, plan = compressed(family)
    ids = token_ids(1, 100)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert attached_plan(loaded).to_dict() == plan.to_dict()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        loaded.get_output_embeddings().weight.mul_(1.01)
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(ids).logits, loaded(ids).logits)
        assert torch.equal(
            detach(AutoModelForCausalLM.from_pretrained(folder))(ids).logits, tiny_model(family)(ids).logits
        )
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert first == second
    assert first["architectures"] == [type(model).__name__]
    stored = first["quantization_config"]
    assert stored["quant_method"] == "moacompress"
    assert Plan.from_dict(stored["plan"]) == plan


def test_a_model_without_its_plan_is_a_dense_one(compressed, token_ids, tmp_path):
    folder, _, _ = compressed()
    model = detach(AutoModelForCausalLM.from_pretrained(folder))
    assert detach(model) is model
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    model.set_attn_implementation("eager")
    assert not isinstance(returned_cache(model(token_ids(1, 60))), PlanCache)


@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_a_model_in_blocks_load(tied, tiny_model, random_plan, token_ids, tmp_path):
    """The model without its head, and with another one: layers have other names, and the output layer is not there."""
    model = tiny_model(tie_word_embeddings=tied)
    round_weights(model, "int8", "int8")
    attach(model, random_plan(model_shape(model), 2))
    model.save_pretrained(tmp_path)
    ids = token_ids(1, 60)
    with torch.no_grad():
        inner = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(inner(ids)[0], model.model(ids)[0])
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        assert torch.equal(other.model(ids)[0], model.model(ids)[0])
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weights"]["model.layers.9.mlp.up_proj"] = "Q8_0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM):
        with pytest.raises(ModelError, match=r"layer '.*layers\.9\.mlp\.up_proj' is not known"):
            auto.from_pretrained(tmp_path)


def test_a_model_that_was_loaded_in_inference_mode_can_be_trained(compressed, token_ids, monkeypatch):
    folder, *_ = compressed()
    monkeypatch.setattr(huge_pages, "have_huge_pages", lambda: True)
    monkeypatch.setattr(huge_pages, "PAGE", mmap.PAGESIZE)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder)
    ids = token_ids(1, 60)
    before = model.lm_head.weight.detach().clone()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model.lm_head.weight, before)


def test_dtype_and_device_map(compressed, token_ids, tmp_path):
    folder, model, plan = compressed()
    ids = token_ids(1, 60)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert returned_cache(half(ids)).kv_bytes() * 2 == plan.kv_bytes(60)
    assert half.half().dtype == torch.float16  # which is refused of other quantized models
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")(ids).logits, expected)
        layers = {f"model.layers.{layer}": place for layer, place in enumerate(("cpu", "disk", "disk"))}
        others = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), "cpu")
        places = layers | others
        offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
        assert torch.equal(offloaded(ids).logits, expected)
        out = offloaded.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(out, model.generate(ids, max_new_tokens=5, do_sample=False))


RELOADED = """
import importlib, sys
import torch
import moacompress
import transformers.modeling_utils, transformers.masking_utils
from transformers import AutoModelForCausalLM, MistralConfig
for module in (transformers.masking_utils, transformers.modeling_utils):
    importlib.reload(module)
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
ids = torch.arange(300)[None] % 50
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(ids).logits, sys.argv[2])
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
late = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=64, **sizes)).eval()
dense = late(ids).logits
under = moacompress.attach(late, Plan.uniform(model_shape(late), Rule(4, 32, 0)))(ids).logits
assert not torch.equal(dense, under)
assert torch.equal(moacompress.detach(late)(ids).logits, dense)
"""


def test_a_reload_of_transformers_loses_no_attention(compressed, tmp_path):
    """As `autoreload` of a notebook does; a family whose module is imported after it attends by the new one."""
    folder, model, _ = compressed("llama")
    ids = torch.arange(300)[None] % 50
    command = [sys.executable, "-c", RELOADED, str(folder), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits"), model(ids).logits)


def test_from_config_is_refused(compressed):
    folder, _, _ = compressed()
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match="from_config would build a dense model"):
        AutoModelForCausalLM.from_config(config)
    del config.quantization_config
    assert AutoModelForCausalLM.from_config(config) is not None


@pytest.fixture
def dense_config(tiny_model):
    return copy.deepcopy(tiny_model().config)


def wrappers():
    """Returns how many functions are around transformers' own `_from_config`."""
    found, count = vars(PreTrainedModel)["_from_config"].__func__, 0
    while hasattr(found, "__wrapped__"):
        found, count = found.__wrapped__, count + 1
    return count


def test_registering_twice_leaves_one_wrapper(dense_config):
    assert wrappers() == 1
    importlib.reload(loading)
    assert wrappers() == 1
    assert AutoModelForCausalLM.from_config(dense_config) is not None
    dense_config.quantization_config = {"quant_method": "moacompress"}
    with pytest.raises(UnsupportedError, match="from_config would build a dense model"):
        AutoModelForCausalLM.from_config(dense_config)


def test_a_wrapper_of_others_stays(dense_config, monkeypatch):
    own, seen = vars(PreTrainedModel)["_from_config"], []

    @functools.wraps(own.__func__)
    def counted(cls, config, **rest):
        seen.append(config)
        return own.__func__(cls, config, **rest)

    monkeypatch.setattr(PreTrainedModel, "_from_config", classmethod(counted))
    importlib.reload(loading)
    assert AutoModelForCausalLM.from_config(dense_config) is not None
    assert seen == [dense_config]


@pytest.mark.parametrize("method", ["gptq", None])
def test_other_configs_are_handed_on_at_once(method, dense_config, monkeypatch):
    if method is not None:
        dense_config.quantization_config = {"quant_method": method}
    monkeypatch.setattr(loading, "_is_being_loaded", lambda config: pytest.fail("another config was looked into"))
    assert AutoModelForCausalLM.from_config(dense_config) is not None


def test_another_attention_and_no_plan_are_refused(compressed, tiny_model, token_ids):
    _, model, _ = compressed()
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(UnsupportedError, match="would ignore the plan"):
        model(token_ids(1, 10))
    model = tiny_model()
    model.set_attn_implementation("moacompress")
    with pytest.raises(UnsupportedError, match="has no plan"):
        model(token_ids(1, 10))

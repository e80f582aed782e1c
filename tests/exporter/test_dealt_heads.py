"""KV heads dealt out to ranks: the model computes the same, and ranks have caches alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moacompress.core.errors import ModelError, PlanError, UsageError
from moacompress.exporter.dealt_heads import bytes_of_ranks, deal_heads, dealt
from moacompress.exporter.exporting import export
from moacompress.models.source import load_source, model_shape
from moacompress.models.weight_rounding import round_weights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.runtime import attach
from moacompress.runtime.checkpoint import load_checkpoint
from tests import plan_kinds

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


def test_ranks_have_much_the_same():
    costs = np.random.default_rng(0).integers(1, 100, (12, 8)).tolist()
    orders = dealt(costs, 4)
    assert all(sorted(order) == list(range(8)) for order in orders)
    totals = [
        sum(row[head] for row, order in zip(costs, orders, strict=True) for head in order[2 * rank : 2 * rank + 2])
        for rank in range(4)
    ]
    assert max(totals) - min(totals) < 0.02 * sum(totals)


@pytest.mark.parametrize(
    ("kind", "family"), [("windows", "qwen2"), ("formats", "llama"), ("gates", "qwen3"), ("centres", "qwen2")]
)
def test_the_model_computes_the_same(kind, family, tiny_model, tiny_tokenizer, tmp_path):
    dense = tiny_model(family, **HEADS).double()  # in which codes hardly depend on the order of sums
    for name, weight in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    source = load_source(tmp_path / "dense")
    plan = getattr(plan_kinds, kind)(source.model)
    before = {name: weight.clone() for name, weight in source.model.state_dict().items()}
    folder = export(source, plan, tmp_path / "model", ranks=2)
    assert all(torch.equal(weight, before[name]) for name, weight in source.model.state_dict().items())
    made = load_checkpoint(folder, "auto", "cpu")
    note = made.plan.provenance["dealt_heads"]
    assert note["bytes"] == bytes_of_ranks(made.plan, 2, note["length"])
    assert note["bytes_before"] == bytes_of_ranks(plan, 2, note["length"])
    assert max(note["bytes"]) <= max(note["bytes_before"])
    assert made.plan.kv_bytes(100) == plan.kv_bytes(100)
    assert made.plan.model.weights_fingerprint == made.weights
    ids = torch.randint(3, 150, (2, 60))
    wanted, found = attach(source.model, plan)(ids).logits, made.model(ids).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **asked), source.model.generate(ids, **asked))


def test_what_is_not_moved(tiny_model):
    model = tiny_model("llama", **HEADS)
    plan = plan_kinds.windows(model)
    with pytest.raises(UsageError, match="4 KV heads in a layer, which 3 ranks cannot share evenly"):
        deal_heads(model, plan, 3)
    with pytest.raises(PlanError, match="share attention"):
        deal_heads(model, plan_kinds.with_shares(plan, (None, None, Share(0, (0, 1, 2, 3)))), 2)
    fused = tiny_model("phi3")
    with pytest.raises(ModelError, match="layer 0 has the weight qkv_proj.weight"):
        deal_heads(fused, Plan.uniform(model_shape(fused), Rule(4, 20, 0)), 2)
    sinks = tiny_model("gpt_oss")
    with pytest.raises(ModelError, match="layer 0 has the weight sinks"):
        deal_heads(sinks, Plan.full(model_shape(sinks)), 2)
    round_weights(model, "int8", None)
    with pytest.raises(ModelError, match="blocks may span KV heads"):
        deal_heads(model, plan, 2)

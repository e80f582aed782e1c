"""Checkpoints whose weights are split over ranks, `tp_plan="auto"`: two processes with gloo, each with KV heads of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.runtime import attach, detach
from tests import plan_kinds
from tests.runtime.forwards import plan_of
from tests.torchrun import torchrun

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
KINDS = ("windows", "formats", "gates", "centres")


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """Returns a folder with checkpoints, and what both ranks found of them."""
    folder = tmp_path_factory.mktemp("ranks")
    model = tiny_model("llama", **HEADS)
    model.save_pretrained(folder / "dense")
    for kind in KINDS:
        attach(model, getattr(plan_kinds, kind)(model)).save_pretrained(folder / kind)
        detach(model)
    shared = plan_kinds.with_shares(plan_kinds.windows(model), (None, None, Share(0, (0, 1, 2, 3))))
    shared.save(folder / "shared.json")
    phi3 = tiny_model("phi3")
    phi3.save_pretrained(folder / "dense phi3")
    attach(phi3, plan_kinds.formats(phi3)).save_pretrained(folder / "fused")
    uneven = tiny_model("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=48, head_dim=16)
    attach(uneven, Plan.uniform(model_shape(uneven), Rule(4, 20, 0))).save_pretrained(folder / "uneven")
    done = torchrun(2, Path(__file__).with_name("ranks_of_tensor_parallelism.py"), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank {rank}.json").read_text()) for rank in range(2)]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [*KINDS, "fused"])
def test_two_ranks_are_one_process(kind, folder, ranks):
    model = AutoModelForCausalLM.from_pretrained(folder / kind)
    torch.manual_seed(0)
    ids = torch.randint(3, 150, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    plan = plan_of(model)
    for rank in ranks:
        found = rank[kind]
        assert found["apart"] < 1e-5
        assert found["dense"] < 1e-5
        assert found["tokens"] == found["again"] == found["on device"] == wanted.tolist()
        assert found["key"] == plan.key()
    held = [rank[kind]["bytes"] for rank in ranks]
    if kind == "fused":  # its keys are gathered again
        assert held == [plan.kv_bytes(40, 2)] * 2
    else:
        assert sum(held) == plan.kv_bytes(40, 2)
        assert all(held)
    first, second = (load_file(folder / name / "model.safetensors") for name in (kind, f"{kind} again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.heavy
def test_what_ranks_refuse(ranks):
    for rank in ranks:
        said = rank["refusals"]
        assert "3 KV heads, which do not divide by 2 ranks of tensor parallelism (1.50 each)" in said["uneven"]
        assert "layer 2 shares the attention of layer 0" in said["shared"]

"""Weights in huge pages: the same numbers, in storages of their own, and no second copy of them in memory."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, huge_pages
from moacompress.runtime.huge_pages import LINE, PAGE, SWITCH, have_huge_pages, move_weights

needs_huge_pages = pytest.mark.skipif(not have_huge_pages(), reason="this system gives no huge pages")


def layers():
    """Three layers, of which the first and the last share a weight; large enough for huge pages."""
    made = nn.Sequential(
        nn.Linear(700, 900), nn.Linear(900, 700, dtype=torch.bfloat16), nn.Linear(700, 900, bias=False)
    )
    made[2].weight = made[0].weight
    return made


@needs_huge_pages
def test_the_same_numbers_elsewhere(tmp_path):
    model = layers()
    before = {
        name: (parameter, parameter.clone(), parameter.data_ptr()) for name, parameter in model.named_parameters()
    }
    assert move_weights(model) == sum(parameter.nbytes for parameter, _, _ in before.values())
    assert model[2].weight is model[0].weight
    for name, parameter in model.named_parameters():
        same, numbers, place = before[name]
        assert parameter is same
        assert parameter.requires_grad
        assert torch.equal(parameter, numbers)
        assert parameter.data_ptr() != place
        assert parameter.data_ptr() % LINE == 0
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    there = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(there[name], parameter) for name, parameter in model.state_dict().items())
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(model[0].weight, before["0.weight"][1] + 1)


def test_what_stays_where_it_is(monkeypatch):
    model = layers()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    monkeypatch.setenv(SWITCH, "0")
    assert move_weights(model) == 0
    monkeypatch.delenv(SWITCH)
    monkeypatch.setattr(huge_pages, "available_bytes", lambda: PAGE)
    assert move_weights(model) == 0
    monkeypatch.undo()
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert move_weights(nn.Linear(3, 3)) == 0
    shared = layers().share_memory()
    assert move_weights(shared) == 0
    assert move_weights(layers().to("meta")) == 0


LOAD = """
import json, sys, threading, time
import torch
from transformers import AutoModelForCausalLM

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

small, folder = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(small)  # what libraries take once
before, peak, done = memory("RssAnon"), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
model = AutoModelForCausalLM.from_pretrained(folder)
done = True
watcher.join()
huge = sum(int(line.split()[1]) * 1024 for line in open("/proc/self/smaps") if line.startswith("AnonHugePages"))
model(torch.tensor([[3, 4, 5]]))
print(json.dumps({"peak": peak - before, "left": memory("RssAnon") - before, "huge": huge, "file": memory("RssFile")}))
"""


def save(folder, **sizes):
    """Saves a compressed model in bfloat16; returns the bytes of its weights."""
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=64, **sizes)
    model = LlamaForCausalLM(config).bfloat16()
    attach(model, Plan.full(model_shape(model)))
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.heavy
@needs_huge_pages
def test_loading_takes_no_second_copy(tmp_path):
    """At its peak loading takes no more anonymous memory than the files and a tenth."""
    save(tmp_path / "small", hidden_size=64, intermediate_size=64, vocab_size=64)
    size = save(tmp_path / "large", hidden_size=1024, intermediate_size=4096, vocab_size=30_000)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert size > 150 * 2**20
    assert 0.9 * size < found["peak"] <= 1.1 * size
    assert found["left"] <= 1.1 * size

"""A copy of a model under a plan runs under its own plan, in any process, whatever else has a plan there and when."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moacompress.models.modules import attention_modules
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import PlanCache, attach, detach
from moacompress.runtime.decode import fused
from moacompress.runtime.hf.attaching import attached_plan
from tests.runtime.forwards import difference, in_parts

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LAYERS, PROMPT, STEPS = 2, 60, 4
WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "function": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "method": lambda model: model.compile(backend="eager", fullgraph=True) or model,
}
"""The two ways to compile a model."""


@pytest.fixture
def plans(tiny_model, random_plan):
    """Returns a function giving the plan of a tiny model of a family, and another one with other rules."""

    def draw(family: str = "llama") -> tuple[Plan, Plan]:
        shape = model_shape(tiny_model(family, num_hidden_layers=LAYERS))
        return random_plan(shape, 3), random_plan(shape, 5)

    return draw


@pytest.fixture
def under_plan(tiny_model, plans):
    """Returns a function giving a tiny model under its plan; others, which live on, have the other plan before and after."""
    others = []

    def make(family: str = "llama") -> PreTrainedModel:
        plan, other = plans(family)
        models = [tiny_model(family, num_hidden_layers=LAYERS) for _ in range(3)]
        made = [attach(model, rules) for model, rules in zip(models, (other, plan, other), strict=True)][1]
        others.extend(model for model in models if model is not made)
        return made

    return make


IDS = torch.randint(3, 160, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))


def logits(model: Any, plan: Plan) -> torch.Tensor:
    """Returns logits of a prompt and of some steps after it, `[1, tokens, vocabulary]`."""
    return in_parts(model, IDS, [PROMPT], PlanCache(plan))


def are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return difference(found, expected) < 2e-5


def hooks(attention: Any) -> list[Any]:
    return list(attention._forward_pre_hooks.values())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("copied", WAYS.values(), ids=WAYS)
def test_it_answers_as_the_original_does(family, copied, under_plan, plans):
    plan, other = plans(family)
    made = under_plan(family)
    expected = logits(made, plan)
    twin = copied(made)
    assert attached_plan(twin) == plan
    assert torch.equal(logits(twin, plan), expected)
    attach(made, other)
    assert torch.equal(logits(twin, plan), expected)
    again = copied(twin)
    del made, twin
    gc.collect()
    assert torch.equal(logits(again, plan), expected)


@pytest.mark.parametrize(
    ("way", "call"), [("pickle", "function"), pytest.param("deepcopy", "method", marks=pytest.mark.heavy)]
)
def test_it_answers_as_the_original_does_where_it_is_compiled(way, call, under_plan, plans):
    """The graph of a copy names its own parts of the plan: it runs when those of the original are gone."""
    (plan, _), copied = plans(), WAYS[way]
    made = under_plan()
    expected = logits(made, plan)
    first, compiled = copied(made), CALLS[call](made)
    assert are_close(logits(compiled, plan), expected)
    second = copied(compiled)
    del made, compiled
    gc.collect()
    assert are_close(logits(CALLS[call](first), plan), expected)
    if call == "method":  # which leaves the class as it is, and is not copied
        assert torch.equal(logits(second, plan), expected)
        CALLS[call](second)
    assert are_close(logits(second, plan), expected)


PROCESS = """
import pickle, sys
import torch
from moacompress.rules.plan import Plan
from moacompress.runtime import PlanCache, attach

action, folder = sys.argv[1:]
own, other = (Plan.load(f"{folder}/{name}.json") for name in ("own", "other"))
with open(f"{folder}/dense", "rb") as file:
    first = attach(pickle.load(file), own if action == "write" else other)
if action == "write":
    with open(f"{folder}/pickle", "wb") as file:
        pickle.dump(first, file)
    models = {"original": first}
else:
    with open(f"{folder}/pickle", "rb") as file:
        models = {"pickle": pickle.load(file)}
for name, model in models.items():
    for kind, run in (("eager", model), ("compiled", torch.compile(model, backend="eager", fullgraph=True))):
        cache = PlanCache(own)
        with torch.no_grad():
            found = [run(part, cache=cache).logits for part in torch.load(f"{folder}/ids")]
        torch.save(torch.cat(found, 1), f"{folder}/{kind} {name}")
"""
"""One process puts a plan on a model and writes it; another one, where a model is under another plan, reads it."""


def test_it_is_read_onto_another_device(under_plan):
    """What the layers know of the plan stays on the CPU, where it is read."""
    file = io.BytesIO()
    torch.save(under_plan(), file)
    file.seek(0)
    twin = torch.load(file, map_location="meta", weights_only=False)
    assert twin.device.type == "meta"
    contexts = [hook.context for module in attention_modules(twin) for hook in hooks(module)]
    assert len(contexts) == LAYERS
    assert {context.rules.columns.device.type for context in contexts} == {"cpu"}


def test_a_layer_whose_class_was_given_another_forward_keeps_that(under_plan, plans, monkeypatch):
    """As a library may do in the process that reads, which has fused no class yet."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    plan, _ = plans()
    made, seen, own = under_plan(), [], LlamaAttention.forward
    expected, pickled = logits(made, plan), pickle.dumps(made)

    def other(self, *arguments, **rest):
        seen.append(self)
        return own(self, *arguments, **rest)

    monkeypatch.delitem(vars(fused), "FusedLlamaDecoderLayer")
    monkeypatch.setattr(LlamaAttention, "forward", other)
    twin = pickle.loads(pickled)
    assert are_close(logits(twin, plan), expected)
    assert len(seen) == (1 + STEPS) * len(attention_modules(twin))


@pytest.mark.heavy
def test_it_answers_as_the_original_does_in_another_process(tiny_model, plans, tmp_path):
    for name, plan in zip(("own", "other"), plans(), strict=True):
        plan.save(tmp_path / f"{name}.json")
    (tmp_path / "dense").write_bytes(pickle.dumps(tiny_model(num_hidden_layers=LAYERS)))
    torch.save(IDS.split([PROMPT, *[1] * STEPS], 1), tmp_path / "ids")
    for action in ("write", "read"):
        command = [sys.executable, "-c", PROCESS, action, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    expected = torch.load(tmp_path / "eager original")
    assert torch.equal(torch.load(tmp_path / "eager pickle"), expected)
    assert are_close(torch.load(tmp_path / "compiled pickle"), expected)


@pytest.mark.parametrize("detached", ["original", "copy"])
def test_the_one_is_detached_and_the_other_stays(detached, under_plan, plans, tiny_model):
    plan, other = plans()
    made, dense = under_plan(), tiny_model(num_hidden_layers=LAYERS)
    ids = torch.randint(3, 160, (1, PROMPT))
    expected, twin = logits(made, plan), copy.deepcopy(made)
    left, kept = (made, twin) if detached == "original" else (twin, made)
    with torch.no_grad():
        assert torch.equal(detach(left)(ids).logits, dense(ids).logits)
    assert [type(module) for module in left.modules()] == [type(module) for module in dense.modules()]
    assert sum(len(module._forward_pre_hooks) for module in left.modules()) == 0
    assert left.config.to_dict() == dense.config.to_dict()
    assert left.generate(ids, max_new_tokens=3).shape[0] == 1
    assert torch.equal(logits(kept, plan), expected)
    assert not are_close(logits(attach(left, other), other), expected)
    assert torch.equal(logits(kept, plan), expected)


def test_of_a_loaded_model(under_plan, plans, tmp_path):
    plan, _ = plans()
    under_plan().save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    expected, twin = logits(loaded, plan), copy.deepcopy(loaded)
    assert twin.hf_quantizer.quantization_config.plan == plan
    assert twin.hf_quantizer is not loaded.hf_quantizer
    detach(loaded)
    assert torch.equal(logits(twin, plan), expected)
    twin.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "first/config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, plan), logits(twin, plan))

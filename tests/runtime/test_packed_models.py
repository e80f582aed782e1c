"""Models with packed weights that others merge, train, load and move: never a number of the old weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moacompress.estimate.rates import product_seconds
from moacompress.models.source import model_shape
from moacompress.recipe import Recipe
from moacompress.runtime import attach, detach, pack_weights, unpack_weights
from moacompress.runtime.linear import can_pack, packed_bytes
from moacompress.runtime.ready_model import load_for

pytestmark = pytest.mark.skipif(not can_pack(), reason="oneDNN is not there")


@pytest.fixture
def packed(tiny_model):
    """A tiny model with packed weights, and token ids, of more tokens than the kernels' own products take."""
    model = tiny_model("llama")
    assert pack_weights(model) > 0
    return model, torch.randint(3, 160, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def agrees_with_unpacked(model, ids):
    """Whether the logits are those of the weights as they lie in memory."""
    found = logits(model, ids)
    unpack_weights(model)
    expected = logits(model, ids)
    return bool((found - expected).abs().max() < 1e-4 * expected.abs().max())


def lora(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.eval()


def test_adapters_are_merged_and_unloaded(packed):
    model, ids = packed
    before, adapted = logits(model, ids), lora(model)
    expected = logits(adapted, ids)
    assert (expected - before).abs().max() > 1
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-3, rtol=1e-3)
    assert agrees_with_unpacked(merged, ids)


def test_adapters_are_merged_and_taken_back(packed):
    model, ids = packed
    before, adapted = logits(model, ids), lora(model)
    expected = logits(adapted, ids)
    pack_weights(model)  # the base's weights, between the adapters
    for _ in range(2):
        adapted.merge_adapter()
        torch.testing.assert_close(logits(adapted, ids), expected, atol=1e-3, rtol=1e-3)
        pack_weights(model)
        adapted.unmerge_adapter()
        torch.testing.assert_close(logits(adapted, ids), expected, atol=1e-3, rtol=1e-3)
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted, ids), before, atol=1e-3, rtol=1e-3)


def test_what_trains_is_evaluated_as_it_is_saved(packed, tmp_path):
    """The Trainer's default optimizer writes in fused kernels, which change no version."""
    from transformers import Trainer, TrainingArguments

    model, ids = packed
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=3,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model.requires_grad_(True), arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert abs(found[-1] - float(saved(ids, labels=ids).loss)) < 1e-4
    assert found[-1] < before - 0.1


def fused_step(model):
    """A step of what the Trainer uses by default, without a forward of the model."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def parts_swapped(model):
    one, other = (model.model.layers[at].mlp for at in (0, 1))
    one.up_proj.weight, other.up_proj.weight = other.up_proj.weight, one.up_proj.weight


def at_the_same_address(model):
    """Another parameter in memory that a library keeps."""
    memory = model._parameters_of = torch.empty(96, 64)
    memory.copy_(model.model.layers[0].mlp.up_proj.weight.detach())
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(memory, requires_grad=False)
    pack_weights(model)
    del model.model.layers[0].mlp.up_proj.weight
    memory.data.mul_(2)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(memory.detach(), requires_grad=False)


def written_elsewhere_and_said(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    unpack_weights(model)


CHANGES = {
    "another state": lambda model: model.load_state_dict(
        {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    ),
    "another state, assigned": lambda model: model.load_state_dict(
        {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}, assign=True
    ),
    "another dtype, and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "another device, and back": lambda model: model.to("cpu"),
    "a step of an optimizer": fused_step,
    "an optimizer, and frozen again": lambda model: (fused_step(model), model.requires_grad_(False)),
    "training, and back": lambda model: (
        model.train(),
        [parameter.data.mul_(1.1) for parameter in model.parameters()],
        model.eval(),
    ),
    "written through its data": lambda model: model.model.layers[1].mlp.up_proj.weight.data.mul_(2),
    "parameters swapped": parts_swapped,
    "a parameter at the same address": at_the_same_address,
    "pruned": lambda model: prune.l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5),
    "reparametrized": lambda model: nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj),
    "written elsewhere, and said": written_elsewhere_and_said,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_written_is_what_is_multiplied(change, packed):
    model, ids = packed
    change(model)
    assert agrees_with_unpacked(model, ids)


def test_copies_have_weights_of_their_own(packed):
    model, ids = packed
    before, other = logits(model, ids), copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    assert agrees_with_unpacked(other, ids)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("change", [lambda model: model.train(), lambda model: model.requires_grad_(True)])
def test_what_may_be_trained_is_not_packed(change, tiny_model, caplog):
    model = tiny_model("llama")
    change(model)
    assert pack_weights(model) == packed_bytes(model) == 0
    assert "model.eval().requires_grad_(False)" in caplog.text


def test_a_dropped_pack_takes_no_memory_and_its_graph_no_old_numbers(tiny_model):
    model = tiny_model("llama")
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    ids = torch.randint(3, 160, (2, 24))
    taken = pack_weights(model, twin)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
        layer = twin.model.layers[0].mlp.up_proj
        size = layer.in_features * layer.out_features * 4
        layer.weight.data.mul_(2)  # of both: they share it
        assert packed_bytes(model) == packed_bytes(twin) == taken - size
        found = compiled(ids).logits
        unpack_weights(model)
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_our_own_commands_keep_their_packs(tiny_folder, random_plan):
    """Plans on and off, estimates, fingerprints and generating take no weight in hand."""
    source = load_for(Recipe.from_dict({"model": str(tiny_folder)}), tiny_folder)
    model, taken = source.model, packed_bytes(source.model)
    assert taken == sum(
        {
            id(layer._parameters["weight"]): layer._parameters["weight"].nbytes
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
        }.values()
    )
    product_seconds(model, torch.float32)
    for seed in range(2):
        attach(model, random_plan(model_shape(model), seed))
        with torch.no_grad():
            model.generate(torch.arange(3, 20)[None], max_new_tokens=3)
        detach(model)
    assert source.weights_like(source.shape.weights_fingerprint) == source.shape.weights_fingerprint
    assert packed_bytes(model) == taken

"""Export writes a whole checkpoint or nothing."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from moacompress.core.errors import ArtefactError, PlanError
from moacompress.exporter.card import model_card
from moacompress.exporter.exporting import (
    check_place,
    check_reusable,
    export,
    exported_plan,
    save_dense,
    warn_of_budget,
)
from moacompress.exporter.licences import licence_files
from moacompress.models.source import SourceModel, load_source, model_shape
from moacompress.report.inspection import inspect, inspect_plan, inspection_tables
from moacompress.rules.memory import memory_lines, plan_memory
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.runtime.checkpoint import load_checkpoint
from moacompress.runtime.compat.alternates import returned_cache
from moacompress.runtime.hf.attaching import attached_plan
from tests import plan_kinds


def test_folder_has_everything(exported, plan):
    names = {path.name for path in exported.iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("plan.json", "recipe.json", "README.md", "LICENSE"),
    }
    assert Plan.load(exported / "plan.json") == plan
    assert exported_plan(exported) == plan
    card = (exported / "README.md").read_text()
    assert all(text in card for text in ("0.01", "40%", "| 128 |"))
    assert json.loads((exported / "recipe.json").read_text()) == {"seed": 0}


def test_what_layers_share_is_not_written_twice(tiny_folder, random_plan, tmp_path):
    source = load_source(tiny_folder)
    layers = source.shape.layers
    shares = (*(None,) * (layers - 1), Share(layers - 2, tuple(range(source.shape.kv_heads))[::-1]))
    plan = plan_kinds.with_shares(random_plan(source.shape, 3), shares)
    folder = export(source, plan, tmp_path / "model")
    assert attached_plan(source.model) is None
    assert not hasattr(source.model.config, "quantization_config")
    assert exported_plan(folder) == plan
    dense = sum(weight.numel() for weight in source.model.parameters())
    found = inspect_plan(plan, None, folder)["parameters"]
    assert found["dense"] == dense
    assert found["plan"] < dense
    assert f"layer {layers - 1}: copy of layer {layers - 2}" in (folder / "README.md").read_text()


def test_what_computes_in_float32_is_written_as_it_was(tiny_folder, random_plan, tmp_path):
    dense = save_dense(tiny_folder, tmp_path / "dense", dtype="bfloat16")
    source = load_source(dense, dtype="float32")
    plan = random_plan(source.shape, 3)
    assert plan.model.dtype == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(export(source, plan, tmp_path / "model"))
    expected = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.bfloat16
    assert source.model.dtype == torch.float32


def test_a_smaller_dtype_may_take_more_than_the_budget(tiny_folder, tmp_path, caplog):
    shape = load_source(tiny_folder).shape
    assert shape.dtype == "float32"

    def planned(rule, asked, n=512):
        plan = Plan.uniform(shape, rule)
        share = plan.kv_share(n)
        asked = asked.format(share=f"{share + 1e-6:.6f}", bytes=f"{(plan.kv_bytes(n) + 1) / 2**20:.9f}MiB")
        stated = {str(n): {"plan": plan.kv_bytes(n), "dense": shape.dense_kv_bytes(n)}}
        return plan.with_notes(budget={"asked": [asked], "bytes": stated})

    coded, native = Rule(4, 100, 0, "int8", "int8"), Rule(4, 100, 0)
    for plan in (
        planned(coded, "{share}"),
        planned(native, "{share}").in_dtype("bfloat16"),
        planned(coded, "{bytes}@512"),
        planned(coded, "{bytes}@512").in_dtype("bfloat16"),  # the bytes are the same
        Plan.uniform(shape, coded).in_dtype("bfloat16"),
    ):
        warn_of_budget(plan)
    assert not caplog.records
    plan = planned(coded, "{share}").in_dtype("bfloat16")
    export(tiny_folder, plan, tmp_path / "model")
    (record,) = [record for record in caplog.records if "of the budget" in record.message]
    before = 100 * Plan.uniform(shape, coded).kv_share(512)
    share = f"{100 * plan.kv_share(512):.1f}%"
    assert f"in bfloat16 the plan takes {share} of the dense KV bytes at 512 tokens" in record.message
    assert f"more than the {before:.1f}% of the budget {plan.budget['asked'][0]}: " in record.message


def test_another_model_is_refused_and_overwrite_replaces(
    exported, tiny_model, tiny_tokenizer, tiny_folder, plan, tmp_path
):
    """That an export of the same plan is left as it is has a test in `tests/cli/test_steps.py`."""
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(PlanError, match="other weights"):
        export(tmp_path / "other", plan, exported)
    target = tmp_path / "model"
    shutil.copytree(exported, target)
    (target / "extra.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="exists already and is not of this plan; .*--overwrite"):
        export(tiny_folder, plan.with_notes(budget={}), target)
    assert (target / "extra.txt").read_text() == "mine"
    export(tiny_folder, plan, target, overwrite=True)
    assert exported_plan(target) == plan
    assert not (target / "extra.txt").exists()


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_a_model_that_was_saved_without_its_cache_has_the_plans(place, tiny_folder, plan, tmp_path, caplog):
    """As fine-tunes are that were trained with gradient checkpointing."""
    folder = tmp_path / "dense"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / place).read_text())
    beside = {"num_return_sequences": 2, "num_beams": 2, "cache_implementation": "static"}
    (folder / place).write_text(json.dumps({**config, "use_cache": False, **(beside if "gen" in place else {})}))
    source = load_source(folder)
    out = export(source, plan, tmp_path / "model")
    assert "use_cache: false" in caplog.text
    assert False in (source.model.config.use_cache, source.model.generation_config.use_cache)
    model, ids = AutoModelForCausalLM.from_pretrained(out), torch.arange(3, 60)[None]
    model.generation_config.num_return_sequences = model.generation_config.num_beams = 1
    found = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert type(returned_cache(found)).__name__ == "PlanCache"


def test_ranks_are_a_part_of_what_an_export_is_of(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)
    source = SourceModel(model, tiny_tokenizer, "tiny", model_shape(model), 4096)
    plan = plan_kinds.windows(model)
    whole, dealt = (export(source, plan, tmp_path / name, ranks=ranks) for name, ranks in (("1", None), ("2", 2)))
    before = {path: path.stat().st_mtime_ns for folder in (whole, dealt) for path in folder.iterdir()}
    assert export(source, plan, dealt, ranks=2) == dealt
    assert export(source, plan, whole) == whole
    for folder, ranks in ((whole, 2), (dealt, None), (dealt, 4)):
        with pytest.raises(ArtefactError, match="exists already and is not of this plan"):
            export(source, plan, folder, ranks=ranks)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_gates_that_come_from_a_models_weights_stay_there(tiny_model, tiny_tokenizer, tmp_path):
    """They are rounded as the weights are, and are not those that the plan names."""
    model = tiny_model("llama").to(torch.bfloat16)
    source = SourceModel(model, tiny_tokenizer, "tiny", model_shape(model), 4096)
    folder = export(source, plan_kinds.gates(model), tmp_path / "model")
    (folder / "plan.gates.safetensors").unlink()
    plan = load_checkpoint(folder, "auto", "cpu").plan
    assert plan.gate_weights.fingerprint != plan.gates
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").gate_weights is None
    again = export(source, plan, tmp_path / "again")
    assert load_checkpoint(again, "auto", "cpu").plan.key() == plan.key()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dense_model_is_never_replaced(tiny_folder, plan, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "dense")
    (tmp_path / "link").symlink_to("dense")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for model in ("dense", "link", load_source("dense")):
        for out in ("dense", tmp_path / "link", f"../{tmp_path.name}/./dense"):
            with pytest.raises(ArtefactError, match="exists already and is not a compressed model; choose another"):
                export(model, plan, out, overwrite=True)
    assert contents(tmp_path) == before
    assert (tmp_path / "link").is_symlink()


def test_what_holds_the_source_or_lies_in_it_is_never_replaced(exported, tiny_folder, plan, tmp_path, monkeypatch):
    """Folders that are compressed checkpoints, and the dense model is in one of them or around it."""
    shutil.copytree(exported, tmp_path / "around")
    shutil.copytree(tiny_folder, tmp_path / "around" / "dense")
    shutil.copytree(exported, tmp_path / "around" / "dense" / "within")
    (tmp_path / "door").symlink_to(tmp_path / "around" / "dense")
    (tmp_path / "linked").mkdir()
    shutil.copytree(exported, tmp_path / "weights")
    for file in tiny_folder.iterdir():
        shutil.copy(file, tmp_path / "weights" / f"dense-{file.name}")
        (tmp_path / "linked" / file.name).symlink_to(tmp_path / "weights" / f"dense-{file.name}")
    monkeypatch.chdir(tmp_path / "around")
    before = contents(tmp_path)
    for model, out in (
        ("dense", tmp_path / "around"),
        (tmp_path / "door", "."),
        ("../door", "../around/dense/within"),
        ("dense", tmp_path / "door" / "within"),
        (tmp_path / "linked", tmp_path / "weights"),
    ):
        with pytest.raises(ArtefactError, match="is read by this command; choose another folder"):
            export(model, plan, out, overwrite=True)
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("source", "title", "base"),
    [
        ("org/model-1b", "# model-1b, compressed", "base_model: org/model-1b"),
        ("dense", "# dense, compressed", None),
        ("model.Q4_1.gguf", "# model.Q4_1.gguf, compressed", None),
        ("org/model\nlicense: mit", "# model_license_ mit, compressed", None),
    ],
)
def test_the_card_names_the_model(source, title, base, plan):
    card = model_card(plan.with_notes(provenance={"source": source}))
    assert title in card
    assert (base in card) if base else ("base_model" not in card)


def test_the_card_counts_the_weights_that_a_heal_left(plan):
    row = {"limit": 700, "weights": 100, "kv_bytes": 500}
    chosen = plan.with_notes(budget={"memory": {"800": row}})
    assert "weights 100 bytes and KV cache 500, 600 of the 700 asked for." in model_card(chosen)
    sizes = {"before": {"Q8_0": 100}, "after": {"float32": 290, "Q8_0": 10}}
    healed = chosen.with_notes(provenance={"heal": {"weight_bytes": sizes}})
    (said,) = memory_lines(plan_memory(healed))
    assert "weights 300 bytes and KV cache 500, 800 where 700 were asked for" in said


def test_reusable_only_for_the_same_plan(exported, plan, random_plan):
    assert check_reusable(exported, plan)
    assert not check_reusable(exported.parent / "absent", plan)
    with pytest.raises(PlanError, match="holds another model"):
        check_reusable(exported, random_plan(plan.model, 4))


def test_licence_beside_a_packaged_gguf(tmp_path):
    packaged = "pkg/model.gguf,sha256=x,0\npkg/NOTICE.txt,,\n"
    for name, record in (("pkg-1.0", packaged), ("other-2.0", "other/__init__.py,,\n"), ("bare-3", "")):
        info = tmp_path / f"{name}.dist-info"
        (info / "licenses").mkdir(parents=True)
        (info / "LICENSE").touch()
        if record:
            (info / "RECORD").write_text(record)
    (tmp_path / "pkg").mkdir()
    for name in ("model.gguf", "__init__.py", "NOTICE.txt", "COPYING"):  # the last one is of no package
        (tmp_path / "pkg" / name).touch()
    own = tmp_path / "pkg-1.0.dist-info"
    (own / "licenses" / "NOTICE").touch()
    found = licence_files(str(tmp_path / "pkg" / "model.gguf"))
    assert found == [own / "LICENSE", own / "licenses" / "NOTICE", tmp_path / "pkg" / "NOTICE.txt"]


def test_a_licence_beside_a_gguf_is_taken_where_all_is_of_models(tmp_path, caplog):
    gguf = tmp_path / "model.gguf"
    for name in ("model.gguf", "tokenizer.json", "README.md", "GEMMA_TERMS.html", ".gitattributes", "LICENSE"):
        (tmp_path / name).touch()
    assert licence_files(str(gguf)) == [tmp_path / "LICENSE"]
    assert caplog.text == ""
    for other in ("setup.py", "src", "package.json"):
        path = tmp_path / other
        path.mkdir() if other == "src" else path.touch()
        caplog.clear()
        assert licence_files(str(gguf)) == []
        assert f"{tmp_path} holds LICENSE, which may not be of model.gguf, as there is {other} too" in caplog.text
        path.rmdir() if other == "src" else path.unlink()
    (tmp_path / "LICENSE").unlink()
    (tmp_path / "setup.py").touch()
    caplog.clear()
    assert licence_files(str(gguf)) == []
    assert caplog.text == ""


def test_a_licence_that_leads_elsewhere_is_left_out(tmp_path):
    (tmp_path / "secret").write_text("mine")
    folder = tmp_path / "hub" / "snapshots" / "rev"
    folder.mkdir(parents=True)
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "COPYING").write_text("of all")
    (folder / "LICENSE.txt").symlink_to("COPYING")
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    (blobs / "01").write_text("of the hub")
    (folder / "NOTICE").symlink_to(blobs / "01")
    assert [file.name for file in licence_files(str(folder))] == ["COPYING", "LICENSE.txt", "NOTICE"]


def test_a_link_to_a_folder_stays_one(tiny_folder, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    out = save_dense(tiny_folder, tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert {"config.json", "LICENSE"} <= {path.name for path in (tmp_path / "disk").iterdir()}
    ids = torch.randint(3, 99, (1, 30))
    first, second = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tiny_folder, out))
    assert torch.equal(first, second)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "disk"}


def test_where_a_file_system_begins_nothing_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == str(tmp_path.resolve()))
    with pytest.raises(ArtefactError, match=f"mounted, .* such as {tmp_path}/model"):
        check_place(tmp_path)
    check_place(tmp_path / "model")


@pytest.mark.parametrize("notes", [{"heal": 5}, {"repair": {}}, {"heal": {"weight_bytes": {}}}], ids=str)
def test_notes_that_nobody_wrote_are_one_error(notes, plan):
    odd = plan.with_notes(provenance=notes)
    for read in (model_card, lambda plan: inspection_tables(inspect(plan))):
        with pytest.raises(PlanError, match="notes say of .* is damaged"):
            read(odd)

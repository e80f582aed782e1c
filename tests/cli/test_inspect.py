"""`inspect`: the fields that others read, and the map for people."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moacompress.core.errors import ArtefactError
from moacompress.core.tables import readable_bytes, readable_number
from moacompress.report.inspection import count_parameters, formats_map, inspect_plan, kept_map
from moacompress.report.shown_tokens import token_tables
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share, with_shared_rules
from moacompress.runtime.selected_tokens import token_class
from tests.cli.commands import answer, invoke
from tests.printed import printed


def plan(layers: int = 2, **notes: Any) -> Plan:
    shape = ModelShape("llama", layers, 4, 2, 16, "float32", (None,) * layers, "0" * 16)
    rows = ((Rule.FULL, Rule(4, 0, 256)), (Rule(64, 0, 128), Rule(16, 32, 0)))
    return Plan(shape, 32, tuple(rows[layer % 2] for layer in range(layers))).with_notes(**notes)


NOTES: dict[str, Any] = {
    "budget": {"asked": ["40%@1k"], "bytes": {"512": {}, "1024": {}, "2048": {}}},
    "provenance": {"lengths": [512, 2048]},
}


def test_a_bare_plan(tmp_path: Path) -> None:
    made = plan(**NOTES)
    made.save(tmp_path / "plan.json")
    data = answer("inspect", tmp_path / "plan.json")
    assert data["reference_length"] == 1024
    assert data["density"] == made.density(1024)
    assert data["kv_bytes"] == {
        str(n): {"dense": made.model.dense_kv_bytes(n), "plan": made.kv_bytes(n)} for n in (512, 1024, 2048)
    }
    assert (data["layers"], data["kv_heads"], data["shared_layers"], data["parameters"]) == (2, 2, [], None)


def test_lengths_are_those_asked_for_or_in_the_plan_or_the_usual() -> None:
    assert list(inspect_plan(plan(**NOTES), [300])["kv_bytes"]) == ["300"]
    assert list(inspect_plan(plan())["kv_bytes"]) == ["1024", "4096"]
    assert inspect_plan(plan())["reference_length"] == 4096
    assert inspect_plan(plan(provenance={"lengths": [512, 2048]}))["reference_length"] == 2048


def test_a_checkpoint_has_parameters(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    plan(**NOTES).save(folder / "plan.json")
    plan(**NOTES).save(tmp_path / "out" / "plan.json")
    save_file({"a": np.zeros((3, 5), np.float32)}, folder / "model-1.safetensors", {"format": "pt"})
    save_file({"b": np.zeros(7, np.float32), "c": np.zeros((), np.float32)}, folder / "model-2.safetensors")
    save_file({"d": np.zeros(99, np.float32)}, folder / "plan.gates.safetensors")  # beside the model's
    named = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    for where in ("out", "out/model", "out/model/plan.json"):
        assert answer("inspect", tmp_path / where)["parameters"] == {"dense": 23, "plan": 23}
    for content in (b"", b"\xff" * 8, b"\x05\x00\x00\x00\x00\x00\x00\x00{}", b"\x02" + b"\x00" * 7 + b"[]"):
        (folder / "model-2.safetensors").write_bytes(content)
        with pytest.raises(ArtefactError, match="is not a whole safetensors file"):
            count_parameters(folder, plan())


def test_layers_that_share_are_listed_and_what_they_do_without_is_counted(tmp_path: Path) -> None:
    shares = (None, Share(0, (1, 0)))
    bare = plan(**NOTES)
    shared = replace(bare, rules=with_shared_rules(bare.rules, shares), shares=shares)
    (tmp_path / "config.json").write_text("{}")
    shared.save(tmp_path / "plan.json")
    weights = {
        "model.embed": (5, 8),
        "model.layers.0.attn.q_proj.weight": (64, 8),
        "model.layers.0.attn.q_proj.bias": (64,),
    }
    weights |= {"model.layers.0.attn.v_proj.weight": (32, 8), "model.layers.0.attn.q_norm.weight": (16,)}
    weights |= {"model.layers.1.attn.q_proj.weight": (0, 8), "model.layers.1.attn.v_proj.weight": (32, 8)}
    arrays = {name: np.zeros(size, np.float32) for name, size in weights.items()}
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    data = answer("inspect", tmp_path)
    there = sum(array.size for array in arrays.values())
    assert data["parameters"] == {"dense": there + 64 * 8 + 64 + 16, "plan": there}
    assert data["shared_layers"] == [{"layer": 1, "anchor": 0, "kind": "copy", "head_map": [1, 0]}]
    result = invoke("inspect", tmp_path)
    assert "layer 1: copy of layer 0 by heads 1, 0" in result.stdout
    assert f"{there:,} of {there + 592:,}" in result.stdout


def test_people_see_tables_within_100_columns(tmp_path: Path) -> None:
    plan(layers=170, **NOTES).save(tmp_path / "plan.json")
    result = invoke("inspect", tmp_path / "plan.json")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "layers 160-169" in result.stdout
    assert "\x1b" not in result.stdout


def test_the_map_has_a_row_for_each_head_and_a_column_for_each_layer() -> None:
    lines = kept_map(plan(), 1024).plain.splitlines()
    assert lines[1:] == ["layers 0-1", "KV head 0   █▂", "KV head 1   ▂▁"]


def test_formats_are_shown_where_there_are_codes(tmp_path: Path) -> None:
    native = plan()
    assert formats_map(native) is None
    assert inspect_plan(native)["bits"] == {"keys": 32.0, "values": 32.0}
    rows = [[replace(rule, key_format="int8", value_format="int4") for rule in row] for row in native.rules]
    rows[0][1] = replace(rows[0][1], key_format="int4")
    coded = replace(native, rules=tuple(map(tuple, rows)))
    shown = formats_map(coded)
    assert shown is not None
    assert shown.plain.splitlines()[1:] == [
        "layers 0-1",
        "KV head 0 K 88",
        "KV head 0 V 44",
        "KV head 1 K 48",
        "KV head 1 V 44",
    ]
    data = inspect_plan(coded)
    dim = coded.model.head_dim
    assert data["bits"]["values"] == 4 + 32 / dim
    assert 4 < data["bits"]["keys"] - 32 / dim < 8
    assert sum(row["kv_bytes"] for row in data["formats"]) == coded.kv_bytes(data["reference_length"])
    coded.save(tmp_path / "plan.json")
    result = invoke("inspect", tmp_path / "plan.json")
    assert result.exit_code == 0
    assert "Bytes by format" in result.stdout
    assert "KV head 1 K 48" in result.stdout


def test_numbers() -> None:
    assert [readable_bytes(n) for n in (0, 1023, 1024, 25165824, 2**50)] == [
        "0 B", "1023 B", "1.0 KiB", "24.0 MiB", "1024.0 TiB"
    ]  # fmt: skip
    assert (readable_number(None), readable_number(0.12345)) == ("-", "0.123")


def test_what_gates_choose_is_shown(tmp_path: Path) -> None:
    made = replace(plan(**NOTES), gates="0" * 16)
    rows = tuple(
        tuple(replace(rule, select_alpha=40) if not rule.sees_all else rule for rule in row) for row in made.rules
    )
    gated = replace(made, rules=rows, gates="0" * 16)
    gated.save(tmp_path / "plan.json")
    result = invoke("inspect", tmp_path / "plan.json")
    assert result.exit_code == 0
    assert "3 KV heads keep tokens by their score" in result.stdout
    assert "Share of kept tokens that the gate selected" in result.stdout
    data = inspect_plan(gated)["gates"]
    n = inspect_plan(gated)["reference_length"]
    chosen = gated.kept(n) - replace(made, rules=made.rules).kept(n)
    assert chosen == 3 * 40
    assert data == {"kv_heads": 3, "share": chosen / gated.kept(n)}
    assert inspect_plan(made)["gates"] is None
    refused = invoke("inspect", tmp_path / "plan.json", "--show-tokens", "x.txt")
    assert refused.exit_code != 0


def test_classes_of_tokens() -> None:
    named = {" 1": "digits", "x9": "digits", "\n\n": "line break", "  ": "space", ".": "punctuation"}
    named |= {" The": "capitalised", " the": "start of a word", "ing": "rest of a word"}
    assert {token: token_class(token) for token in named} == named


def test_what_a_terminal_would_obey_is_spelt_out(tmp_path: Path) -> None:
    made = replace(plan(), model=replace(plan().model, model_type="llama\x1b]0;mine\x07"))
    made.save(tmp_path / "plan.json")
    done = invoke("inspect", tmp_path / "plan.json")
    assert done.exit_code == 0, done.stderr
    assert r"llama\x1b]0;mine\x07" in done.stdout
    assert "\x1b" not in done.stdout
    tables = token_tables({"kv_heads": 1, "classes": [], "tokens": ["a", "\x1b[2Jb"], "kept": [None, 0.9]})
    assert "a[\\x1b[2Jb]" in printed(tables, width=200, no_color=True)
    text = (tmp_path / "plan.json").read_text("utf-8").replace('"min_window": 32', '"min_window": "\\u001b[2J"')
    (tmp_path / "plan.json").write_text(text, "utf-8")
    done = invoke("inspect", tmp_path / "plan.json")
    assert done.exit_code == 1
    assert r"min_window is \x1b[2J, not one of" in done.stderr


def test_memory_of_requests_of_a_plan_and_of_a_dense_model(tmp_path: Path, tiny_folder: Path) -> None:
    made = plan(**NOTES)
    made.save(tmp_path / "plan.json")
    asked = ["--lengths", "1k", "--batch", "1,8"]
    data = answer("inspect", tmp_path / "plan.json", *asked)
    (row,) = data["memory"]["rows"]
    assert row["kv_bytes"]["8"] | {"int8": 0, "int4": 0} == {
        "dense": 8 * made.model.dense_kv_bytes(1024),
        "plan": 8 * made.kv_bytes(1024),
        "int8": 0,
        "int4": 0,
    }
    assert row["requests"]["plan"] is None  # a plan alone has no weights
    data = answer("inspect", tiny_folder, *asked)
    (row,) = data["memory"]["rows"]
    assert data["dense"]
    assert row["kv_bytes"]["8"]["25%"] == 8 * int(row["kv_bytes"]["1"]["dense"] * 0.25)
    assert row["requests"]["12.5%"] > row["requests"]["dense"] > 0
    told = invoke("inspect", tiny_folder, *asked).stdout
    assert "plan at 12.5%" in told
    assert "4-bit cache, all tokens" in told


def test_doctor_says_what_requests_take(tiny_folder: Path, environment: dict[str, Any], monkeypatch: Any) -> None:
    from moacompress.doctor import checks

    monkeypatch.setattr(checks, "check_environment", lambda: environment)
    asked = ["--lengths", "32k", "--batch", "8"]
    data = answer("doctor", tiny_folder, *asked)
    (row,) = data["model"]["memory"]["rows"]
    assert row["length"] == 32768
    assert set(row["kv_bytes"]["8"]) == {"dense", "int8", "int4", "50%", "25%", "12.5%"}

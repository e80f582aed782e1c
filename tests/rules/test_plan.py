"""The plan: windows, kept, slots and bytes against brute force; the file format and every refusal."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moacompress
from moacompress.core.errors import PlanError
from moacompress.rules import key_centres
from moacompress.rules import plan as plan_module
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import MIN_WINDOWS, SINKS, Rule
from moacompress.rules.windows import BETA_ONE, BLOCK, kept, slots, visible_intervals, window


def shape(**changes: Any) -> ModelShape:
    return replace(ModelShape("llama", 3, 4, 2, 16, "float32", (None, 24, None), "0123456789abcdef"), **changes)


def some_plan() -> Plan:
    rows = (
        (Rule(4, 32, 0), Rule.FULL),
        (Rule(16, 0, 256), Rule(64, 64, 128)),
        (Rule(4, 0, 1), Rule(64, 1 << 20, 0)),
    )
    return Plan(shape(), 32, rows, budget={"asked": ["25%"]}, quality={"measured_harm": {"plan": 0.1}})


def visible(n: int, rule: Rule, min_window: int, native: int | None) -> list[int]:
    """Returns the keys that query `n - 1` sees, straight from the definition."""
    i = n - 1
    width = min(n, max(min_window, rule.alpha + rule.beta_q * n // 1024))
    return [j for j in range(n) if j <= i and (j < rule.sink or j > i - width) and (native is None or j > i - native)]


RULES = st.builds(
    Rule,
    st.sampled_from(SINKS),
    st.one_of(st.integers(0, 300), st.just(1 << 24)),
    st.integers(0, BETA_ONE),
)
NATIVE = st.one_of(st.none(), st.integers(1, 200))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 500), RULES, st.sampled_from(MIN_WINDOWS), NATIVE)
def test_kept_and_slots_are_what_the_definition_says(n: int, rule: Rule, min_window: int, native: int | None) -> None:
    keys = visible(n, rule, min_window, native)
    assert rule.kept(n, min_window, native) == len(keys)
    assert rule.slots(n, min_window, native) == BLOCK * len({key // BLOCK for key in keys})


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), RULES, st.sampled_from(MIN_WINDOWS), NATIVE)
def test_what_is_evicted_is_never_visible_again(n: int, rule: Rule, min_window: int, native: int | None) -> None:
    starts = [visible_intervals(m, rule.span(min_window, native))[1][0] for m in (n, n + 1)]
    assert starts[0] <= starts[1]
    now, then = (set(visible(m, rule, min_window, native)) for m in (n, n + 1))
    assert then - {n} <= now


def test_numpy_and_torch_agree_with_integers() -> None:
    import torch

    n = np.arange(1, 400, dtype=np.int64)
    for rule, native in ((Rule(16, 40, 100), None), (Rule(64, 0, 300), 50)):
        span = rule.span(16, native)
        expected = [kept(int(i), span) for i in n]
        assert kept(n, span).tolist() == expected
        tensor = kept(torch.from_numpy(n), span)
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == expected
        expected = [slots(int(i), span) for i in n]
        assert slots(n, span).tolist() == expected


def test_no_float_ever_computes_a_window() -> None:
    n = (1 << 31) + 1
    assert window(n, 3, 717, 32) == 3 + 717 * n // 1024


def test_bytes_are_slots_times_key_and_value() -> None:
    plan = some_plan()
    per_slot = 2 * 16 * 4
    expected = sum(
        BLOCK * len({key // BLOCK for key in visible(300, rule, 32, native)})
        for row, native in zip(plan.rules, plan.model.native_windows, strict=True)
        for rule in row
    )
    assert plan.kv_bytes(300) == expected * per_slot
    assert plan.kv_bytes(300, batch=8) == 8 * expected * per_slot
    assert Plan.full(shape()).kv_bytes(300) == shape().dense_kv_bytes(300)
    assert Plan.full(shape()).density(300) == 1.0
    assert plan.kv_share(300) == plan.kv_bytes(300) / shape().dense_kv_bytes(300)
    assert shape(dtype="bfloat16").dense_kv_bytes(300) * 2 == shape().dense_kv_bytes(300)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    plan = some_plan()
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.key() == plan.key()
    assert loaded.diff(plan) == []


def test_lengths_are_those_in_the_notes() -> None:
    plan = some_plan()
    assert plan.stated_lengths == plan.profiled_lengths == [1024, 4096]
    noted = plan.with_notes(budget={"bytes": {"2048": {}, "512": {}}})
    assert noted.stated_lengths == noted.profiled_lengths == [512, 2048]
    assert noted.with_notes(provenance={"lengths": [300, 700]}).profiled_lengths == [300, 700]


def test_centres_are_of_keys_in_codes_and_are_kept(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(0, 100, (3, 2, 16))
    numbers[0, 0] = 1e9  # beyond float16
    centres = key_centres.as_centres(numbers)
    native = some_plan()
    held = Plan(native.model, 32, native.rules, centres=centres)
    assert (held.key_centre(0), held.key(), held.diff(native)) == (None, native.key(), [])  # for baselines beside it
    rows = [list(row) for row in native.rules]
    rows[0][1] = Rule(4, 0, 0, "int4", "native")
    rows[2] = [Rule(4, 0, 0, "int8", "int8")] * 2
    plan = Plan(native.model, 32, tuple(map(tuple, rows)), centres=centres)
    assert [[bool(centre) for centre in row] for row in plan.used_centres] == [
        [False, True],
        [False, False],
        [True, True],
    ]
    assert plan.key_centre(1) is None
    assert np.array_equal(np.asarray(plan.key_centre(2)), numbers[2].astype(np.float16).astype(np.float32))
    assert not np.asarray(plan.key_centre(0))[0].any()
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.key_centre(1) is None
    assert moacompress.inspect(plan)["centres"] == {"kv_heads": 3, "bytes": 3 * 16 * 4}
    assert moacompress.inspect(native)["centres"] is None
    without = Plan(native.model, 32, plan.rules)
    assert without.key() != plan.key()
    assert without.diff(plan) == ["centres of keys: none -> of 3 KV heads"]
    other = Plan(native.model, 32, plan.rules, centres=key_centres.as_centres(numbers + 1))
    assert other.key() != plan.key()
    ours = plan.of_heads(range(1, 2))
    assert np.array_equal(np.asarray(ours.key_centre(2)), np.asarray(plan.key_centre(2))[1:])
    with pytest.raises(PlanError, match="of 2 layers, not 3"):
        Plan(native.model, 32, plan.rules, centres=centres[:2])
    with pytest.raises(PlanError, match="layer 1 are not those of 2 KV heads of 16"):
        Plan(native.model, 32, plan.rules, centres=(centres[0], (b"\0\0", b""), centres[2]))


def test_key_ignores_notes_and_weights() -> None:
    plan = some_plan()
    assert plan.with_notes(quality={}).key() == plan.key()
    other = Plan(shape(weights_fingerprint="f" * 16), plan.min_window, plan.rules)
    assert other.key() == plan.key()
    assert Plan(shape(), 16, plan.rules).key() != plan.key()


def test_diff_names_layer_and_head() -> None:
    plan = some_plan()
    rows = [list(row) for row in plan.rules]
    rows[1][0] = Rule(16, 0, 512)
    other = Plan(plan.model, 64, tuple(map(tuple, rows)))
    assert plan.diff(other) == ["min_window: 32 -> 64", "layer 1 KV head 0: 16|0+0.25n -> 16|0+0.5n"]


def part(data: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: part(data, path[:-1]).__setitem__(path[-1], value)


def without(*path: str | int) -> Callable[[dict[str, Any]], None]:
    return lambda data: part(data, path[:-1]).__delitem__(path[-1])


REFUSED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (at("format", value="other"), 'not a moacompress plan: "format" is not'),
    (at("version", value=4), "version 4, this moacompress reads up to 1; upgrade"),
    (at("version", value=True), "version must be a whole number, not 'True'"),
    (at("extra", value=1), "the plan has the unknown key 'extra'"),
    (without("layers"), "the plan lacks the key 'layers'"),
    (at("model", value=[]), "model must be an object"),
    (at("model", "layers", value=4), "model.kv_heads has 3 entries, not 4"),
    (at("model", "layers", value=10**9), "model.layers is 1000000000, outside"),
    (at("model", "heads", 1, value=5), "model.heads of layer 1 is 5, no multiple of model.kv_heads 2"),
    (at("model", "kv_heads", 2, value=0), "model.kv_heads of layer 2 is 0, outside"),
    (at("model", "head_dim", 0, value=-1), "model.head_dim of layer 0 is -1, outside"),
    (at("model", "head_dim", 2, value=32), "model has head_dim 16 in layer 0 and 32 in layer 2; this moacompress runs"),
    (at("model", "kv_owners", 2, value=0), "model.kv_owners of layer 2"),
    (at("model", "dtype", value="int4"), "model.dtype is int4, not one of"),
    (at("model", "dtype", value=["float32"]), "model.dtype must be a text"),
    (at("model", "model_type", value="x" * 300), "model.model_type must be a text of at most 256"),
    (at("model", "native_windows", value=None), "model.native_windows must be a list"),
    (at("model", "native_windows", 1, value=-24), "native_windows of layer 1 is -24, outside"),
    (at("min_window", value=17), "min_window is 17, not one of 16, 32, 64"),
    (at("min_window", value=True), "min_window is True, not one of"),
    (without("layers", 2), "layers has 2 entries, not 3"),
    (at("layers", 1, value=7), "layer 1 must be an object"),
    (
        at("layers", 1, "layer", value=2),
        "entry 1 of layers is about layer 2; this moacompress runs plans about all layers",
    ),
    (at("layers", 1, "key_centre", value=["AAAA"]), "key_centre of layer 1 has 1 entries, not 2"),
    (at("layers", 1, "key_centre", value=[None, 3]), "key_centre of layer 1 KV head 1 must be a text"),
    (at("layers", 1, "key_centre", value=[None, "*"]), "key_centre of layer 1 KV head 1 is no base64"),
    (at("layers", 1, "key_centre", value=["AAAA", None]), "KV head 0 has 3 bytes, not the 32 of 16 float16 numbers"),
    (
        at("layers", 1, "key_centre", value=[None, "AHwA" * 10 + "AHw="]),
        "key_centre of layer 1 KV head 1 has numbers that",
    ),
    (at("layers", 1, "sink", value=[4]), "sink of layer 1 has 1 entries, not 2"),
    (at("layers", 1, "sink", 1, value=5), "sink of layer 1 KV head 1 is 5, not one of 4, 16, 64"),
    (at("layers", 2, "alpha", 0, value=-1), "alpha of layer 2 KV head 0 is -1, outside"),
    (at("layers", 2, "alpha", 0, value=10**12), "alpha of layer 2 KV head 0 is 1000000000000, outside"),
    (at("layers", 2, "alpha", 0, value=True), "alpha of layer 2 KV head 0 must be a whole number, not 'True'"),
    (at("layers", 0, "beta_q", 1, value=1025), "beta_q of layer 0 KV head 1 is 1025, outside: 1024 is the largest"),
    (at("layers", 0, "beta_q", 1, value=-1), "beta_q of layer 0 KV head 1 is -1, outside: 0 is the smallest"),
    (at("layers", 0, "key_format", 1, value="int2"), "key_format of layer 0 KV head 1 is int2, not one of native"),
    (at("layers", 0, "value_format", 0, value=8), "value_format of layer 0 KV head 0 must be a text"),
    (without("layers", 0, "value_format"), "layer 0 lacks the key 'value_format'"),
    (at("layers", 0, "share", value={"anchor": 0}), "share of layer 0 lacks the key 'kind'"),
    (at("quality", value=[1]), "quality must be an object"),
    (at("budget", value={"memory": {"0": {}}}), "pattern '^[1-9]"),
    *(
        (at("budget", value={"bytes": {length: {}}}), "must be an object of lengths")
        for length in ("999999999", "0", "abc", "9" * 5000)
    ),
    (at("budget", value={"bytes": ["1024"]}), "bytes must be an object"),
    (at("provenance", value={"lengths": 3}), "lengths must be a list"),
    (at("provenance", value={"lengths": [0]}), "a length in provenance.lengths is 0, outside"),
    (at("min_window", value="\x1b[2J"), r"min_window is \x1b[2J, not one of"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_refusals_name_what_is_wrong(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    data = copy.deepcopy(some_plan().to_dict())
    change(data)
    with pytest.raises(PlanError) as error:
        Plan.from_dict(data)
    assert message in str(error.value)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    assert str(error.value).startswith(f"plan {path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["NaN", "-Infinity"])
def test_not_a_number_is_refused(text: str, tmp_path: Path) -> None:
    data = json.dumps(some_plan().to_dict()).replace('"plan": 0.1', f'"plan": {text}')
    assert text in data
    (tmp_path / "plan.json").write_text(data)
    with pytest.raises(PlanError, match="quality must be an object of finite numbers"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"format": ' * 200_000, "not valid JSON"),
        (b"[1, 2]", "not a moacompress plan"),
        (b"[" * 101, "at most 100 are read"),
        (None, "No such file"),
    ],
    ids=["half", "deep", "list", "large", "none"],
)
def test_damaged_files_are_refused(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    if message.startswith("at most"):
        monkeypatch.setattr(plan_module, "MAX_JSON_BYTES", 100)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("depth", [70, 5000])
def test_deep_nesting_is_refused(depth: int, tmp_path: Path) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    path = tmp_path / "plan.json"
    text = json.dumps(some_plan().to_dict())
    for old in ('{"plan": 0.1}', '"float32"', '"sink": [16, 64]'):
        assert old in text
        path.write_text(text.replace(old, f'"sink": [{deep}, 64]' if "sink" in old else deep))
        with pytest.raises(PlanError) as error:
            Plan.load(path)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "mistral"}, "it is for the model type llama, and this model has the model type mistral"),
        ({"layers": 2, "native_windows": (None, None)}, "it is for 3 layers, and this model has 2 layers"),
        ({"kv_heads": 4}, "it is for 2 KV heads a layer, and this model has 4"),
        ({"head_dim": 32}, "it is for heads of 16 numbers, and this model has heads of 32"),
        ({"native_windows": (None, None, None)}, "it is for the sliding windows"),
    ],
)
def test_a_plan_for_another_model_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(PlanError, match="the plan is for another model") as error:
        some_plan().check_model(shape(**changes), weights=False)
    assert what in str(error.value)


def test_other_weights_are_refused_only_where_weights_count() -> None:
    other = shape(weights_fingerprint="f" * 16, dtype="bfloat16")
    some_plan().check_model(other, weights=False)
    with pytest.raises(PlanError, match="other weights: fingerprint 0123456789abcdef, the model has ffffffffffffffff"):
        some_plan().check_model(other, weights=True)

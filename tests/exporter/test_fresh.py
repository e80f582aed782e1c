"""A written checkpoint is compared with its model in a fresh process: by logits, within what the dtype allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.core.errors import MoaCompressError
from moacompress.exporter.exporting import export, exported_plan
from moacompress.exporter.fresh import TOLERANCE, Continuation, difference, verify_fresh
from moacompress.models.source import load_source
from moacompress.rules.plan import Plan
from moacompress.runtime import attach


@pytest.fixture(scope="module")
def expected(tiny_folder: Path, plan: Plan) -> Continuation:
    source = load_source(tiny_folder)
    attach(source.model, plan)
    found = Continuation.of(source, plan)
    assert len(found.prompt) == 160
    assert plan.kept(160) < Plan.full(plan.model).kept(160)  # else no test here would tell plans apart
    return found


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_near_tie_may_fall_either_way(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, random_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    """Every token has a twin of the same logit, and this process rounds in favour of the other one."""
    model = tiny_model("llama")
    half = model.config.vocab_size // 2
    model.lm_head.weight.data[half:] = model.lm_head.weight[:half]
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    source = load_source(tmp_path / "dense")
    rounding = 1e-4 * (torch.arange(2 * half) >= half)
    source.model.lm_head.register_forward_hook(lambda module, args, logits: logits + rounding)
    plan = random_plan(source.shape, 3)
    assert exported_plan(export(source, plan, tmp_path / "model")) == plan


@pytest.mark.fresh_process
@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_other_kernels_pass(
    dtype: str, tiny_folder: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_source(tiny_folder, dtype=dtype)
    plan = replace(plan, model=replace(source.shape, dtype=dtype))
    monkeypatch.setenv("MOACOMPRESS_KERNEL", "reference")  # this process has chosen already
    (tmp_path / "safetensors.py").write_text("raise SystemExit('a file of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    assert exported_plan(export(source, plan, tmp_path / "model")) == plan


def test_a_short_context_is_kept(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_model("llama", max_position_embeddings=64).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    source = load_source(tmp_path)
    plan = Plan.full(source.shape)
    attach(source.model, plan)
    found = Continuation.of(source, plan)
    assert len(found.prompt) + len(found.tokens) == 64


@pytest.mark.fresh_process
def test_swapped_layers_are_noticed(copied: Path, expected: Continuation) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    other = {name.replace("layers.0.", "layers.@.").replace("layers.1.", "layers.0."): name for name in weights}
    swapped = {new.replace("layers.@.", "layers.1."): weights[name] for new, name in other.items()}
    save_file(swapped, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoaCompressError, match="at generated token . of 8 the logit of token .* float32 allows 1%"):
        verify_fresh(copied, expected)


def test_another_plan_is_noticed(copied: Path, expected: Continuation, random_plan: Callable[..., Plan]) -> None:
    other = random_plan(exported_plan(copied).model, 4)  # type: ignore[union-attr]
    change_config(copied, lambda config: config["quantization_config"].update(plan=other.to_dict()))
    with pytest.raises(MoaCompressError, match=f"another plan in a fresh process: key {other.key()}, not"):
        verify_fresh(copied, expected)


def test_a_dense_checkpoint_is_noticed(copied: Path, expected: Continuation) -> None:
    change_config(copied, lambda config: config.pop("quantization_config"))
    with pytest.raises(MoaCompressError, match="ran with a DynamicCache"):
        verify_fresh(copied, expected)


def test_a_damaged_checkpoint_is_noticed(copied: Path, expected: Continuation) -> None:
    (copied / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(MoaCompressError, match="did not load and generate in a fresh process: .*safetensors"):
        verify_fresh(copied, expected)


def continuation(logits: Any, dtype: str = "float32") -> Continuation:
    return Continuation([1], [0] * len(logits), np.array(logits, np.float32), "key", dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_dtype_says_how_far_logits_may_be_off(dtype: str) -> None:
    ours = continuation([[10.0, 0.0, 0.0, -1.0], [0.0, 10.0, 0.0, 0.0]], dtype)
    for off, within in ((0.9, True), (1.1, False)):
        found = ours.logits.copy()
        found[1, 3] += off * 10 * TOLERANCE[dtype]
        said = difference(found, ours)
        assert (said is None) is within
    assert said is not None
    assert said.startswith("at generated token 2 of 2 the logit of token 3 is ")
    assert f"{dtype} allows {TOLERANCE[dtype]:.0%}" in said


def test_what_is_ruled_out_in_both_is_no_difference() -> None:
    low = float(np.finfo(np.float32).min)
    ours = continuation([[5.0, 1.0, 0.0, 2.0, -np.inf, low]])
    assert difference(ours.logits.copy(), ours) is None
    assert "token 3" in str(difference(ours.logits + np.array([0, 0, 0, 1, 0, 0], np.float32), ours))
    assert "not finite" in str(difference(ours.logits * np.array([1, 1, 1, np.nan, 1, 1], np.float32), ours))
    assert "not finite" in str(difference(ours.logits, replace(ours, logits=ours.logits * np.nan)))
    assert "shape [1, 5], not [1, 6]" in str(difference(ours.logits[:, :5], ours))
    equal = continuation([[2.0, 2.0, 2.0]])  # of a model that prefers nothing there is no spread to go by
    assert difference(equal.logits.copy(), equal) is None
    assert difference(equal.logits + np.array([1, 0, 0], np.float32), equal) is not None

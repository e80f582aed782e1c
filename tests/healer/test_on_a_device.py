"""Healing on a device that is not there; see `pretend_device`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from moacompress.healer.healing import heal
from tests.pretend_device import KIND, as_a_card


@pytest.fixture
def trainer_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Returns a function that says which device transformers' Trainer takes, and that its optimizer is fused there."""
    property_of: Any = transformers.TrainingArguments.device
    known, optimizer = property_of.fget, sys.modules["torch.optim.optimizer"]

    def choose(name: str) -> None:
        there = torch.device(name)

        def device(arguments: Any) -> torch.device:
            known(arguments)  # which brings up what the Trainer asks for afterwards
            return there

        monkeypatch.setattr(transformers.TrainingArguments, "device", property(device))
        monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: there))
        monkeypatch.setattr(transformers.PreTrainedModel, "use_kernels", False)  # the hub has none for such a device
        monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [there.type])

    return choose


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ["reference", pytest.param("triton", marks=pytest.mark.heavy)])
def test_healing_is_that_of_the_cpu(
    kernel: str,
    healable: dict[str, Path],
    small: Callable[..., Any],
    tmp_path: Path,
    pretend_device: Any,
    trainer_on: Callable[[str], None],
    use_backend: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, found = small(steps=2).override(dtype="float32"), []
    for name in ("cpu", f"{KIND}:0"):
        trainer_on(name)
        kernels = {}
        if kernel == "triton" and name != "cpu":  # the checkpoint is tried on the CPU
            kernels = as_a_card(monkeypatch, use_backend("triton"), cpu_too=True)
        with pretend_device():
            done = heal(
                healable["model"], tmp_path / name, profile=healable["profile"], recipe=recipe.override(device=name)
            )
        kl = done.plan.provenance["heal"]["held_out_kl"]
        found.append((kl["before"]["mean"], kl["after"]["mean"], *done.losses))
    assert not kernels or kernels["attend_chunk"].launches
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][1] < found[0][0]

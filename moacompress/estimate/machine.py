"""The machine that steps run on, as cost tables name it."""

from __future__ import annotations

import torch

from moacompress.core.machine import processor_name
from moacompress.kernels import dispatch
from moacompress.rules.cost_table import Machine


def this_machine(device: str, dtype: str) -> Machine:
    """Returns the machine of this process.

    Args:
        device: torch device of the model.
        dtype: of its weights and cache, by name.

    Raises:
        UsageError, UnsupportedError: as `dispatch.chosen`.
    """
    place, choice = torch.device(device), dispatch.chosen()
    kernel = dispatch.backend_for(torch.empty(0, dtype=getattr(torch, dtype), device=place)).name
    on_gpu = place.type == "cuda"
    return Machine(
        device=place.type,
        processor=torch.cuda.get_device_name(place) if on_gpu else processor_name(),
        threads=torch.get_num_threads(),
        kernel=kernel,
        isa=(choice.isa or "") if kernel == choice.name else "",
    )

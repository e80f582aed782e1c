"""The first line of a command that computes: which kernels run and, where these are the slow ones, why, and what to do."""

from __future__ import annotations

REFERENCE_TIMES = "13 to 16"
"""How many times as long a decode step takes without compiled kernels: docs/results.md."""


def kernel_line(device: str | None) -> str:
    """Returns the line.

    Args:
        device: that was asked for, of a device map the first; None for the CPU.

    Raises:
        UsageError, UnsupportedError: the environment asks for kernels that are not there.
    """
    import torch

    from moacompress.kernels import dispatch
    from moacompress.kernels.reference.reference_backend import ReferenceBackend
    from moacompress.models.placement import first_device

    choice = dispatch.chosen()
    device = None if device is None else first_device(device)
    if device is not None and not device.startswith("cpu"):
        name = dispatch.backend_on(device.partition(":")[0], torch.bfloat16).name
        if name == ReferenceBackend.name:
            return f"kernels: plain PyTorch on {device}, which saves memory and no time"
        return f"kernels: {name} on {device}, whose speed there has not been measured"
    if choice.name != ReferenceBackend.name:
        isa = f" ({choice.isa})" if choice.isa else ""
        return f"kernels: {choice.name}{isa}, {torch.get_num_threads()} threads"
    slower = f"a decode step takes {REFERENCE_TIMES} times as long as with compiled ones"
    return f"kernels: plain PyTorch, as {choice.reason}; {slower}"

"""The first line of a command that computes: which kernels run and, where these are the slow ones, why, and what to do."""

from __future__ import annotations


def kernel_line(device: str | None) -> str:
    """Returns the line for a device or the first of a device map; None is the CPU.

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
        kind = device.partition(":")[0]
        name = dispatch.backend_on(kind, torch.bfloat16).name
        if name == ReferenceBackend.name:
            return f"kernels: plain PyTorch on {device}, as {dispatch.why_plain(kind)}"
        return f"kernels: {name} on {device}, whose speed there has not been measured"
    choice = dispatch.choice_on_cpu(choice)
    if choice.name != ReferenceBackend.name:
        isa = f" ({choice.isa})" if choice.isa else ""
        threads = torch.get_num_threads()
        return f"kernels: {choice.name}{isa}, {threads} thread{'' if threads == 1 else 's'}"
    return f"kernels: plain PyTorch, as {choice.reason}; {dispatch.slower_on_cpu()}"

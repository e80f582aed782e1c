"""The torch device that is asked for: whether there is one of that name here, and whether anything can be computed on it."""

from __future__ import annotations

import re

from moacompress.core.errors import UsageError, did_you_mean, one_line
from moacompress.core.memory import available_bytes
from moacompress.core.ranks import local_rank

KINDS = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that a message suggests; torch knows more."""
_NAME = re.compile(r"[a-z]+(:\d+)?")


def check_device(name: str) -> None:
    """Refuses a device, named as torch does ("cpu", "cuda:0"), on which nothing can be computed here.

    Raises:
        UsageError: no name of a device, or one that this machine or this torch does not have.
    """
    if name == "cpu":
        return
    import torch

    kind = name.partition(":")[0]
    try:
        torch.device(name)
    except RuntimeError as error:
        hint = did_you_mean(kind.lower(), KINDS, f"give one such as {', '.join(KINDS)} or cuda:0")
        if not _NAME.fullmatch(name) and kind in KINDS:
            hint = f"a number may follow the colon, such as {kind}:0"
        raise UsageError(f"{name!r} is not the name of a torch device; {hint}") from error
    reason = _missing(name, kind)
    if reason is not None:
        raise UsageError(f"the device {name} cannot be used: {reason}")


def available_memory(device: str) -> int:
    """Returns the bytes that can be taken of the memory that a model on this device is in."""
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()


def _missing(name: str, kind: str) -> str | None:
    """Returns why nothing can be computed on a device that torch has a name for; None where it can."""
    import torch

    use_cpu = "give --device cpu to compute on the CPU"
    if kind == "cpu":
        return "all cores are one device, cpu"
    if kind == "meta":
        return f"tensors on it have no numbers; {use_cpu}"
    if kind == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built without CUDA; install a build with it, or {use_cpu}"
        return f"torch {torch.__version__} finds no GPU that it can use; {use_cpu}"
    if kind == "mps" and not torch.backends.mps.is_available():
        return f"torch {torch.__version__} finds no Apple GPU; {use_cpu}"
    count = torch.cuda.device_count() if kind == "cuda" else 0
    if name == "cuda" and local_rank() >= count > 1:
        return f"this is process {local_rank()} of this machine, which has {count} GPUs; start one process for each GPU"
    if kind == "cuda" and (torch.device(name).index or 0) >= count:
        last = count - 1
        return "there is one GPU, cuda:0" if last == 0 else f"the GPUs are cuda:0 to cuda:{last}"
    try:
        torch.zeros(1, device=name).add_(1)
    except Exception as error:  # every backend has errors of its own
        return f"{one_line(error).rstrip('.')}; {use_cpu}"
    return None

"""Weights in huge pages: what a decode step reads from end to end is found in fewer steps, and read ahead across pages.

transformers maps a checkpoint's file, so weights lie in the system's cache of it, in pages of 4 KiB. A step reads all of them,
and where addresses are translated twice, as in a virtual machine, a fifth of its time goes into finding pages. On Linux the
loader therefore copies the weights into anonymous memory for which it asks for huge pages. That is the only copy that is held:
the file's pages are given up with the tensors that they were mapped for. Each weight is replaced as soon as it is copied, and
has a storage of its own, so nothing that saves, copies or shares tensors notices.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
from pathlib import Path

import torch
from torch import nn

from moacompress.core.memory import available_bytes

logger = logging.getLogger(__name__)

SWITCH = "MOACOMPRESS_HUGE_PAGES"
"""Environment variable: `0` leaves weights in the cache of their files, which processes share."""
PAGE = 1 << 21
LINE = 64
"""Bytes that every weight begins at a multiple of: a line of the processor's cache."""
SPARE = 1.1
"""How many times the bytes of the weights must be free."""
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def have_huge_pages() -> bool:
    """Returns whether this system gives huge pages to memory that asks for them, and nobody has switched that off here."""
    if not sys.platform.startswith("linux") or os.environ.get(SWITCH) == "0":
        return False
    try:
        return "[never]" not in _ENABLED.read_text()
    except OSError:
        return False


def move_weights(model: nn.Module) -> int:
    """Moves the parameters of a model that are on the CPU into huge pages, if the system has some and there is memory for it.

    A tensor that was taken of a parameter before (`.data`, `state_dict()`) is no view of it any more, so this is for whoever
    has just loaded the model.

    Args:
        model: with plain parameters; others, such as those of quantizers, stay where they are.

    Returns:
        Bytes of the parameters that were moved.
    """
    if not have_huge_pages():
        return 0
    moved = [parameter for parameter in model.parameters() if _can_move(parameter)]
    places, end = [], 0
    for parameter in moved:
        places.append(end)
        end += -(-parameter.nbytes // LINE) * LINE
    if end < PAGE:
        return 0
    if available_bytes() < SPARE * end:
        logger.info(
            "weights stay where they are: %d MiB of huge pages are wanted, and there is no memory for them", end >> 20
        )
        return 0
    memory = mmap.mmap(-1, end + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    with torch.inference_mode(False), torch.no_grad():
        for parameter, place in zip(moved, places, strict=True):
            numbers = torch.frombuffer(memory, dtype=parameter.dtype, count=parameter.numel(), offset=first + place)
            parameter.data = numbers.view(parameter.shape).copy_(parameter.data)
    return sum(parameter.nbytes for parameter in moved)


def _can_move(parameter: nn.Parameter) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.device.type == "cpu"
        and parameter.layout == torch.strided
        and parameter.is_contiguous()
        and parameter.numel() > 0
        and not parameter.is_shared()
    )

"""Whether what is computed is transformed in a way for which operators of ours, and compiled kernels, have no rules."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_ARE_TRANSFORMS_ACTIVE = torch._C._are_functorch_transforms_active
"""Bound once: every product of a few rows asks."""


def in_forward_mode() -> bool:
    """Returns whether derivatives are taken in forward mode, as by `torch.func.jvp`; only torch's own products have any."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Returns whether `torch.func` transforms what is computed, or derivatives are taken in forward mode."""
    return forward_ad._current_level >= 0 or _ARE_TRANSFORMS_ACTIVE()

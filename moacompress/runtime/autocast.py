"""Attention under torch's autocast, which knows of none but its own: what it takes is made of one dtype first."""

from __future__ import annotations

import torch


def is_on(like: torch.Tensor) -> bool:
    """Whether autocast is on for tensors of a device."""
    return torch.is_autocast_enabled(like.device.type)


def as_computed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns tensors of one device in the dtype that autocast computes in; as they are where it is not on."""
    if not is_on(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor.to(dtype) for tensor in tensors)

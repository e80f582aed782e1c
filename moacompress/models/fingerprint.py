"""Which weights these are: the fingerprint that plans and profiles carry."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FINGERPRINT_SAMPLES = 1024
"""Numbers read from every tensor for the weights fingerprint."""


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Returns a short hash of the weights: names, shapes and a spread sample of each tensor, rounded to bfloat16.

    Rounding makes a float32 and a bfloat16 load of one checkpoint agree. At most `FINGERPRINT_SAMPLES` numbers of a
    tensor are read, so it takes well under a second for any model.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // FINGERPRINT_SAMPLES)
        sample = flat[::step][:FINGERPRINT_SAMPLES].to(torch.bfloat16).cpu()
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]

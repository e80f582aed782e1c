"""The KV memory of a dense model, which `doctor` and `inspect` show."""

from __future__ import annotations

from typing import Any

from moacompress.cli.options import batch_sizes
from moacompress.models.device import available_memory
from moacompress.models.skeleton import DescribedModel
from moacompress.rules.budget import parse_lengths
from moacompress.rules.memory import kv_memory

LONGEST = 32768
"""Tokens of a request where no lengths are given: the model's context, and no more than this."""


def dense_memory(
    model: str, lengths: str | None, batch: str | None, device: str, trust_remote_code: bool
) -> dict[str, Any]:
    """Returns `kv_memory` of a dense model, from its config, `--lengths`, `--batch` and the device whose memory counts.

    Raises:
        ModelError: it is no model that can be compressed.
    """
    asked = parse_lengths(lengths) if lengths else ()
    batches = batch_sizes(batch or "1")
    found = DescribedModel.of(model, trust_remote_code)
    return kv_memory(
        found.shape,
        asked or (min(found.context or LONGEST, LONGEST),),
        batches,
        weights=found.weight_bytes,
        available=available_memory(device),
    )

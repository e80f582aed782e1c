"""What an export will take: a fresh process that loads the checkpoint, and its weights written and read."""

from __future__ import annotations

from pathlib import Path

from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.rates import BYTES_PER_SECOND, OPENING_SECONDS


def export_seconds(weight_bytes: int) -> float:
    """Returns about how long an export without a repair takes, seconds, from the bytes of its weights."""
    return OPENING_SECONDS + 2 * weight_bytes / BYTES_PER_SECOND


def export_estimate(folder: Path, exists: bool, replaces: bool, weight_bytes: int, repairs: bool) -> Estimate:
    """Returns what an export would do.

    Args:
        folder: where the checkpoint would go.
        exists: whether this very checkpoint is there already, so that nothing would be written.
        replaces: whether another one is there that would be replaced.
        weight_bytes: of the checkpoint's weights, those that reuse layers do without included.
        repairs: whether weights would be refitted, which takes longer than all the rest and is not counted.
    """
    seconds = 0.0 if exists else export_seconds(weight_bytes)
    what = f"replace the checkpoint in {folder}" if replaces else f"write {folder}"
    beside = ", and a repair before it, which is not counted" if repairs else ""
    text = (
        f"It would {what}, about {readable_bytes(weight_bytes)} of weights, in about {readable_seconds(seconds)}{beside}. "
        "Nothing was written."
    )
    return Estimate(
        seconds=seconds,
        text=(f"{folder} is an export of this plan already; it would be left as it is." if exists else text,),
        facts={
            "model": str(folder),
            "exists": exists,
            "replaces": replaces,
            "weight_bytes": weight_bytes,
            "repairs": repairs,
        },
    )

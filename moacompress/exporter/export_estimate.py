"""What an export will take: a fresh process that loads the checkpoint, and its weights written and read."""

from __future__ import annotations

from pathlib import Path

from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.rates import BYTES_PER_SECOND, OPENING_SECONDS


def export_seconds(weight_bytes: int, loading: float = 0.0) -> float:
    """Returns about how long an export without a repair takes, seconds.

    Args:
        weight_bytes: of its weights, which are written, read and used by this process and by a fresh one.
        loading: seconds in which the source is read and its weights' fingerprint taken; 0 where it is loaded.
    """
    return loading + 2 * (OPENING_SECONDS + weight_bytes / BYTES_PER_SECOND)


def export_estimate(
    folder: Path,
    exists: bool,
    replaces: bool,
    weight_bytes: int,
    repairs: bool,
    loading: float = 0.0,
    slowdown: float = 1.0,
) -> Estimate:
    """Returns what an export would do.

    Args:
        folder: where the checkpoint would go.
        exists: whether this very checkpoint is there already, so that nothing would be written.
        replaces: whether another one is there that would be replaced.
        weight_bytes: of the checkpoint's weights, those that reuse layers do without included.
        repairs: whether weights would be refitted, which takes longer than all the rest and is not counted.
        loading: see `export_seconds`.
        slowdown: see `Estimate`.
    """
    seconds = 0.0 if exists else export_seconds(weight_bytes, loading)
    what = f"replace the checkpoint in {folder}" if replaces else f"write {folder}"
    beside = ", and a repair before it, which is not counted" if repairs else ""
    text = (
        f"It would {what}, about {readable_bytes(weight_bytes)} of weights, in about {readable_seconds(seconds)}{beside}. "
        "Nothing was written."
    )
    return Estimate(
        seconds=seconds,
        slowdown=1.0 if exists else slowdown,
        text=(f"{folder} is an export of this plan already; it would be left as it is." if exists else text,),
        facts={
            "model": str(folder),
            "exists": exists,
            "replaces": replaces,
            "weight_bytes": weight_bytes,
            "repairs": repairs,
        },
    )

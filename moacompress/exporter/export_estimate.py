"""What an export will take: loading the checkpoint in a fresh process, and reading and writing its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moacompress.core.tables import readable_bytes, readable_seconds

FIXED_SECONDS, BYTES_PER_SECOND = 5.0, 200e6
"""Of loading the checkpoint in a fresh process, and of writing and reading its weights."""


def export_seconds(weight_bytes: int) -> float:
    """Returns about how long an export without a repair takes, seconds, from the bytes of its weights."""
    return FIXED_SECONDS + 2 * weight_bytes / BYTES_PER_SECOND


@dataclass(frozen=True)
class ExportEstimate:
    """What an export would do.

    Attributes:
        folder: where the checkpoint would go.
        exists: whether this very checkpoint is there already, so that nothing would be written.
        replaces: whether another one is there that would be replaced.
        weight_bytes: of the checkpoint's weights, those that reuse layers do without included.
        repairs: whether weights would be refitted, which takes longer than all the rest and is not counted.
    """

    folder: Path
    exists: bool
    replaces: bool
    weight_bytes: int
    repairs: bool

    @property
    def seconds(self) -> float:
        """Of the export, without a repair."""
        return 0.0 if self.exists else export_seconds(self.weight_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "estimate": True,
            "model": str(self.folder),
            "exists": self.exists,
            "replaces": self.replaces,
            "weight_bytes": self.weight_bytes,
            "repairs": self.repairs,
            "seconds": round(self.seconds, 1),
        }

    def line(self) -> str:
        """Returns sentences for people."""
        if self.exists:
            return f"{self.folder} is an export of this plan already; it would be left as it is."
        what = f"replace the checkpoint in {self.folder}" if self.replaces else f"write {self.folder}"
        beside = ", and a repair before it, which is not counted" if self.repairs else ""
        return (
            f"It would {what}, about {readable_bytes(self.weight_bytes)} of weights, in about "
            f"{readable_seconds(self.seconds)}{beside}. Nothing was written."
        )

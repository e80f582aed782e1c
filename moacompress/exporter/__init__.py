"""Export: a dense model and a plan become a folder that plain `from_pretrained` loads, with its card. Nothing here searches.

`exporting` writes and verifies the folder, `card` is its README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moacompress.exporter.exporting import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    if name == "export":
        from moacompress.exporter.exporting import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The version of moacompress that runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Returns the installed version; "0+unknown" in a source tree that was never installed."""
    try:
        return version("moacompress")
    except PackageNotFoundError:
        return "0+unknown"

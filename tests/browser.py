"""The browser that pages are looked at with, where there is one."""

from __future__ import annotations

import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def needs_browser() -> str:
    """Returns the path of a Chrome or Chromium; skips the test where none is installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chrome or Chromium is installed")
    return browser

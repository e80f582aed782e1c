"""URLs as they may be shown and kept: without passwords."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(\w[\w+.-]*://[^\s/@:]*):[^\s/]*@")
"""A URL up to its `@`; a password may hold one more, and no slash."""


def without_password(text: str) -> str:
    """Returns a text whose URLs have no password: `postgresql://me@host/db` for `postgresql://me:secret@host/db`."""
    return _PASSWORD.sub(r"\1@", text)

"""URLs as they may be shown and kept: without passwords, whether before the host or in the query."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w[\w+.-]*:/+\S+")
"""What begins as a URL in a text, or nearly: `postgresql:/me:secret@host` is how a typo looks."""
_LOGIN = re.compile(r"^([\w+.-]+:/{1,2}(?!/)[^\s/@:]*):.*@", re.DOTALL)
"""A URL up to its last `@`: a password may hold one more, or a slash. The path of a file begins with a third slash."""
_SECRET = re.compile(r"pass|pwd|secret|token|credential|odbc_connect|dsn", re.IGNORECASE)
"""In the names of a query's keys whose values are not to be shown."""
_PAIR = re.compile(r"(?<=[?&;])([^\s=?&;]+)=[^\s&;'\"]*&?")


def without_password(text: str) -> str:
    """Returns a text whose URLs have no password: `postgresql://me@host/db` for `postgresql://me:secret@host/db`.

    A text that is one URL as a whole is read as SQLAlchemy reads it; in any other a URL ends where a space is.
    """
    whole = _of_database(text) if re.match(r"\w+(\+\w+)?://", text) else None
    return _WORD.sub(lambda found: _hidden(found[0]), text) if whole is None else whole


def _of_database(text: str) -> str | None:
    """Returns the URL of a database without what is secret in it; None where there is nothing, or no such URL."""
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return None
    query = {key: value for key, value in url.query.items() if not _SECRET.search(key)}
    if "@" in (url.host or "") or (url.password is None and len(query) == len(url.query)):
        return None
    kept = URL.create(url.drivername, url.username, None, url.host, url.port, url.database, query)
    return str(kept.render_as_string(hide_password=False))


def _hidden(url: str) -> str:
    url = _LOGIN.sub(r"\1@", url)
    shown = _PAIR.sub(lambda pair: "" if _SECRET.search(pair[1]) else pair[0], url)
    return url if shown == url else shown.rstrip("?&")

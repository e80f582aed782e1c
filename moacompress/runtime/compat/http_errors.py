"""Refusals that the client of a web server reads.

`transformers serve` is a FastAPI app, and FastAPI hides every error's message but an `HTTPException`'s. So where a server is
loaded, what a request cannot have is refused by an error that is both.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from moacompress.core.errors import UnsupportedError

NOT_IMPLEMENTED = 501
NO_RETRY = {"x-should-retry": "false"}
"""Header by which OpenAI's clients give up at once."""

_log = logging.getLogger(__name__)


def refusal(message: str) -> UnsupportedError:
    """Returns the error that refuses what a caller, or a client of a server, asks for.

    Args:
        message: what is refused and what to do instead; a server that streams puts it between quotes into JSON as it is, so it
            has no double quotes, backslashes or line breaks.
    """
    server = sys.modules.get("starlette.exceptions")
    if server is None:
        return UnsupportedError(message)
    _log.warning(message)  # the server's own log has the status alone
    error: UnsupportedError = _over_http(server.HTTPException)(message)
    return error


@functools.cache
def _over_http(http_error: Any) -> Any:
    """Returns the class of errors that are refusals and what a web server hands to its client."""

    class RefusedRequest(UnsupportedError, http_error):  # type: ignore[misc]
        def __init__(self, message: str) -> None:
            http_error.__init__(self, NOT_IMPLEMENTED, message, NO_RETRY)
            self.args = (message,)

        def __str__(self) -> str:
            return str(self.args[0])

        def __reduce__(self) -> tuple[Any, ...]:
            return UnsupportedError, self.args  # who reads it may have no server

    RefusedRequest.__qualname__ = RefusedRequest.__name__  # tracebacks end with it
    return RefusedRequest

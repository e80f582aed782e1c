"""Refusals that the client of a web server reads.

`transformers serve` is a FastAPI app, which hides every error's message but an `HTTPException`'s and, since 5.25, where models
run in processes of their own, a `ValueError`'s. So what a request cannot have is refused by an error that is the one, and the
other too where a server is loaded.
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


class RefusedRequest(UnsupportedError, ValueError):
    """What a caller, or a client of a server, asks for and cannot have."""


def refusal(message: str) -> RefusedRequest:
    """Returns the error that refuses what a caller, or a client of a server, asks for.

    Args:
        message: what is refused and what to do instead; a server that streams puts it between quotes into JSON as it is, so it
            has no double quotes, backslashes or line breaks.
    """
    server = sys.modules.get("starlette.exceptions")
    if server is None:
        return RefusedRequest(message)
    _log.warning(message)  # the server's own log has the status alone
    error: RefusedRequest = _over_http(server.HTTPException)(message)
    return error


@functools.cache
def _over_http(http_error: Any) -> Any:
    """Returns the class of errors that are refusals and what a web server hands to its client."""

    class RefusedOverHttp(RefusedRequest, http_error):  # type: ignore[misc]
        def __init__(self, message: str) -> None:
            http_error.__init__(self, NOT_IMPLEMENTED, message, NO_RETRY)
            self.args = (message,)

        def __str__(self) -> str:
            return str(self.args[0])

        def __reduce__(self) -> tuple[Any, ...]:
            return RefusedRequest, self.args  # who reads it may have no server

    RefusedOverHttp.__qualname__ = RefusedOverHttp.__name__  # tracebacks end with it
    return RefusedOverHttp

"""Services that tests start themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.services import postgres


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """The URL of a PostgreSQL server that is stopped at the end."""
    if postgres.programs() is None:
        pytest.skip(postgres.MISSING)
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not here; `make test-services` installs it")
    with postgres.running() as url:
        yield url

"""Searches by many workers, some of which are killed, on every kind of storage; PostgreSQL's is a real server."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from moacompress.core.errors import ArtefactError
from moacompress.search.measure.storages import open_storage, shown
from tests.search.conftest import make_profile
from tests.search_workers import SearchRun, check_nothing_is_lost_or_doubled, killed_at_random

pytestmark = pytest.mark.services

SEEDS = int(os.environ.get("MOACOMPRESS_TEST_SEEDS", "3"))
"""Runs on each storage."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one worker writes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    run = SearchRun(make_profile(samples=4, trials=5), str(folder / "s.journal"), folder, folder / "plan.json")
    run.start()
    assert run.wait() == [0], run.errors()
    return run.out.read_bytes()


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_killed_workers_had_is_taken_over(
    kind: str, seed: int, alone: bytes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage = {"journal": str(tmp_path / "s.journal"), "sqlite": f"sqlite:///{tmp_path}/s.db"}.get(kind)
    # each seed is a search of its own in the one database
    profile = make_profile(samples=4, trials=5)
    run = SearchRun(profile, storage or of_its_own(request, seed), tmp_path, tmp_path / "plan.json")
    killed_at_random(run, seed)
    assert run.out.read_bytes() == alone
    check_nothing_is_lost_or_doubled(run)


def of_its_own(request: pytest.FixtureRequest, seed: int) -> str:
    """Makes a database of the server, and returns its URL."""
    import psycopg

    url = str(request.getfixturevalue("database"))
    name = f"seed{seed}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{url.rpartition('/')[0]}/{name}"


def test_a_password_is_in_no_error_and_no_log(database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    password = database.split(":")[2].rpartition("@")[0]
    wrong = database.removesuffix("postgres") + "nothing"
    with caplog.at_level(logging.DEBUG), pytest.raises(ArtefactError, match="does not exist") as error:
        open_storage(wrong)
    for text in (str(error.value), caplog.text, shown(database)):
        assert password not in text

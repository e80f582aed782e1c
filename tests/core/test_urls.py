"""URLs without what is secret in them."""

from __future__ import annotations

import pytest

from moacompress.core.urls import without_password

HIDDEN = {
    "postgresql://me:s3cret@host:5432/db": "postgresql://me@host:5432/db",
    "postgresql+psycopg2://me:s3cr@t:x@host/db": "postgresql+psycopg2://me@host/db",
    "postgresql://host/db?password=s3cret": "postgresql://host/db",
    "postgresql://me@host/db?connect_timeout=3&sslpassword=s3cret": "postgresql://me@host/db?connect_timeout=3",
    "postgresql://me@host/db?p%61ssword=s3cret": "postgresql://me@host/db",
    "mysql://me:s3/cret@host": "mysql://me@host",
    "mysql://me:s3 cret@host/db": "mysql://me@host/db",
    "mysql://me:s3cret@host/db?charset=utf8&passwd=s3cret": "mysql://me@host/db?charset=utf8",
    "mysql://me:s3cret@host:port/db": "mysql://me@host:port/db",
    "postgresql:/me:s3cret@host/db": "postgresql:/me@host/db",
    "--storage=mysql://me:s3cret@host/db?passwd=s3cret&charset=utf8": "--storage=mysql://me@host/db?charset=utf8",
    "no such host: 'mysql://me:s3/cret@host/db' (1)": "no such host: 'mysql://me@host/db' (1)",
}
KEPT = (
    "sqlite:///study.db",
    "sqlite:///a:x@b/c.db and /home/me:x/a@b",
    "sqlite:////tmp/a:x@b.db?timeout=3",
    "postgresql://me@host/db?host=/var/run&connect_timeout=3",
    "see http://host:80/page, and write to me@host",
)


@pytest.mark.parametrize("text", HIDDEN)
def test_what_is_secret_goes_and_the_rest_stays(text: str) -> None:
    assert without_password(text) == HIDDEN[text]
    assert without_password(HIDDEN[text]) == HIDDEN[text]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_not_secret_stays(text: str) -> None:
    assert without_password(text) == text

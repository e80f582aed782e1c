"""The environment as `doctor` sees it, which does not change."""

from __future__ import annotations

from typing import Any

import pytest

from moacompress.doctor.checks import check_environment


@pytest.fixture(scope="package")
def environment() -> dict[str, Any]:
    return check_environment()

"""Retention counts the prompts that dense gets right."""

from __future__ import annotations

import pytest

from moacompress.core.statistics import wilson
from moacompress.evaluation.scoring.retention import retention


def test_retention_counts_what_dense_gets_fully_right() -> None:
    assert retention([1.0, 1.0, 0.5, 0.0, 1.0] * 3, [1.0, 0.0, 1.0, 1.0, 1.0] * 3) == (2 / 3, wilson(6, 9), 9)
    assert retention([1.0, 1.0, 0.5], [0.5, 1.0, 0.0]) == (0.75, None, 2)
    assert retention([0.5, 0.0], [1.0, 1.0]) is None
    with pytest.raises(ValueError, match="zip"):
        retention([1.0], [1.0, 1.0])

"""What a search takes from a profile: answers, plain text beside them, and never changes around a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moacompress.calibration.store import Profile
from moacompress.core.errors import UsageError
from moacompress.search.search_request import SearchRequest


def test_plain_text_counts_beside_the_answers_by_its_weight(profiles: Callable[..., Profile]) -> None:
    profile = profiles()
    kinds = tuple("text" if index % 4 > 1 else "answer" for index in range(len(profile.sample_lengths)))
    mixed = replace(profile, sample_kinds=kinds)
    assert set(kinds) == {"answer", "text"}
    found = {}
    for weight in (0.0, 0.25, 4.0):
        request = SearchRequest.of(mixed, "25%", mixed.recipe.override(search__text_weight=weight))
        found[weight] = request.surrogate.influence
        expected = mixed.influence("robust") + weight * mixed.influence("robust", "text")
        assert np.allclose(found[weight], expected)
    assert not np.allclose(found[0.0], found[4.0])
    keys = {SearchRequest.of(mixed, "25%", mixed.recipe.override(search__text_weight=w)).key for w in (0.25, 4.0)}
    assert len(keys) == 2


def test_a_profile_of_plain_text_alone_is_gone_by(profiles: Callable[..., Profile]) -> None:
    profile = profiles()
    text = replace(profile, sample_kinds=("text",) * len(profile.sample_kinds))
    assert np.array_equal(SearchRequest.of(text, "25%", text.recipe).surrogate.influence, profile.influence("robust"))


def test_a_profile_around_a_plan_is_refused(profiles: Callable[..., Profile]) -> None:
    profile = replace(profiles(), around="0123456789abcdef")
    with pytest.raises(UsageError, match="is of changes around a plan; search in one of the dense model"):
        SearchRequest.of(profile, "25%", profile.recipe)

"""What a search takes from a profile: answers, and plain text beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from moacompress.core.errors import UsageError
from moacompress.models.source import SourceModel
from moacompress.rules.formats import CODED
from moacompress.search.search_request import SearchRequest
from tests.conftest import tiny_model
from tests.search.conftest import make_profile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def test_plain_text_counts_beside_the_answers_by_its_weight() -> None:
    profile = make_profile()
    kinds = tuple("text" if index % 4 > 1 else "answer" for index in range(len(profile.sample_lengths)))
    mixed = replace(profile, sample_kinds=kinds)
    assert set(kinds) == {"answer", "text"}
    found = SearchRequest.of(mixed, "25%", mixed.recipe).surrogate.influence
    assert np.allclose(found, (mixed.influence("robust") + 0.5 * mixed.influence("robust", "text")) / 1.5)
    assert not np.allclose(found, mixed.influence("robust"))


def test_formats_on_offer_are_those_asked_for_or_all_that_are_known() -> None:
    profile = make_profile(formats=True)
    keys = set()
    for asked, formats in ((None, CODED), (["int8"], ("int8",)), ([], ())):
        request = SearchRequest.of(profile, "25%", profile.recipe.override(search__formats=asked))
        assert request.profile.formats == formats
        assert request.surrogate.rules == request.profile.rules
        assert ("precision" in request.parameters.ranges) == bool(formats)
        keys.add(request.key)
    assert len(keys) == 3
    plain = make_profile()
    assert SearchRequest.of(plain, "25%", plain.recipe).profile.formats == ()
    assert SearchRequest.of(plain, "25%", plain.recipe).key in keys  # searched as ever
    with pytest.raises(UsageError, match="says nothing of the format int4"):
        SearchRequest.of(plain, "25%", plain.recipe.override(search__formats="int4"))


def test_what_is_measured_in_another_dtype_is_another_search(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    profile = make_profile()
    own = profile.shape.dtype
    other = "bfloat16" if own == "float32" else "float32"

    def key(asked: str, loaded: str | None = None) -> str:
        model = None
        if loaded is not None:
            model = SourceModel(tiny_model().to(getattr(torch, loaded)), tiny_tokenizer, "", profile.shape, 0)
        return SearchRequest.of(profile, "25%", profile.recipe.override(dtype=asked), model=model).key

    assert key("auto") == key(own) == key("auto", own)
    assert key(other) == key(other, other) == key("auto", other)
    assert key("auto") != key(other)
